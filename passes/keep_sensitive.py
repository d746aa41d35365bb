"""Let stay float what measurement says is sensitive.

1. A node with static scales whose own error, on exact inputs, is above a bound.
2. Of the others, those that cost the outputs of the whole model most, until with all that is left
   static quantized as planned the worst output is good to a bound.  What a node costs an output is
   measured there, with that node or a few quantized alone (`sensitive_groups`): its own error says
   little of that.
3. Of the ops between them that are to hand on integers (`join_integers`), and of products of two
   activations, those that take the worst output below the bound again.

Scales that are computed token by token fit every token: nothing with those is looked at, and no
model without static scales is run.

The error of a node is that of its channels, noise over signal, each at most 1, averaged: a
channel that is lost counts however small it is beside the others (a detection head has boxes and
scores in one tensor, a depthwise convolution channels of any range).  Ops that are sensitive by
their kind were left out before, see `assign-precision`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from qcompiler.ir.decisions import add_note, keep_float, operand_plan_of
from qcompiler.ir.errors import OptionError
from qcompiler.passes.insert_qdq import Observer, is_static
from qcompiler.passes.measuring_pass import MeasuringPass
from qcompiler.passes.second_moments import LayerRuns
from qcompiler.passes.sensitive_groups import Group, sensitive_groups
from qcompiler.passes.side_by_side import Runner, own_errors, quantized_copy
from qcompiler.passes.worst_output import WorstOutput

__all__ = ["KeepSensitive"]

_MOST = 1000
"""dB: its power is still a float."""

_OF_LINKS = 1 / 4
"""The part of the noise that is left to ops between layers, where there are some."""

_FEWEST = 20
"""Runs with which layers and what lies between them are looked at one after the other: two of three
for layers."""


class KeepSensitive(MeasuringPass):
    """Take back the plans that cost too much accuracy.

    Attributes:
        run: Runs the model on samples; without it nothing is measured, and nothing changes.
        observe: Where static ranges come from.
        options: What is too much.
        progress: Starts a clock, see `LayerRuns`: what hears of each run of the search.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """What costs too much.

        Attributes:
            own: The least SQNR in dB that a node may have on exact inputs, the average of its
                channels.
            outputs: The least SQNR in dB of the worst output, with all that is static quantized.
            runs: The most times that the whole model is run to get there; 0 leaves the outputs as
                they are. With fewer more nodes stay float than would have to.
        """

        own: float = 10.0
        outputs: float = 20.0
        runs: int = 60

        def __post_init__(self) -> None:
            """Check the values.

            Raises:
                OptionError: Decibels that are no number or out of all bounds, or fewer runs than
                    none.
            """
            for name in ("own", "outputs"):
                if not abs(getattr(self, name)) <= _MOST:
                    raise OptionError(
                        f"{name} must be a number of dB from -{_MOST} to {_MOST}, not "
                        f"{getattr(self, name)}"
                    )
            if self.runs < 0:
                raise OptionError(f"runs must be 0 or more, not {self.runs}")

    options: Options

    def __init__(
        self,
        run: Runner | None = None,
        observe: Observer | None = None,
        options: Options | None = None,
        progress: Callable[[], Callable[[str, float], None]] | None = None,
    ) -> None:
        super().__init__(run, observe, options)
        self.progress = progress or LayerRuns().progress

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Measure, and decide.

        Raises:
            CalibrationError: A static plan, and nothing to calibrate it with.
        """
        nodes = {node.name or "": node for node in model.graph if is_static(node)}
        products = any(operand_plan_of(node) for node in model.graph)
        if not (nodes or products) or self.run is None:
            return ir.passes.PassResult(model, False)
        errors = self._own(model, list(nodes)) if nodes else {}
        bound = self.options.own
        for name, error in errors.items():
            if error < bound:
                _keep(nodes[name], f"its own error is {error:.1f} dB, below {bound:g}")
        kept = sum(error < bound for error in errors.values())
        left = [name for name, node in nodes.items() if name in errors and is_static(node)]
        if (left or products) and self.options.runs:
            kept += self._reach(model, {name: nodes[name] for name in left})
        return ir.passes.PassResult(model, kept > 0)

    def _own(self, model: ir.Model, names: Sequence[str]) -> dict[str, float]:
        """SQNR of each node in dB; of those that could be measured."""
        assert self.run is not None
        copy = quantized_copy(model, self.observe)
        joined, found = own_errors(model, copy, names)
        rows = self.run(joined, [name for means in found.values() for name in means.names])
        errors = {name: means.by_channel(rows) for name, means in found.items()} if rows else {}
        return {name: error for name, error in errors.items() if not math.isnan(error)}

    def _reach(self, model: ir.Model, nodes: Mapping[str, ir.Node]) -> int:
        """Keep as few nodes as the outputs need, and say how many."""
        assert self.run is not None
        allowed, most = math.pow(10, -self.options.outputs / 10), self.options.runs
        worst = WorstOutput(model, self.run, self.observe, self.progress(), most)
        layers, links = list(nodes), worst.links(nodes)
        if layers and (not links or most < _FEWEST):
            found = sensitive_groups(layers, lambda some: worst.noise(some, links), allowed, most)
            return self._keep_groups(found, nodes, worst)
        if not worst.noise(layers, links) > allowed:
            return 0
        room = allowed * (1 - _OF_LINKS)
        found = sensitive_groups(layers, lambda some: worst.noise(some, ()), room, 2 * most // 3)
        count = self._keep_groups(found, nodes, worst)
        left = [name for name in layers if is_static(nodes[name])]
        return count + self._reach_links(worst, left, allowed)

    def _reach_links(self, worst: WorstOutput, layers: Sequence[str], allowed: float) -> int:
        """The same of what lies between layers, which are good enough by themselves."""
        base = worst.noise(layers, ())
        if not base < allowed:
            return 0  # it could not be measured, or the runs did not suffice

        def more(links: Sequence[str]) -> float:
            return max(worst.noise(layers, links) - base, 0.0)

        links, left = worst.links(layers), self.options.runs - len(worst.heard)
        found = sensitive_groups(links, more, allowed - base, max(left, 1)) if links else []
        nodes = {node.name or "": node for node in worst.model.graph}
        return self._keep_groups(found, nodes, worst, "in integers", base)

    def _keep_groups(
        self,
        groups: Sequence[Group],
        nodes: Mapping[str, ir.Node],
        worst: WorstOutput,
        how: str = "quantized",
        base: float = 0.0,
    ) -> int:
        whole, bound = worst.heard[0], self.options.outputs
        for group in groups:
            others = f" with {len(group.names) - 1} more" if len(group.names) > 1 else ""
            # Nothing was heard of some, but they may be left out with the others in the end.
            noise = group.noise + base
            alone = -10 * math.log10(noise) if noise else math.inf
            for name in group.names:
                _keep(
                    nodes[name],
                    f"{how} alone{others} it leaves the worst output {alone:.1f} dB, and all "
                    f"together {whole:.1f} dB, below {bound:g}",
                )
        return sum(len(group.names) for group in groups)


def _keep(node: ir.Node, why: str) -> None:
    keep_float(node, f"kept float: {why}")
    add_note(node, f"kept float: {why}")  # what is decided later says so too

"""Choose who computes each planned op: our kernel, ORT's own quantized ops, or the op as it was.

    MatMul, Conv with a plan   =>   the same, or without the plan where quantizing gains nothing

1. A MatMul gets what is fastest at its sizes; the one it would get anyway unless another is more
   than 5% faster.
2. Convolutions pass integers to each other, so what counts is a convolution's own time plus the Q
   and DQ at the border of the integer part, to which ops between them may belong
   (`integer_links`).  Those leave it whose leaving makes the whole cheapest
   (`integer_part`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from qcompiler.ir.decisions import decide, drop_plan, leave_to_ort, left_to_ort, plan_of
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import every_node
from qcompiler.ir.region import Region
from qcompiler.ir.sites import Candidate, Choice, Costs, Site
from qcompiler.passes.insert_qdq import is_static, missing_samples
from qcompiler.passes.integer_part import MARGIN, IntegerPart
from qcompiler.passes.join_integers import links_of
from qcompiler.passes.sites_of_nodes import Shape, Shapes, known_shapes, site_of

__all__ = ["ChooseKernels"]

_ANOTHER = "the choices were made for another model or with other options"
_LADDER = (1, 16, 128)
"""Rows of a MatMul of which nothing is known."""


class ChooseKernels(ir.passes.InPlacePass):
    """Drop the plans of ops that gain nothing from being quantized.

    Attributes:
        costs: What each candidate costs at some sites, None where that is not known.
        border: Microseconds of a Q or DQ of so many elements.
        supports: Says why there is no kernel for a region, or None if there is one.
        shapes: Shapes of tensors that the graph itself leaves open.
        forced: Op types that stay float whatever they cost, with the reason.
        made: Choices made before, in the order of their nodes, to be made again.
        observed: Whether there are samples for static ranges.  Asked for before anything is timed,
            which takes longer than a user who forgot them would like to wait.
        unfolded: Products that were convolutions before, by `unfold_convolutions`.
        choices: What was chosen, after the pass ran.
    """

    def __init__(
        self,
        costs: Callable[[Sequence[Site]], Sequence[Costs | None]],
        border: Callable[[int], float],
        supports: Callable[[Region], str | None],
        shapes: Shapes,
        forced: Mapping[str, str] | None = None,
        made: Sequence[Choice] | None = None,
        *,
        observed: bool = True,
    ) -> None:
        super().__init__()
        self.costs, self.border, self.supports, self.shapes = costs, border, supports, shapes
        self.forced, self.made, self.observed = forced or {}, made, observed
        self.unfolded: frozenset[str] = frozenset()
        self.choices: list[Choice] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Choose for every planned node.

        Raises:
            OptionError: Choices made before that are not this model's.
            CalibrationError: Nodes that need static ranges, and no samples.
        """
        nodes = [node for node in every_node(model.graph) if _is_chosen(node)]
        self.choices = self._choose(model, nodes) if self.made is None else self._again(nodes)
        changed = any(choice.candidate == "float" for choice in self.choices)
        for node, choice in zip(nodes, self.choices, strict=True):
            if choice.candidate == "float":
                drop_plan(node)
                decide(node, "float", choice.why)
            elif choice.candidate == "ort" and site_of(node, (), self.supports).kernel:
                changed = changed or left_to_ort(node) is None
                leave_to_ort(node, choice.why)
        return ir.passes.PassResult(model, changed)

    def _again(self, nodes: Sequence[ir.Node]) -> list[Choice]:
        """The choices made before, if they are about these nodes."""
        assert self.made is not None
        # In order: two branches may have nodes of one name.
        for node, choice in itertools.zip_longest(nodes, self.made):
            if node is None:
                raise OptionError(f"{_ANOTHER}: node {choice.node!r} is not to be quantized here")
            site = site_of(node, (), self.supports)
            if choice is None or (choice.node, choice.site) != (node.name, site.name):
                held = "nothing" if choice is None else f"{choice.site} for node {choice.node!r}"
                raise OptionError(
                    f"{_ANOTHER}: for node {node.name!r} ({site.name}) they hold {held}"
                )
        return list(self.made)

    def _choose(self, model: ir.Model, nodes: Sequence[ir.Node]) -> list[Choice]:
        convolves = any(node.op_type == "Conv" for node in nodes)
        links = links_of(model.graph) if convolves else {}
        between = [v for link in links.values() for v in (*link.operands, *link.results)]
        data = [value for node in nodes if (value := node.inputs[0]) is not None]
        shapes = known_shapes(model, [*data, *between], self.shapes)
        sites = {node: site_of(node, _inputs(node, shapes), self.supports) for node in nodes}
        free = [node for node in nodes if node.op_type not in self.forced]
        if not self.observed and any(map(is_static, free)):
            raise missing_samples(free)
        costs = dict(zip(free, self.costs([sites[node] for node in free]), strict=True))
        convs = {n: (sites[n], c) for n, c in costs.items() if n.op_type == "Conv" and c}
        planned = [node for node in nodes if node.op_type == "Conv"]
        elements = {v: math.prod(shapes[v.name]) for v in between if v.name in shapes}
        losing = IntegerPart(convs, planned, self.border, links, elements).losing()
        return [
            Choice(node.name or "", sites[node].name, "float", self.forced[node.op_type])
            if node not in costs
            else _weighed(node, sites[node], costs[node], losing.get(node))
            for node in nodes
        ]


def _is_chosen(node: ir.Node) -> bool:
    """Whether there is a choice: weights below 8 bits are asked for because they are small.

    Nor is there where a recipe names the precision of a node.
    """
    plan = plan_of(node)
    return plan is not None and plan.weight.storage is ir.DataType.INT8 and not plan.requested


def _inputs(node: ir.Node, shapes: Mapping[str, Shape]) -> tuple[Shape, ...]:
    data, weight = node.inputs[:2]
    assert data is not None and weight is not None and weight.const_value is not None
    shape = shapes.get(data.name or "")
    if node.op_type == "MatMul":
        depth = weight.const_value.shape.numpy()[0]
        rows = _LADDER if shape is None else (math.prod(shape[:-1]),)
        return tuple((count, depth) for count in rows if count > 0)
    return () if shape is None or 0 in shape else (shape,)


def _weighed(
    node: ir.Node, site: Site, costs: Costs | None, losing: tuple[float, float] | None
) -> Choice:
    name, usual = node.name or "", site.candidates[0]
    if costs is None:
        return Choice(name, site.name, usual, "its cost is not known here: quantized as planned")
    means = {candidate: costs.mean(candidate) for candidate in site.candidates}
    best: Candidate = min(means, key=means.__getitem__)
    if site.op == "Conv":
        best = usual if losing is None else "float"
        if losing is not None:
            means = {"ort": losing[0], "float": losing[1]}
    elif not costs.wins(best, usual, MARGIN):
        best = usual
    others = ", ".join(f"{_IN_WORDS[c]} {_us(means[c])}" for c in means if c != best)
    return Choice(name, site.name, best, f"{_WINS[best]}: {_us(means[best])} against {others} "
                  f"({_where(costs)})", costs)  # fmt: skip


_IN_WORDS = {"kernel": "our kernel", "ort": "ORT's int8", "float": "float"}
_WINS: Mapping[Candidate, str] = {
    "kernel": "our kernel is kept",
    "ort": "ORT's int8 is kept",
    "float": "float is faster here",
}


def _us(time: float) -> str:
    return f"{time:.1f} us" if time < 10 else f"{time:.0f} us"


def _where(costs: Costs) -> str:
    """On what grounds: "timed at 1x384, 16x384, 128x384"."""
    shapes = dict.fromkeys(shape for _, shape in costs.points)
    sizes = ", ".join("x".join(map(str, shape)) for shape in shapes)
    return f"{'timed' if costs.source == 'timed' else 'estimated'} at {sizes}"

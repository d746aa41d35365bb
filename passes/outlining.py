"""What the passes that outline regions share: the domain, the node, and the functions left over."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence

import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.decisions import inherit, set_region
from qcompiler.ir.graph import every_node
from qcompiler.ir.region import Region
from qcompiler.passes.fix_names import FixNames

__all__ = ["UNBOUND", "JoiningPass", "RegionPass", "drop_unused_functions", "outline"]

UNBOUND = "qcompiler.region"
"""Domain of outlined regions until `bind_kernels` names it after their hash."""


class RegionPass(ir.passes.InPlacePass):
    """A pass that outlines what has a kernel.

    Attributes:
        supports: Says why there is no kernel for a region, or None if there is one.
    """

    def __init__(self, supports: Callable[[Region], str | None]) -> None:
        super().__init__()
        self.supports = functools.lru_cache(4096)(supports)  # equal layers ask the same


class JoiningPass(RegionPass):
    """A pass that makes one region of two."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Join every pair, in branches and loops too."""
        joined = sum(self.join(model, node) for node in list(every_node(model.graph)))
        if joined:
            drop_unused_functions(model)
            FixNames()(model)
        return ir.passes.PassResult(model, joined > 0)

    @abc.abstractmethod
    def join(self, model: ir.Model, node: ir.Node) -> bool:
        """Join an outlined node with what belongs to it; whether it was."""


def outline(
    model: ir.Model, region: Region, inputs: Sequence[ir.Value | None], like: ir.Node | None = None
) -> ir.Node:
    """A node, not yet in a graph, that calls the function of `region`, which the model then has.

    Args:
        model: Gets the function, and the import of its domain.
        region: What the node computes.
        inputs: The anchor's, then one per extra operand.
        like: The node whose name, decision and plan it inherits.
    """
    function = model.functions.get((UNBOUND, region.name, ""))
    if function is None:
        function = dialect.region_function(region, UNBOUND, model.graph.opset_imports[""])
        model.functions[function.identifier()] = function
    model.graph.opset_imports[UNBOUND] = dialect.VERSION
    new = ir.node(
        region.name,
        inputs,
        domain=UNBOUND,
        version=dialect.VERSION,
        num_outputs=len(function.outputs),
    )
    if like is not None:
        inherit(new, like)
    set_region(new, region)
    results = ["y"] * len(region.widths) if region.widths else region.outputs
    for value, name in zip(new.outputs, results or dialect.OPS[region.anchor].outputs, strict=True):
        value.dtype = dialect.result_type(region, name)
    return new


def drop_unused_functions(model: ir.Model) -> None:
    """Remove the functions of regions that a larger region has taken in."""
    used = {node.op_identifier() for node in every_node(model.graph)}
    for identifier in [key for key in model.functions if key[0] == UNBOUND]:
        if identifier not in used:
            del model.functions[identifier]

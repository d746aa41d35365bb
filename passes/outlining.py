"""What the passes that outline regions share: the domain, the node, and the functions left over."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence

import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.analysis import GraphView
from qcompiler.ir.decisions import inherit, set_region
from qcompiler.ir.graph import every_node, label
from qcompiler.ir.region import Region
from qcompiler.passes.fix_names import FixNames

__all__ = ["UNBOUND", "JoiningPass", "RegionPass", "outline"]

Reads = Sequence[ir.Value | None] | None

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
        self._views: dict[ir.Graph | ir.Function, GraphView] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Outline what can be, and remove what regions have taken in."""
        self._views.clear()
        outlined = self.outline_all(model)
        self._views.clear()  # they hold the model
        if outlined:
            _drop_unused_functions(model)
            FixNames()(model)
        return ir.passes.PassResult(model, outlined)

    @abc.abstractmethod
    def outline_all(self, model: ir.Model) -> bool:
        """Outline every region; whether there was any."""

    def view_of(self, node: ir.Node) -> GraphView:
        """How the graph of `node` hangs together, with the regions that were put there so far."""
        assert node.graph is not None
        if node.graph not in self._views:
            self._views[node.graph] = GraphView(node.graph)
        return self._views[node.graph]

    def refusal(self, region: Region, nodes: Sequence[ir.Node], reads: Reads = None) -> str | None:
        """Why these nodes of one graph cannot become that region, or None if they can.

        It has no kernel, or it would read what is made of its own result: that is a cycle.

        Args:
            region: What they would be.
            nodes: What it would stand for.
            reads: What it would read, if not all that they do.
        """
        if (missing := self.supports(region)) is not None:
            return missing
        between = self.view_of(nodes[0]).way_back(nodes, reads)
        return None if between is None else f"a way leads out of it and back, by {label(between)}"

    def put(
        self,
        new: ir.Node,
        nodes: Sequence[ir.Node],
        results: Sequence[ir.Value],
        reads: Reads = None,
    ) -> None:
        """Let a node stand for nodes that `refusal` has nothing against.

        Args:
            new: Not yet in a graph.
            nodes: What it stands for; they are removed.
            results: Those that are read elsewhere, in the order of the outputs of `new`.
            reads: As in `refusal`.
        """
        graph, view = nodes[0].graph, self.view_of(nodes[0])
        assert graph is not None
        place = view.place_of(nodes, reads)
        ir.convenience.replace_nodes_and_values(
            graph, place or nodes[-1], nodes, [new], results, list(new.outputs)
        )
        if place is not None:
            view.replaced(place, new)
        else:
            graph.sort()
            del self._views[graph]


class JoiningPass(RegionPass):
    """A pass that makes one region of two."""

    def outline_all(self, model: ir.Model) -> bool:
        """Join every pair, in branches and loops too."""
        return sum(self.join(model, node) for node in list(every_node(model.graph))) > 0

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


def _drop_unused_functions(model: ir.Model) -> None:
    """Remove the functions of regions that a larger region has taken in."""
    used = {node.op_identifier() for node in every_node(model.graph)}
    for identifier in [key for key in model.functions if key[0] == UNBOUND]:
        if identifier not in used:
            del model.functions[identifier]

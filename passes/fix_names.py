"""Give every value a name that no other value of the model has, and every node one in its graph.

    If (c) <a () => (y) { y = Neg (x) }, b () => (y) { y = Abs (x) }>
        =>   If (c) <a () => (y) { y = Neg (x) }, b () => (y_1) { y_1 = Abs (x) }>

Inputs and outputs of the model keep their names.  It takes one walk over all graphs: onnx_ir's
NameFixPass copies every name so far for each body of an If.
"""

from __future__ import annotations

import collections
from collections.abc import Container, Iterator, Sequence

import onnx_ir as ir

from qcompiler.ir.graph import every_graph

__all__ = ["FixNames"]


class FixNames(ir.passes.InPlacePass):
    """Rename what has the name of another, and name what has none."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename in place; functions are left alone."""
        graphs = list(every_graph(model.graph))
        taken: dict[str, ir.Value] = {}
        counts: collections.Counter[str] = collections.Counter()
        changed = False
        for value in _values(graphs):
            if value.name is None or taken.setdefault(value.name, value) is not value:
                value.name = _free(value.name or "value", taken, counts)
                taken[value.name] = value
                changed = True
        for graph in graphs:
            names: set[str] = set()
            for node in graph:
                if not node.name or node.name in names:
                    node.name = _free(node.name or node.op_type, names, counts)
                    changed = True
                names.add(node.name)
        return ir.passes.PassResult(model, changed)


def _values(graphs: Sequence[ir.Graph]) -> Iterator[ir.Value]:
    """Every value that has a name or should; the empty name is an output that is left out."""
    for graph in graphs:
        yield from graph.inputs
        yield from graph.outputs
        yield from list(graph.initializers.values())
    for graph in graphs:
        for node in graph:
            yield from (value for value in node.outputs if value.name != "")


def _free(name: str, taken: Container[str], counts: collections.Counter[str]) -> str:
    """`name`, or `name_1`, ... whichever is not taken."""
    stem = name
    while name in taken:
        counts[stem] += 1
        name = f"{stem}_{counts[stem]}"
    return name

"""One node for equal Q, DQ and DynamicQuantizeLinear of one value, read by all who want it.

Part of `lift_qoperators` and `normalize_qdq`.  Only these are merged: of ops in foreign domains
nobody knows whether they give the same result twice.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with

__all__ = ["share_pairs"]

_PAIRS = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})


def share_pairs(model: ir.Model) -> int:
    """Merge equal pairs within each graph; how many nodes went."""
    return sum(_share(graph) for graph in model.graphs())


def _share(graph: ir.Graph) -> int:
    known: dict[object, ir.Node] = {}
    count = 0
    for node in list(graph):
        if node.domain != "" or node.op_type not in _PAIRS:
            continue
        attributes = tuple(sorted((k, str(a.value)) for k, a in node.attributes.items()))
        first = known.setdefault((node.op_type, tuple(node.inputs), attributes), node)
        if first is node or any(value.is_graph_output() for value in node.outputs):
            continue
        for old, new in zip(node.outputs, first.outputs, strict=True):
            replace_all_uses_with(old, new)
        graph.remove(node, safe=True)
        count += 1
    return count

"""Look up an embedding before dequantizing it, not after.

    Gather(DQ(table, s, z), i)   =>   DQ(Gather(table, i), s, z)          one scale
                                      DQ(Gather(table, i), s', z')        one per row, or per group
                                                                          of it: s' = Gather(s, i)

Exact: the same elements meet the same scales.  ORT would dequantize the whole table at every run.
Part of `fold_qdq`.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.decisions import decide, inherit
from qcompiler.ir.graph import constant, dequantize_of, new_initializer, replace_nodes
from qcompiler.ir.params import quant_params
from qcompiler.ir.types import PerAxis, PerGroup

__all__ = ["try_fold_gather"]


def try_fold_gather(graph: ir.Graph, gather: ir.Node) -> str | None:
    """Fold one Gather of rows; the reason, and nothing changed, if it cannot be."""
    dequantize = dequantize_of(gather.inputs[0])
    params = quant_params(dequantize)
    if dequantize is None or params is None:
        return "its table is not quantized"
    table = dequantize.inputs[0]
    if table is None or table.const_value is None or params.scales is None or params.zeros is None:
        return "its table is computed"
    rank = len(table.const_value.shape)
    if rank != 2 or gather.attributes.get_int("axis", 0) % rank != 0:
        return "it does not look up rows of a matrix"
    scales = [value for value in (params.scale, params.zero_point) if value is not None]
    new, attributes = [_rows(gather, table)], {}
    match params.type.granularity:
        case PerAxis(axis) if axis % rank == 1:
            attributes = {"axis": -1}
        case PerAxis():
            attributes = {"axis": -1, "block_size": int(table.const_value.shape.numpy()[1])}
            new += [_rows(gather, _as_column(graph, value)) for value in scales]
        case PerGroup(axis, size) if axis % rank == 1:
            attributes = {"axis": -1, "block_size": size}
            new += [_rows(gather, value) for value in scales]
        case PerGroup():
            return "its table has scales per group of rows"
    operands = [new[0].outputs[0], *scales]
    if len(new) > 1:
        operands = [node.outputs[0] for node in new]
    widen = ir.node("DequantizeLinear", operands, attributes)
    inherit(widen, gather)
    replace_nodes([gather], [*new, widen])
    for node in (*new, widen):
        decide(node, "qdq", "rows are looked up as they are stored, then dequantized")
    return None


def _rows(gather: ir.Node, table: ir.Value) -> ir.Node:
    node = ir.node("Gather", [table, gather.inputs[1]], {"axis": 0}, name=f"{table.name}_rows")
    node.outputs[0].name, node.outputs[0].type = f"{gather.name}_{table.name}", table.type
    return node


def _as_column(graph: ir.Graph, value: ir.Value) -> ir.Value:
    array = constant(value)
    assert array is not None
    return new_initializer(graph, f"{value.name}_column", array.reshape(-1, 1))

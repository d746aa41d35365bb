"""Look up an embedding before dequantizing it, not after.

    Gather(DQ(table, s, z), i)   =>   DQ(Gather(table, i), s, z)          one scale
                                      DQ(Gather(table, i), s', z')        one per row, or per group
                                                                          of it: s' = Gather(s, i)

Exact: the same elements meet the same scales.  ORT would dequantize the whole table at every run.
A table of 4 bits becomes ORT's GatherBlockQuantized, because ONNX has no Gather of int4.
Part of `fold_qdq`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.decisions import decide, inherit
from qcompiler.ir.graph import (
    constant,
    dequantize_of,
    new_initializer,
    replace_nodes,
)
from qcompiler.ir.params import QuantParams, quant_params
from qcompiler.ir.types import PerAxis, PerGroup

__all__ = ["try_fold_gather"]

_MICROSOFT = "com.microsoft"


def try_fold_gather(graph: ir.Graph, gather: ir.Node) -> str | None:
    """Fold one Gather of rows; the reason, and nothing changed, if it cannot be."""
    dequantize = dequantize_of(gather.inputs[0])
    params = quant_params(dequantize)
    if dequantize is None or params is None:
        return "its table is not quantized"
    table = dequantize.inputs[0]
    if table is None or table.const_value is None or params.scales is None or params.zeros is None:
        return "its table is computed"
    if params.type.is_float:
        return "ONNX has no Gather of floats of 8 bits"
    shape = table.const_value.shape.numpy()
    rank = len(shape)
    if rank != 2 or gather.attributes.get_int("axis", 0) % rank != 0:
        return "it does not look up rows of a matrix"
    if isinstance(params.type.granularity, PerGroup) and params.type.granularity.axis % rank != 1:
        return "its table has scales per group of rows"
    if params.type.storage.bitwidth < 8:
        return _try_few_bits(graph, gather, table, params)
    scales = [value for value in (params.scale, params.zero_point) if value is not None]
    new, attributes = [_rows(gather, table)], {}
    match params.type.granularity:
        case PerAxis(axis) if axis % rank == 1:
            attributes = {"axis": -1}
        case PerAxis():
            attributes = {"axis": -1, "block_size": shape[1]}
            new += [_rows(gather, _as_column(graph, value, shape[0])) for value in scales]
        case PerGroup(_, size):
            attributes = {"axis": -1, "block_size": size}
            new += [_rows(gather, value) for value in scales]
    operands = [new[0].outputs[0], *scales]
    if len(new) > 1:
        operands = [node.outputs[0] for node in new]
    widen = ir.node("DequantizeLinear", operands, attributes)
    inherit(widen, gather)
    replace_nodes([gather], [*new, widen])
    for node in (*new, widen):
        decide(node, "qdq", "rows are looked up as they are stored, then dequantized")
    return None


def _try_few_bits(
    graph: ir.Graph, gather: ir.Node, table: ir.Value, params: QuantParams
) -> str | None:
    """Let ORT look up a table of 4 bits; the reason, and nothing changed, if it cannot."""
    assert table.const_value is not None and gather.inputs[1] is not None
    rows, columns = table.const_value.shape.numpy()
    granularity = params.type.granularity
    if params.type.storage.bitwidth != 4:
        return "neither ONNX nor ORT has a Gather of its few bits"
    if isinstance(granularity, PerAxis) and granularity.axis % 2 == 1:
        return "ORT looks up 4 bits with scales per row or group, not per column"
    block = max(16, 1 << (columns - 1).bit_length())  # one block for all of a row
    if isinstance(granularity, PerGroup):
        block = granularity.group_size
        if block < 16 or block & (block - 1):
            return f"ORT looks up 4 bits in groups of a power of two from 16, not of {block}"
    scales = [value for value in (params.scale, params.zero_point) if value is not None]
    if not isinstance(granularity, PerGroup):
        scales = [_as_column(graph, value, rows) for value in scales]
    attributes = {"block_size": block, "gather_axis": 0, "quantize_axis": 1}
    operands = [table, gather.inputs[1], *scales]
    new = ir.node("GatherBlockQuantized", operands, attributes, domain=_MICROSOFT, version=1)
    graph.opset_imports.setdefault(_MICROSOFT, 1)
    inherit(new, gather)
    replace_nodes([gather], [new])
    decide(new, "qdq", "ORT's own GatherBlockQuantized: rows are looked up as they are stored")
    return None


def _rows(gather: ir.Node, table: ir.Value) -> ir.Node:
    node = ir.node("Gather", [table, gather.inputs[1]], {"axis": 0}, name=f"{table.name}_rows")
    node.outputs[0].name, node.outputs[0].type = f"{gather.name}_{table.name}", table.type
    return node


def _as_column(graph: ir.Graph, value: ir.Value, rows: int) -> ir.Value:
    array = constant(value)
    assert array is not None
    column = np.ascontiguousarray(np.broadcast_to(array.reshape(-1, 1), (rows, 1)))
    return new_initializer(graph, f"{value.name}_column", column, value.dtype)

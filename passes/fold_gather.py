"""Look up an embedding before dequantizing it, not after.

    Gather(DQ(table, s, z), i)   =>   DQ(Gather(table, i), s, z)          one scale
                                      DQ(Gather(table, i), s', z')        one per row, or per group
                                                                          of it: s' = Gather(s, i)

Exact: the same elements meet the same scales.  ORT would dequantize the whole table at every run.
A table of fewer bits is stored in bytes first, because ONNX has no Gather of int4: twice the file,
an eighth of the floats that every run would make of it.
Part of `fold_qdq`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.decisions import decide, inherit
from qcompiler.ir.graph import (
    constant,
    dequantize_of,
    drop_if_unread,
    new_initializer,
    replace_nodes,
)
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
    if params.type.is_float:
        return "ONNX has no Gather of floats of 8 bits"
    shape = table.const_value.shape.numpy()
    rank = len(shape)
    if rank != 2 or gather.attributes.get_int("axis", 0) % rank != 0:
        return "it does not look up rows of a matrix"
    if isinstance(params.type.granularity, PerGroup) and params.type.granularity.axis % rank != 1:
        return "its table has scales per group of rows"
    if params.type.storage.bitwidth < 8 and not _store_in_bytes(graph, dequantize):
        return "ONNX has no Gather of its few bits, and others than Gathers read its table"
    table, *scales = [value for value in dequantize.inputs if value is not None]
    new, attributes = [_rows(gather, table)], {}
    match params.type.granularity:
        case PerAxis(axis) if axis % rank == 1:
            attributes = {"axis": -1}
        case PerAxis():
            attributes = {"axis": -1, "block_size": shape[1]}
            new += [_rows(gather, _as_column(graph, value)) for value in scales]
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


def _store_in_bytes(graph: ir.Graph, dequantize: ir.Node) -> bool:
    """Store the constants of a DQ as int8 or uint8; False if a MatMul may want their few bits."""
    readers = {use.node.op_type for use in dequantize.outputs[0].uses()}
    if readers != {"Gather"}:
        return False
    for index, value in enumerate(dequantize.inputs):
        array = constant(value)
        if index == 1 or value is None or array is None or value.dtype is None:
            continue
        wide = np.int8 if value.dtype.is_signed() else np.uint8
        stored = new_initializer(graph, f"{value.name}_{wide.__name__}", array.astype(wide))
        dequantize.replace_input_with(index, stored)
        drop_if_unread(value)
    return True


def _rows(gather: ir.Node, table: ir.Value) -> ir.Node:
    node = ir.node("Gather", [table, gather.inputs[1]], {"axis": 0}, name=f"{table.name}_rows")
    node.outputs[0].name, node.outputs[0].type = f"{gather.name}_{table.name}", table.type
    return node


def _as_column(graph: ir.Graph, value: ir.Value) -> ir.Value:
    array = constant(value)
    assert array is not None
    return new_initializer(graph, f"{value.name}_column", array.reshape(-1, 1))

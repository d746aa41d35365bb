"""Store planned tables as integers, each row or group of it rounded to the nearest step.

    Gather(table, i)   =>   Gather(DQ(table_q, s), i)          table_q = round(table / s)

Of int8 a scale per row, of int4 one per group of a row: what `fold_gather` can look up before it is
dequantized.  A table that others read too, as a last layer that is tied to it, keeps its float form
for them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.arithmetic import quantize, weight_scale
from qcompiler.ir.decisions import decide, drop_plan, plan_of
from qcompiler.ir.errors import ModelError
from qcompiler.ir.graph import constant, drop_if_unread, label, new_initializer
from qcompiler.ir.types import PerGroup, QuantType
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.rounded_weight import note_small_weights

__all__ = ["RoundTables"]


class RoundTables(ir.passes.InPlacePass):
    """Replace each planned table by its rounded form and a DequantizeLinear."""

    rounds = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Round every planned table.

        Raises:
            ModelError: A table holds NaN or Inf.
        """
        rounded: dict[tuple[ir.Value, QuantType], ir.Value] = {}
        planned = [
            (node, plan)
            for node in model.graph
            if node.op_type == "Gather" and (plan := plan_of(node)) is not None
        ]
        for node, plan in planned:
            table = node.inputs[0]
            assert table is not None
            key = (table, plan.weight)
            if key not in rounded:
                rounded[key] = _round(model.graph, node, *key)
            node.replace_input_with(0, rounded[key])
            # Later passes take a plan for one about the second input.
            drop_plan(node)
            decide(node, "qdq", f"table {plan.weight}")
            drop_if_unread(table)
        if planned:
            FixNames()(model)
        return ir.passes.PassResult(model, bool(planned))


def _round(graph: ir.Graph, node: ir.Node, table: ir.Value, type: QuantType) -> ir.Value:
    """The dequantized table, computed at the front of the graph."""
    array = np.asarray(constant(table), np.float32)
    if not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise ModelError(
            f"the table {table.name!r} of {label(node)!r} holds {count} NaN or Inf; repair the "
            "model, or keep the node float"
        )
    scale = weight_scale(array, type)
    note_small_weights([node], array, scale, type)
    stored = np.ascontiguousarray(quantize(array, scale, type))
    name = table.name or "table"
    operands = [
        new_initializer(graph, f"{name}_{type.storage.name.lower()}", stored, type.storage),
        new_initializer(graph, f"{name}_rows_scale", scale),
    ]
    attributes = {"axis": 0}
    if isinstance(type.granularity, PerGroup):
        attributes = {"axis": 1, "block_size": type.granularity.group_size}
    widened = ir.node("DequantizeLinear", operands, attributes, name=f"{name}_rows_dequantize")
    value = widened.outputs[0]
    value.name, value.dtype, value.shape = f"{name}_rows", ir.DataType.FLOAT, table.shape
    graph.insert_before(graph[0], widened)
    return value

"""Drop a guard against NaN around what was dequantized, of which none is NaN.

    Where(IsNaN(DQ(q, s)), c, DQ(q, s))   =>   DQ(q, s)      c one number

torch writes such a guard behind a Softmax, and a quantizer puts a pair between the two: a NaN has
become some integer there.  As QLinearWhere it takes ONNX Runtime longer than both products of an
attention.  Part of `normalize_qdq`; exact.  Float8 stores NaN, and keeps its guard.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with

from qcompiler.ir.graph import constant, dequantize_of
from qcompiler.passes.widen_constants import dequantized_constant

__all__ = ["try_drop_guard"]


def try_drop_guard(node: ir.Node) -> bool:
    """Drop one Where; False if it guards something else, or its result leaves the graph."""
    if node.domain != "" or node.op_type != "Where" or node.graph is None:
        return False
    condition, instead, value = node.inputs
    check = condition.producer() if condition is not None else None
    if value is None or check is None or (check.domain, check.op_type) != ("", "IsNaN"):
        return False
    number = dequantized_constant(instead)
    is_guard = check.inputs[0] is value and number is not None and number.ndim == 0
    if not is_guard or node.outputs[0].is_graph_output() or _may_be_nan(value):
        return False
    replace_all_uses_with(node.outputs[0], value)
    node.graph.remove(node, safe=True)
    return True


def _may_be_nan(value: ir.Value) -> bool:
    widened = dequantize_of(value)
    if widened is None:
        return True
    stored, scale = widened.inputs[0], constant(widened.inputs[1])
    is_integer = stored is not None and stored.dtype is not None and stored.dtype.is_integer()
    return not is_integer or scale is None or not bool(np.isfinite(scale).all())

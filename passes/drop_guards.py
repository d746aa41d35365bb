"""Drop a guard against NaN around what was dequantized, of which none is NaN.

    Where(IsNaN(DQ(q, s)), c, DQ(q, s))   =>   DQ(q, s)      c one number

torch writes such a guard behind a Softmax, and a quantizer puts a pair between the two: a NaN has
become some integer there.  As QLinearWhere it takes ONNX Runtime longer than both products of an
attention.  Part of `normalize_qdq`; exact.
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
    if check is None or check.op_type != "IsNaN" or check.inputs[0] is not value or value is None:
        return False
    widened, number = dequantize_of(value), dequantized_constant(instead)
    scale = constant(widened.inputs[1]) if widened is not None else None
    finite = scale is not None and bool(np.isfinite(scale).all())
    if not finite or number is None or number.ndim or node.outputs[0].is_graph_output():
        return False
    replace_all_uses_with(node.outputs[0], value)
    node.graph.remove(node, safe=True)
    return True

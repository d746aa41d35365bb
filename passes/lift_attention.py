"""Lift ORT's quantized attention into the ops it is made of.

    QAttention(x, w, b, xs, ws, mask, xz, wz)
        =>   q, k, v = Split(MatMul(DQ(x), DQ(w)) + b), heads apart
             y = Softmax(q k' * scale + mask) v, heads together

Part of `lift_qoperators`.  The mask of such a node is 1 for each key that counts, or left out; the
others (lengths, one mask per query, causal) and a cache are not lifted.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.passes.lifting import Form, NotLiftedError

__all__ = ["ATTENTION", "heads_apart"]

_CACHE = "it keeps a cache of keys and values"


def _attention(form: Form) -> ir.Value:
    x, w, bias, x_scale, w_scale, mask, x_zero, w_zero, past = form.inputs(9)
    if past is not None:
        raise NotLiftedError(_CACHE)
    widened = form.dequantize(w, w_scale, w_zero, axis=1)
    product = form.op("MatMul", [form.dequantize(x, x_scale, x_zero), widened])
    return heads_apart(form, form.op("Add", [product, bias]), w, mask)


def heads_apart(
    form: Form, together: ir.Value, w: ir.Value | None, mask: ir.Value | None
) -> ir.Value:
    """Attention over queries, keys and values that lie side by side, by the node's attributes.

    Args:
        form: Of an Attention or QAttention.
        together: The product of its input by its weights, and its bias.
        w: Its weights, [K, 3 * N].
        mask: 1 for each key that counts, [batch, keys]; or none.

    Raises:
        NotLiftedError: It does more than that.
    """
    attributes = form.node.attributes
    if any(value.uses() or value.is_graph_output() for value in form.node.outputs[1:]):
        raise NotLiftedError(_CACHE)
    if attributes.get_int("unidirectional", 0) or attributes.get_int("do_rotary", 0):
        raise NotLiftedError("it is causal, or rotates its positions")
    if w is None or w.shape is None or not isinstance(w.shape[-1], int):
        raise NotLiftedError("the shape of its weights is unknown")
    form.needs_opset(18, "a Split into equal parts")
    heads = attributes.get_int("num_heads")
    width = w.shape[-1] // 3
    default = 1 / math.sqrt(width // heads)
    scale = attributes.get_float("scale", 0.0) or default
    apart = form.constant("heads", np.asarray([0, 0, heads, width // heads], np.int64))
    form.op("Split", [together], {"axis": -1, "num_outputs": 3}, outputs=3)
    q, k, v = (
        form.op("Transpose", [form.op("Reshape", [part, apart])], {"perm": order})
        for part, order in zip(form.nodes[-1].outputs, _ORDERS, strict=True)
    )
    floats: np.dtype[Any] = np.dtype(np.float16 if w.dtype is ir.DataType.FLOAT16 else np.float32)
    factor = form.constant("factor", np.asarray(scale, floats))
    scores = form.op("Mul", [form.op("MatMul", [q, k]), factor])
    if mask is not None:
        scores = form.op("Add", [scores, _additive(form, mask, floats)])
    mixed = form.op("MatMul", [form.op("Softmax", [scores], {"axis": -1}), v])
    side_by_side = form.constant("together", np.asarray([0, 0, width], np.int64))
    form.node.resize_outputs(1)
    return form.op("Reshape", [form.op("Transpose", [mixed], {"perm": [0, 2, 1, 3]}), side_by_side])


_ORDERS = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
"""Heads before tokens; the keys transposed."""


def _additive(form: Form, mask: ir.Value, floats: np.dtype[Any]) -> ir.Value:
    """0 for a key that counts, a large negative number for the others: [batch, 1, 1, keys]."""
    if mask.shape is None or len(mask.shape) != 2:
        raise NotLiftedError("its mask is not one number per key")
    filtered = form.node.attributes.get_float("mask_filter_value", -10000.0)
    counts = form.op("Cast", [mask], {"to": int(ir.DataType.BOOL)})
    zero = form.constant("unmasked", np.zeros((), floats))
    below = form.constant("masked", np.asarray(filtered, floats))
    axes = form.constant("axes", np.asarray([1, 2], np.int64))
    return form.op("Unsqueeze", [form.op("Where", [counts, zero, below]), axes])


ATTENTION = {("com.microsoft", "QAttention"): _attention}

"""The int8 product that torchao writes out, back as the DequantizeLinear it stands for.

1. Mul(Mul(Cast(MatMulInteger(uint8(q + 128), w) - 128 sum(w)), s), t)
       =>  MatMul(DequantizeLinear(q, s), DequantizeLinear(w, t))
2. Mul(Mul(Cast(MatMulInteger(Reshape(q, [-1, K]), w)), Reshape(s, [-1, 1])), t)
       =>  Reshape(MatMul(DequantizeLinear(q, s), DequantizeLinear(w, t)), [-1, N])

In 1 torchao adds 128 for the u8 x s8 instructions of x86 and takes it back with the sums of the
columns; in 2 (Int8DynamicActivationInt8WeightConfig) tokens of all batches are made one matrix.
`q` holds int8 tokens with scales `s` [..., 1]; `w` is an int8 constant [K, N] with scales `t` [N].
torchao's int8 weight beside float activations, Mul(MatMul(x, Cast(w)), t), stays as it is: ORT 1.31
would quantize the activations of MatMul(x, DequantizeLinear(w, t)) as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import rewriter
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase

from qcompiler.ir.graph import constant

__all__ = ["integer_products"]


class _Product(RewriteRuleClassBase):  # type: ignore[misc]
    def pattern(self, op: Any, q: Any, w: Any, s: Any, t: Any, middle: Any, sums: Any) -> Any:
        shifted = op.Cast(op.Add(op.Cast(q, to=ir.DataType.INT32), middle), to=ir.DataType.UINT8)
        exact = op.Sub(op.MatMulInteger(shifted, w), sums)
        return op.Mul(op.Mul(op.Cast(exact, to=ir.DataType.FLOAT), s), t)

    def check(self, context: Any, q: Any, w: Any, s: Any, t: Any, middle: Any, sums: Any) -> Any:
        if q.dtype is not ir.DataType.INT8 or not _holds(middle, 128):
            return MatchResult().fail("not int8 shifted by 128")
        if not _is_matrix(w) or not _is_shift(sums, w):
            return MatchResult().fail("what is taken off is not what the shift added")
        if q.shape is None or not isinstance(q.shape[-1], int):
            return MatchResult().fail("the size of a token is not known")
        if s.shape is None or s.shape[-1] != 1 or not _is_vector(t):
            return MatchResult().fail("the scales are not per token and per column")
        return MatchResult()

    def rewrite(self, op: Any, q: Any, w: Any, s: Any, t: Any, **_: Any) -> Any:
        tokens = op.DequantizeLinear(q, s, axis=-1, block_size=q.shape[-1])
        return op.MatMul(tokens, op.DequantizeLinear(w, t, axis=1))


class _PlainProduct(RewriteRuleClassBase):  # type: ignore[misc]
    def pattern(self, op: Any, tokens: Any, w: Any, scales: Any, t: Any) -> Any:
        sums = op.MatMulInteger(tokens, w)
        return op.Mul(op.Mul(op.Cast(sums, to=ir.DataType.FLOAT), scales), t)

    def check(self, context: Any, tokens: Any, w: Any, scales: Any, t: Any) -> Any:
        q, s = _before_reshape(tokens), _before_reshape(scales)
        if not _is_matrix(w) or not _is_vector(t):
            return MatchResult().fail("no int8 matrix with a scale per column")
        if q.dtype is not ir.DataType.INT8 or s.dtype is not ir.DataType.FLOAT:
            return MatchResult().fail("not int8 tokens with scales of float32")
        if q.shape is None or s.shape is None or len(q.shape) != len(s.shape):
            return MatchResult().fail("the shape of tokens or scales is not known")
        if q is tokens and len(q.shape) != 2:
            return MatchResult().fail("the result is no matrix")
        if q.shape[-1] != w.shape[0] or s.shape[-1] != 1:
            return MatchResult().fail("the scales are not per token")
        if any(a != b for a, b in zip(q.shape[:-1], s.shape[:-1], strict=True)):
            return MatchResult().fail("tokens do not have a scale each")
        return MatchResult()

    def rewrite(self, op: Any, tokens: Any, w: Any, scales: Any, t: Any) -> Any:
        q, s = _before_reshape(tokens), _before_reshape(scales)
        depth, width = w.shape
        wide = op.DequantizeLinear(q, s, axis=-1, block_size=depth)
        product = op.MatMul(wide, op.DequantizeLinear(w, t, axis=1))
        return op.Reshape(product, op.Constant(value_ints=[-1, width]))


def integer_products(model: ir.Model) -> None:
    """Rewrite every product of those forms, in place."""
    rewriter.rewrite(model, [_Product.rule(), _PlainProduct.rule()])


def _before_reshape(value: ir.Value) -> ir.Value:
    """What was made a matrix of the same rows."""
    reshape = _made_by("Reshape", value)
    source = reshape.inputs[0] if reshape is not None else None
    return value if source is None else source


def _holds(value: ir.Value | None, number: int) -> bool:
    array = constant(value)
    return array is not None and array.size == 1 and array.item() == number


def _is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype is ir.DataType.INT8 and len(tensor.shape) == 2


def _is_vector(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 1


def _is_shift(sums: ir.Value, w: ir.Value) -> bool:
    """Whether `sums` is 128 times the sums of the columns of `w`: folded, or as it was written."""
    taken = constant(sums)
    if taken is not None:
        weight = constant(w)
        assert weight is not None
        return np.array_equal(taken.reshape(-1), 128 * weight.sum(0, dtype=np.int64))
    total = _made_by("Mul", sums)
    summed = _made_by("ReduceSum", total.inputs[0]) if total is not None else None
    widened = _made_by("Cast", summed.inputs[0]) if summed is not None else None
    return (
        total is not None
        and summed is not None
        and widened is not None
        and _holds(total.inputs[1], 128)
        and _holds(summed.inputs[1], 0)
        and widened.inputs[0] is w
    )


def _made_by(op_type: str, value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None

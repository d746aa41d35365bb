"""Lift the quantized products: convolutions and matrix products with their scales beside them.

    QLinearConv(x, xs, xz, w, ws, wz, ys, yz, b)      =>  Q(Conv(DQ(x), DQ(w), DQ(b)), ys, yz)
    QLinearMatMul(a, as, az, b, bs, bz, ys, yz)       =>  Q(MatMul(DQ(a), DQ(b)), ys, yz)
    QGemm(a, as, az, b, bs, bz, c, ys, yz)            =>  Q(MatMul(DQ(a), DQ(b)) + DQ(c), ys, yz)
    MatMulIntegerToFloat(a, b, as, bs, az, bz, bias)  =>  MatMul(DQ(a), DQ(b)) + bias
    DynamicQuantizeMatMul(x, b, bs, bz, bias)         =>  the same over q, s, z of
                                                          DynamicQuantizeLinear(x)

Part of `lift_qoperators`.  A bias is an int32 at the product of its operands' scales.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import constant
from qcompiler.passes.lifting import Form, NotLiftedError

__all__ = ["PRODUCTS"]


def _conv(form: Form) -> ir.Value:
    x, xs, xz, w, ws, wz, ys, yz, bias = form.inputs(9)
    if form.node.attributes.get_int("channels_last", 0):
        raise NotLiftedError("its layout is NHWC, Conv has none")
    operands = [form.dequantize(x, xs, xz), form.dequantize(w, ws, wz, axis=0)]
    if bias is not None:
        operands.append(form.accumulator(bias, [xs, ws], axis=0))
    result = form.op("Conv", operands, form.attributes("channels_last"))
    assert x is not None
    return form.quantize(result, ys, yz, x)


def _matmul(form: Form) -> ir.Value:
    a, a_scale, a_zero, b, b_scale, b_zero, ys, yz = form.inputs(8)
    left = form.dequantize(a, a_scale, a_zero, axis=-2)
    right = form.dequantize(b, b_scale, b_zero, axis=-1)
    assert a is not None
    return form.quantize(form.op("MatMul", [left, right]), ys, yz, a)


def _matmul_to_float(form: Form) -> ir.Value:
    a, b, a_scale, b_scale, a_zero, b_zero, bias = form.inputs(7)
    left = form.dequantize(a, a_scale, a_zero)
    right = form.dequantize(b, b_scale, b_zero, axis=-1)
    return _biased(form, form.op("MatMul", [left, right]), bias)


def _dynamic_matmul(form: Form) -> ir.Value:
    x, b, b_scale, b_zero, bias = form.inputs(5)
    form.op("DynamicQuantizeLinear", [x], outputs=3)
    left = form.op("DequantizeLinear", form.nodes[-1].outputs)
    right = form.dequantize(b, b_scale, b_zero, axis=-1)
    return _biased(form, form.op("MatMul", [left, right]), bias)


def _gemm(form: Form) -> ir.Value:
    a, a_scale, a_zero, b, b_scale, b_zero, bias, ys, yz = form.inputs(9)
    alpha = form.node.attributes.get_float("alpha", 1.0)
    scale = constant(b_scale)
    if scale is None:
        raise NotLiftedError("the scale of its weights is computed")
    if alpha != 1.0:
        b_scale = form.constant("scale", np.asarray(scale * np.float32(alpha), np.float32))
    if form.node.attributes.get_int("transA", 0):
        a = form.op("Transpose", [a], {"perm": [1, 0]})
    if form.node.attributes.get_int("transB", 0):
        weight = constant(b)
        b = (
            form.op("Transpose", [b], {"perm": [1, 0]})
            if weight is None
            else form.constant("weight", np.ascontiguousarray(weight.T))
        )
    left = form.dequantize(a, a_scale, a_zero)
    result = form.op("MatMul", [left, form.dequantize(b, b_scale, b_zero, axis=1)])
    if bias is not None:
        rank = 1 if bias.shape is None else len(bias.shape)
        steps = form.accumulator(bias, [a_scale, b_scale], axis=max(rank - 1, 0))
        result = form.op("Add", [result, steps])
    like = form.node.inputs[0]
    assert like is not None
    return result if ys is None else form.quantize(result, ys, yz, like)


def _biased(form: Form, product: ir.Value, bias: ir.Value | None) -> ir.Value:
    return product if bias is None else form.op("Add", [product, bias])


_MICROSOFT = "com.microsoft"

PRODUCTS = {
    ("", "QLinearConv"): _conv,
    (_MICROSOFT, "QLinearConv"): _conv,
    ("", "QLinearMatMul"): _matmul,
    (_MICROSOFT, "QGemm"): _gemm,
    (_MICROSOFT, "MatMulIntegerToFloat"): _matmul_to_float,
    (_MICROSOFT, "DynamicQuantizeMatMul"): _dynamic_matmul,
}

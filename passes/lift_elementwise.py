"""Lift the quantized ops without weights: each is a float op between its scales.

    QLinearAdd(a, as, az, b, bs, bz, ys, yz)   =>   Q(Add(DQ(a), DQ(b)), ys, yz)
    QLinearSigmoid(x, xs, xz, ys, yz)          =>   Q(Sigmoid(DQ(x)), ys, yz)
    QuantizeLinear of com.microsoft            =>   QuantizeLinear of ai.onnx

and so on.  Part of `lift_qoperators`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.passes.lifting import Form, NotLiftedError

__all__ = ["ELEMENTWISE"]


def _plain(form: Form) -> ir.Value:
    """Triples of operand, scale and zero point, then the scale and zero point of the result."""
    op_type, count = _PLAIN[form.node.op_type]
    _refuse_channels_last(form)
    flags = [form.node.attributes.get_int(name, 0) for name in ("ceil_mode", "count_include_pad")]
    if all(flags):
        # As ONNX had it before AveragePool-19.
        raise NotLiftedError("it counts what its last windows cover behind the padding")
    *operands, scale, zero = form.inputs(3 * count + 2)
    values = _dequantized(form, operands)
    return _result(form, form.op(op_type, values, form.attributes("channels_last")), scale, zero)


def _softmax(form: Form) -> ir.Value:
    x, xs, xz, ys, yz = form.inputs(5)
    rank = None if x is None or x.shape is None else len(x.shape)
    axis = form.node.attributes.get_int("axis", -1)
    last = axis == -1 or (rank is not None and axis == rank - 1)
    if form.node.attributes.get_int("opset", 13) < 13 and not last:
        raise NotLiftedError("Softmax before opset 13 normalizes over several axes")
    return _result(form, form.op("Softmax", [form.dequantize(x, xs, xz)], {"axis": axis}), ys, yz)


def _reduce_mean(form: Form) -> ir.Value:
    x, xs, xz, ys, yz = form.inputs(5)
    form.needs_opset(18, "ReduceMean with axes as an input")
    axes = np.asarray(form.node.attributes.get_ints("axes"), np.int64)
    inputs = [form.dequantize(x, xs, xz), form.constant("axes", axes)]
    keepdims = {"keepdims": form.node.attributes.get_int("keepdims", 1)}
    return _result(form, form.op("ReduceMean", inputs, keepdims), ys, yz)


def _concat(form: Form) -> ir.Value:
    scale, zero, *operands = form.node.inputs
    axis = {"axis": form.node.attributes.get_int("axis")}
    return _result(form, form.op("Concat", _dequantized(form, operands), axis), scale, zero)


def _where(form: Form) -> ir.Value:
    condition, *operands, scale, zero = form.inputs(9)
    return _result(form, form.op("Where", [condition, *_dequantized(form, operands)]), scale, zero)


def _quantize(form: Form) -> ir.Value:
    x, scale, zero = form.inputs(3)
    # The contrib op is per tensor unless it names an axis, ai.onnx's has axis 1 by default.
    axis = form.node.attributes.get_int("axis", 1) if "axis" in form.node.attributes else None
    if x is None or scale is None:
        raise NotLiftedError("an operand or its scale is missing")
    _check_storage(form, form.node.outputs[0] if zero is None else zero)
    if zero is None:
        stored = form.node.outputs[0].dtype or ir.DataType.UINT8
        zero = form.constant("zero_point", np.zeros((), stored.numpy()))
    return form.op("QuantizeLinear", [x, *form.parameters(scale, zero, axis)], _along(axis))


def _dequantize(form: Form) -> ir.Value:
    x, scale, zero = form.inputs(3)
    axis = form.node.attributes.get_int("axis", 1) if "axis" in form.node.attributes else None
    # Nothing is known about what a Quantize of com.microsoft returns, but its zero point is.
    if (stored := zero or x) is not None:
        _check_storage(form, stored)
    return form.dequantize(x, scale, zero, axis)


def _check_storage(form: Form, stored: ir.Value) -> None:
    """The contrib ops store 16 and 4 bits at any opset, those of ai.onnx do not."""
    if stored.dtype not in (None, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32):
        form.needs_opset(21, f"a pair of {stored.dtype.name}")


def _along(axis: int | None) -> dict[str, int]:
    return {} if axis is None else {"axis": axis}


def _dequantized(form: Form, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    triples = zip(*[iter(operands)] * 3, strict=True)
    return [form.dequantize(value, scale, zero) for value, scale, zero in triples]


def _result(form: Form, value: ir.Value, scale: ir.Value | None, zero: ir.Value | None) -> ir.Value:
    """Quantized to the type of the first operand."""
    (first, *_) = (node for node in form.nodes if node.op_type == "DequantizeLinear")
    like = first.inputs[0]
    assert like is not None
    return form.quantize(value, scale, zero, like)


def _refuse_channels_last(form: Form) -> None:
    if form.node.attributes.get_int("channels_last", 0):
        raise NotLiftedError("its layout is NHWC, the float op has none")


_PLAIN = {
    "QLinearAdd": ("Add", 2),
    "QLinearMul": ("Mul", 2),
    "QLinearSigmoid": ("Sigmoid", 1),
    "QLinearLeakyRelu": ("LeakyRelu", 1),
    "QLinearAveragePool": ("AveragePool", 1),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", 1),
}
"""Ops whose attributes are those of the float op, and how many operands they have."""

_OTHERS = {
    "QLinearSoftmax": _softmax,
    "QLinearReduceMean": _reduce_mean,
    "QLinearConcat": _concat,
    "QLinearWhere": _where,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
}

ELEMENTWISE = {
    ("com.microsoft", name): lift
    for name, lift in (dict.fromkeys(_PLAIN, _plain) | _OTHERS).items()
}

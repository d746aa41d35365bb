"""Lift integer products together with the Cast and Mul that give them their scales.

    Mul(Cast(MatMulInteger(q, w, z, wz)), Mul(s, ws))   =>   MatMul(DQ(q, s, z), DQ(w, ws, wz))
    Mul(Cast(ConvInteger(q, w, z, wz)), Mul(s, ws))     =>   Conv(DQ(q, s, z), DQ(w, ws, wz))

where q, s and z are the results of a DynamicQuantizeLinear, as ORT's dynamic quantizer writes them.
A product of two activations has two of these.  What is added before the Cast, an int32 bias, is
DQ(b, s * ws) and added afterwards.  Part of `lift_qoperators`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import constant, only_consumer
from qcompiler.passes.lifting import Form, NotLiftedError, size_of

__all__ = ["INTEGER_PRODUCTS"]

_MOVES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""What may lie between a quantized value and its reader: one scale for all stays as it is."""


def _matmul(form: Form) -> ir.Value:
    left, right, left_zero, right_zero = form.inputs(4)
    left_scale, right_scale = _scales(form, (-2, -1))
    operands = [
        form.dequantize(left, left_scale, left_zero, axis=-2),
        form.dequantize(right, right_scale, right_zero, axis=-1),
    ]
    return _biased(form, form.op("MatMul", operands), operands)


def _conv(form: Form) -> ir.Value:
    data, weight, data_zero, weight_zero = form.inputs(4)
    if weight is None or weight.shape is None:
        raise NotLiftedError("the rank of its weights is unknown")
    data_scale, weight_scale = _scales(form, (-len(weight.shape), 1 - len(weight.shape)))
    operands = [
        form.dequantize(data, data_scale, data_zero),
        form.dequantize(weight, weight_scale, weight_zero, axis=0),
    ]
    return _biased(form, form.op("Conv", operands, form.attributes()), operands)


def _scales(form: Form, axes: tuple[int, int]) -> list[ir.Value]:
    """The scales of both operands, each of one element or along its axis of the product.

    Raises:
        NotLiftedError: What follows the product is not a Cast and such scales.
    """
    real = _cast(form)
    known = [_scale_of(value) for value in form.node.inputs[:2]]
    wanted = [scale for scale in known if scale is not None]
    if not wanted:
        raise NotLiftedError("which scale belongs to which operand is not known")
    rest = _factors(form, real, wanted)
    for scale in wanted:
        rest.remove(scale)
    if len(wanted) == len(known):
        return wanted
    (axis,) = (axis for axis, scale in zip(axes, known, strict=True) if scale is None)
    other = _product(form, rest, axis)
    return [other if scale is None else scale for scale in known]


def _scale_of(value: ir.Value | None) -> ir.Value | None:
    """The one scale at which a quantized activation was made."""
    maker = value.producer() if value is not None else None
    while maker is not None and maker.op_type in _MOVES:
        value = maker.inputs[0]
        maker = value.producer() if value is not None else None
    if maker is None:
        return None
    if maker.op_type == "DynamicQuantizeLinear":
        return maker.outputs[1]
    return maker.inputs[1] if maker.op_type == "QuantizeLinear" else None


def _biased(form: Form, product: ir.Value, operands: Sequence[ir.Value]) -> ir.Value:
    """The product and what was added to its integers, as floats."""
    if form.covered[1].op_type != "Add":
        return product
    pairs = [operand.producer() for operand in operands]
    scales = [pair.inputs[1] for pair in pairs if pair is not None]
    if any(scale is None or size_of(scale) != 1 for scale in scales):
        raise NotLiftedError("its int32 bias has a scale per channel that is computed")
    bias = form.covered[1].inputs[form.covered[1].inputs[0] is form.node.outputs[0]]
    widened = form.op("DequantizeLinear", [bias, form.op("Mul", scales)])
    return form.op("Add", [product, widened])


def _cast(form: Form) -> ir.Value:
    """The sums as floats, which nothing else reads as integers."""
    cast = only_consumer(form.node.outputs[0])
    if cast is not None and cast.op_type == "Add":
        form.covered.append(cast)
        cast = only_consumer(cast.outputs[0])
    to_float = cast is not None and cast.attributes.get_int("to", 0) == int(ir.DataType.FLOAT)
    if cast is None or cast.op_type != "Cast" or not to_float:
        raise NotLiftedError("its int32 result is not cast to float32 and scaled")
    form.covered.append(cast)
    return cast.outputs[0]


def _factors(form: Form, value: ir.Value, wanted: Sequence[ir.Value]) -> list[ir.Value]:
    """What `value` is multiplied by, until each operand has its scale."""
    factors: list[ir.Value] = []
    while not _complete(factors, wanted):
        product = only_consumer(value)
        if product is None or product.op_type != "Mul" or product.graph is not form.node.graph:
            raise NotLiftedError("its result is not multiplied by the scales of both operands")
        factor = product.inputs[0 if product.inputs[1] is value else 1]
        assert factor is not None
        factors += _leaves(factor, wanted)
        form.covered.append(product)
        value = product.outputs[0]
    return factors


def _complete(factors: list[ir.Value], wanted: Sequence[ir.Value]) -> bool:
    enough = len(factors) > 1 if len(wanted) == 1 else len(factors) == len(wanted)
    return enough and all(factors.count(scale) >= wanted.count(scale) for scale in wanted)


def _leaves(value: ir.Value, wanted: Sequence[ir.Value]) -> list[ir.Value]:
    """The factors of a product of scales."""
    maker = value.producer()
    if value in wanted or maker is None or maker.op_type != "Mul":
        return [value]
    return [leaf for v in maker.inputs if v is not None for leaf in _leaves(v, wanted)]


def _product(form: Form, factors: list[ir.Value], axis: int) -> ir.Value:
    """The scale of the operand that is no activation."""
    arrays = [constant(factor) for factor in factors]
    if any(array is None for array in arrays):
        raise NotLiftedError("the scale of its weights is computed")
    scale = functools.reduce(np.multiply, (np.asarray(array) for array in arrays))
    along = scale.ndim >= -axis and scale.shape[axis] == scale.size
    if scale.size != 1 and not along:
        raise NotLiftedError(f"no DequantizeLinear has scales of shape {list(scale.shape)} here")
    if len(factors) == 1 and scale.ndim <= 1:
        return factors[0]
    return form.constant("scale", scale.reshape(() if scale.size == 1 else -1))


INTEGER_PRODUCTS = {("", "MatMulInteger"): _matmul, ("", "ConvInteger"): _conv}

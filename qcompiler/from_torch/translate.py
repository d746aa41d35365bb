"""ONNX for torch's quantized ops, those of `quantized_decomposed` and torchao's affine ones.

    quantize(x, s, z, min, max)     =>  QuantizeLinear(Clip(x, (min - z) s, (max - z) s), s, z)
    dequantize(q, s, z)             =>  DequantizeLinear(q, s, z)

1. QuantizeLinear saturates at the ends of its type, torch at `min` and `max`: the Clip in front
   keeps a narrower range, such as -127..127, and leaves the pair whole.  There is none where the
   range is the type's.  Both nodes name a narrower range in their metadata.
2. -8..7 and 0..15, which torch keeps in bytes, become INT4 and UINT4.
3. Scales per token or per group become blocks of the last axis; a token is one block.
4. The zeros that a symmetric scheme computes are left out, and so is the zero point of int32: ORT
   takes int8 tokens without one as what they are.
5. Zero points that are parameters of floats are subtracted behind the DequantizeLinear, times the
   scale: see `float_zero_points`.

torch multiplies by 1/s where ONNX divides by s.  The integers are equal, except that where x/s is a
rounding tie, up to float32's precision, they may be 1 apart.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset21 as op

from qcompiler.from_torch.scales import Value, as_float, cast, constant, fit, grouped, is_zeros
from qcompiler.ir.types import Granularity, PerAxis, PerGroup, QuantType

__all__ = ["RANGE", "dequantize", "quantize"]

RANGE = "quantized_range"
"""Metadata of a Q or DQ whose integers lie within less than their type can hold: "-127..127"."""

_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
_INTEGERS = (*_BYTES, ir.DataType.INT16, ir.DataType.UINT16)


def quantize(
    x: Value, scale: Value, zero: Value, low: int, high: int, dtype: int, grain: Granularity
) -> Value:
    """A QuantizeLinear of `x` to `low..high`; its result is stored as `dtype`.

    Raises:
        ValueError: A type that QuantizeLinear does not make as torch does.
    """
    storage = _storage(dtype, low, high)
    if ir.DataType(dtype) not in _INTEGERS:
        raise ValueError(f"no QuantizeLinear makes {ir.DataType(dtype).name} as torch does")
    x, scale = as_float(x), fit(as_float(scale), x, grain)
    zero = None if zero is None or is_zeros(zero) else fit(zero, x, grain)
    attributes, shape = _attributes(grain), x.shape
    if not _fills(storage, low, high):
        x = _clip(x, scale, zero, low, high, grain)
    if zero is None:
        stored = op.QuantizeLinear(x, scale, output_dtype=storage, **attributes)
    else:
        stored = op.QuantizeLinear(x, scale, cast(zero, storage), **attributes)
    stored.dtype, stored.shape = storage, shape
    _mark(stored, storage, low, high)
    return cast(stored, dtype)


def dequantize(
    stored: Value,
    scale: Value,
    zero: Value | None,
    low: int,
    high: int,
    dtype: int,
    grain: Granularity,
    out_dtype: int | None = None,
) -> Value:
    """A DequantizeLinear of integers in `low..high`, as `out_dtype` or, by default, FLOAT."""
    storage = _storage(dtype, low, high)
    if storage != dtype:
        stored = _in_four_bits(stored, storage)
        storage = storage if stored.dtype != dtype else ir.DataType(dtype)
    scale = fit(as_float(scale), stored, grain)
    operands, offset = [stored, scale], None
    if zero is not None and zero.producer() is None and zero.dtype.is_floating_point():
        offset = op.Mul(fit(as_float(zero), stored, grain), scale)
    elif zero is not None and not is_zeros(zero) and storage is not ir.DataType.INT32:
        operands.append(cast(fit(zero, stored, grain), storage))
    y = op.DequantizeLinear(*operands, **_attributes(grain))
    _mark(y, storage, low, high)
    if offset is not None:
        y = op.Sub(y, _spread(offset, stored, grain))
    kept = out_dtype in (None, -1, ir.DataType.FLOAT)
    return y if kept else op.Cast(y, to=out_dtype)


def _storage(dtype: int, low: int, high: int) -> ir.DataType:
    """The type that holds the range: bytes of which half is never used are 4 bits."""
    if ir.DataType(dtype) in _BYTES and -8 <= low < 0 <= high <= 7:
        return ir.DataType.INT4
    if ir.DataType(dtype) in _BYTES and 0 <= low <= high <= 15:
        return ir.DataType.UINT4
    return ir.DataType(dtype)


def _in_four_bits(stored: Value, storage: ir.DataType) -> Value:
    """Bytes as 4 bits: what was widened before, and parameters, which are packed afterwards."""
    maker = stored.producer()
    if maker is None:
        return cast(stored, storage)
    before = maker.inputs[0] if maker.op_type == "Cast" else None
    return before if before is not None and before.dtype is storage else stored


def _fills(storage: ir.DataType, low: int, high: int) -> bool:
    return QuantType(storage).range == (low, high)


def _mark(value: Value, storage: ir.DataType, low: int, high: int) -> None:
    if not storage.is_floating_point() and not _fills(storage, low, high):
        value.producer().metadata_props[RANGE] = f"{low}..{high}"


def _attributes(grain: Granularity) -> dict[str, Any]:
    if isinstance(grain, PerGroup):
        return {"axis": -1, "block_size": grain.group_size}
    return {"axis": grain.axis} if isinstance(grain, PerAxis) else {}


def _clip(
    x: Value, scale: Value, zero: Value | None, low: int, high: int, grain: Granularity
) -> Value:
    """`x` within what `low..high` stand for; what rounds to an end still does."""
    ends = [constant(end, ir.DataType.FLOAT) for end in (low, high)]
    if zero is not None:
        ends = [op.Sub(end, as_float(zero)) for end in ends]
    bottom, top = (op.Mul(end, scale) for end in ends)
    if isinstance(grain, PerAxis):
        bottom, top = _spread(bottom, x, grain), _spread(top, x, grain)
        return op.Min(op.Max(x, bottom), top)
    if not isinstance(grain, PerGroup):
        return op.Clip(x, bottom, top)
    last = constant([-1], ir.DataType.INT64)
    bottom, top = op.Unsqueeze(bottom, last), op.Unsqueeze(top, last)
    return op.Reshape(op.Min(op.Max(grouped(x, grain), bottom), top), op.Shape(x))


def _spread(value: Value, x: Value, grain: Granularity) -> Value:
    """What has a number per tensor or per slice of `x`, in a shape that broadcasts against it.

    Raises:
        ValueError: There is a number per group.
    """
    if isinstance(grain, PerGroup):
        raise ValueError("its zero points are floats, one per group")
    if not isinstance(grain, PerAxis):
        return value
    apart = [-1 if i == grain.axis % len(x.shape) else 1 for i in range(len(x.shape))]
    return op.Reshape(value, constant(apart, ir.DataType.INT64))

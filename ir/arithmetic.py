"""Quantize and dequantize in numpy, equal bit for bit to ONNX QuantizeLinear/DequantizeLinear.

Rounding is half to even, then saturation; quotients are rounded to the expressed type, products
computed in float32 (ONNX QuantizeLinear-21, DequantizeLinear-21, int2 of -25).  Three corners:

* ONNX's reference evaluator passes through int32, so that quotients of 2**31 and more, infinity
  among them, saturate at the wrong end; here and in ONNX Runtime 1.31 (but for its int2 and its
  float16) they saturate at the end they are nearest to.
* ONNX Runtime divides float16 in float32 and rounds once, which at a near tie gives the
  neighbouring integer; the standard's division is float16's, and so is this one.
* NaN becomes the smallest integer, as in both; in float8 it stays NaN.

A scale may be anything: dividing by 0 follows IEEE, as ONNX does.  The scales computed here are
normal numbers above 0, so that nothing is ever divided by 0 or by a denormal number.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.errors import ModelError, OptionError
from qcompiler.ir.types import Granularity, PerAxis, PerGroup, PerTensor, QuantType

__all__ = [
    "SMALLEST_SCALE",
    "as_scale",
    "broadcast_scale",
    "dequantize",
    "fake_quantize",
    "quantize",
    "reduce_slices",
    "scale_and_zero_point",
    "slices_below_scale",
    "weight_scale",
]

FloatArray = NDArray[np.float32]

SMALLEST_SCALE = 2.0**-60
"""An all-zero channel still needs a scale that can be divided by, and so does its int32 bias, whose
scale is the product of two: that is a normal number too."""


def broadcast_scale(
    scale: NDArray[Any],
    shape: tuple[int, ...],
    granularity: Granularity,
) -> NDArray[Any]:
    """`scale` (as ONNX stores it) repeated so that it broadcasts against a tensor of `shape`.

    Raises:
        OptionError: It has not as many elements as there are scales.
    """
    wanted = granularity.scale_shape(shape)
    grouped = isinstance(granularity, PerGroup)
    if scale.shape != wanted if grouped else scale.size != math.prod(wanted):
        raise OptionError(
            f"scales or zero points of shape {list(scale.shape)}, per {granularity} of a tensor of "
            f"shape {list(shape)} they have {list(wanted)}"
        )
    match granularity:
        case PerTensor():
            return scale.reshape(())
        case PerAxis(axis):
            target = [1] * len(shape)
            target[axis] = shape[axis]
            return scale.reshape(target)
        case PerGroup(axis, group_size) if 0 < shape[axis] <= group_size:
            return scale
        case PerGroup(axis, group_size):
            whole = [slice(None)] * len(shape)
            whole[axis] = slice(shape[axis])
            return np.repeat(scale, group_size, axis=axis)[tuple(whole)]


def weight_scale(weight: NDArray[Any], type: QuantType) -> NDArray[Any]:
    """The symmetric scale that maps the largest magnitude of each slice to the end of the range.

    Args:
        weight: Floats of any shape; for `PerGroup` the axis may end in a shorter group.
        type: A symmetric type.

    Returns:
        Scales of the expressed type in ONNX shape: () per tensor, [C] per axis, the weight's shape
        with the grouped axis divided (rounded up) per group.  NaN where a slice holds NaN.
    """
    assert type.symmetric, "see scale_and_zero_point"
    largest = reduce_slices(np.maximum, np.abs(weight), type.granularity)
    top = np.float32(type.range[1] - type.middle)
    return as_scale(np.asarray(largest, np.float32) / top, type)


def scale_and_zero_point(
    values: NDArray[Any], type: QuantType
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The scale and zero point that map the range of each slice to the range of the type.

    The range is widened to hold 0, and 0 is stored exactly: as the zero point.  For a symmetric
    type these are `weight_scale` and the middle of the range.

    Args:
        values: Floats of any shape.
        type: Of any storage.

    Returns:
        Scales of the expressed type and zero points of the storage, both in ONNX shape.

    Raises:
        ModelError: The values hold NaN or Inf, of which no range can be made.
    """
    lowest = np.asarray(reduce_slices(np.minimum, values, type.granularity), np.float64)
    highest = np.asarray(reduce_slices(np.maximum, values, type.granularity), np.float64)
    if not (np.isfinite(lowest).all() and np.isfinite(highest).all()):
        raise ModelError("a range cannot be computed of values that hold NaN or Inf")
    if type.symmetric:
        scale = weight_scale(values, type)
        return scale, np.full(scale.shape, type.middle).astype(type.storage.numpy())
    first, last = type.range
    # Halves, because the span of two float32 may be no float32.
    scale = as_scale((highest / 2 - lowest / 2) / ((last - first) / 2), type)
    zero = np.clip(np.rint(first - lowest / np.asarray(scale, np.float64)), first, last)
    return scale, np.asarray(zero).astype(type.storage.numpy())


def reduce_slices(ufunc: np.ufunc, values: NDArray[Any], granularity: Granularity) -> NDArray[Any]:
    """The extreme of each slice, of 0 and its elements; or with `np.add` their sum."""
    match granularity:
        case PerTensor():
            return np.asarray(ufunc.reduce(values, axis=None, initial=0))
        case PerAxis(axis):
            others = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
            return np.asarray(ufunc.reduce(values, axis=others, initial=0))
        case PerGroup(axis, group_size):
            starts = np.arange(0, values.shape[axis], group_size)
            return np.asarray(ufunc(ufunc.reduceat(values, starts, axis=axis), 0))


def as_scale(steps: NDArray[Any], type: QuantType) -> NDArray[Any]:
    """Steps as scales of the expressed type, never 0, rounded up where it is narrower than float32.

    Rounded down, a step of bfloat16 would put the largest value of an int16 128 steps outside.
    """
    expressed = type.expressed.numpy()
    steps = np.maximum(steps, np.asarray(_smallest_scale(type.expressed), steps.dtype))
    scale = steps.astype(expressed)
    if type.expressed is ir.DataType.FLOAT:
        return scale
    short = scale.astype(steps.dtype) < steps
    return np.asarray(np.where(short, np.nextafter(scale, expressed.type(np.inf)), scale))


@functools.cache
def _smallest_scale(expressed: ir.DataType) -> float:
    return max(SMALLEST_SCALE, float(ml_dtypes.finfo(expressed.numpy()).smallest_normal))


def slices_below_scale(values: NDArray[Any], scale: NDArray[Any], type: QuantType) -> int:
    """How many slices are smaller than the smallest scale can say, so that they lose bits or all.

    Args:
        values: Of any shape.
        scale: In ONNX shape, see `weight_scale`.
        type: What they are stored as.
    """
    least = np.asarray(scale <= SMALLEST_SCALE)
    if not least.any():
        return 0
    magnitudes = reduce_slices(np.maximum, np.abs(values), type.granularity)
    ends = max(abs(end) for end in type.range) * SMALLEST_SCALE
    below = (magnitudes > 0) & (magnitudes < ends)
    return int(np.sum(least.reshape(below.shape) & below))


def quantize(
    values: NDArray[Any],
    scale: NDArray[Any],
    type: QuantType,
    zero_point: int | NDArray[Any] | None = None,
) -> NDArray[Any]:
    """`saturate(round_half_even(values / scale) + zero_point)` in `type.storage`.

    Args:
        values: Floats of the expressed type.
        scale: In ONNX shape, see `weight_scale`.
        type: What to store; with a codebook, the index of the nearest entry is.
        zero_point: The stored value that stands for 0: a number, or as many as scales.  By default
            that of a symmetric type.

    Returns:
        Stored values, in the shape of `values`.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        steps = np.asarray(values / broadcast_scale(scale, values.shape, type.granularity))
    storage = type.storage.numpy()
    if type.codebook is not None:
        return np.asarray(type.codebook.nearest(steps).astype(storage))
    # In place from here on, because weights may fill half the memory.
    low, high = type.range
    if type.is_float:
        return np.asarray(np.clip(steps, low, high, out=steps).astype(storage))
    zeros = _zeros(zero_point, values.shape, type)
    return np.asarray(_rounded(steps, zeros, type).astype(storage))


def _rounded(steps: NDArray[Any], zeros: NDArray[Any], type: QuantType) -> NDArray[Any]:
    """Steps as the integers of a type, still floats, in place where they are wide enough."""
    low, high = type.range
    steps = steps.astype(_wide(type), copy=False)
    np.rint(steps, out=steps)
    steps += zeros
    np.fmax(steps, low, out=steps)  # of NaN and a number this is the number
    np.fmin(steps, high, out=steps)
    return steps


def dequantize(
    stored: NDArray[Any],
    scale: NDArray[Any],
    type: QuantType,
    zero_point: int | NDArray[Any] | None = None,
) -> NDArray[Any]:
    """`(stored - zero_point) * scale` in the expressed type.

    Args:
        stored: Stored values of any shape.
        scale: In ONNX shape, see `weight_scale`.
        type: What is stored.
        zero_point: As in `quantize`.
    """
    factors = broadcast_scale(scale, stored.shape, type.granularity).astype(np.float32, copy=False)
    if type.codebook is not None:
        centred = np.asarray(type.codebook.values, np.float32)[stored.astype(np.intp)]
    else:
        centred = stored.astype(np.float32)
        centred -= _zeros(zero_point, stored.shape, type)
    with np.errstate(over="ignore", invalid="ignore"):
        centred *= factors
        return np.asarray(centred.astype(type.expressed.numpy(), copy=False))


def fake_quantize(
    values: NDArray[Any],
    scale: NDArray[Any],
    type: QuantType,
    zero_point: int | NDArray[Any] | None = None,
) -> NDArray[Any]:
    """`dequantize(quantize(...))`, bit for bit, in two thirds of the time: nothing is stored."""
    if type.codebook is not None or type.is_float or type.storage is ir.DataType.INT32:
        stored = quantize(values, scale, type, zero_point)
        return dequantize(stored, scale, type, zero_point)
    factors = broadcast_scale(scale, values.shape, type.granularity)
    zeros = _zeros(zero_point, values.shape, type)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        centred = _rounded(np.asarray(values / factors), zeros, type)
        centred -= zeros
        centred *= factors.astype(np.float32, copy=False)
        return np.asarray(centred.astype(type.expressed.numpy(), copy=False))


def _wide(type: QuantType) -> np.dtype[Any]:
    """A float that holds every stored value and, added to it, every zero point."""
    return np.dtype(np.float64 if type.storage is ir.DataType.INT32 else np.float32)


def _zeros(
    zero_point: int | NDArray[Any] | None, shape: tuple[int, ...], type: QuantType
) -> NDArray[Any]:
    """Zero points as float32 that broadcast against a tensor of `shape`."""
    zeros = np.asarray(type.middle if zero_point is None else zero_point).astype(np.float32)
    return zeros if zeros.ndim == 0 else broadcast_scale(zeros, shape, type.granularity)

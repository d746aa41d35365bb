"""Quantize and dequantize in numpy, equal bit for bit to ONNX QuantizeLinear/DequantizeLinear.

Rounding is half to even, then saturation (ONNX QuantizeLinear-21); scales are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.ir.types import Granularity, PerAxis, PerGroup, PerTensor, QuantType

__all__ = ["broadcast_scale", "dequantize", "quantize", "weight_scale"]

FloatArray = NDArray[np.float32]

_SMALLEST_SCALE = np.float32(1e-30)
"""An all-zero channel still needs a scale that can be divided by."""


def broadcast_scale(
    scale: NDArray[Any],
    shape: tuple[int, ...],
    granularity: Granularity,
) -> NDArray[Any]:
    """`scale` (as ONNX stores it) repeated so that it broadcasts against a tensor of `shape`."""
    match granularity:
        case PerTensor():
            return scale.reshape(())
        case PerAxis(axis):
            target = [1] * len(shape)
            target[axis] = shape[axis]
            return scale.reshape(target)
        case PerGroup(axis, group_size):
            repeated = np.repeat(scale, group_size, axis=axis)
            return np.take(repeated, np.arange(shape[axis]), axis=axis)


def weight_scale(weight: FloatArray, type: QuantType) -> FloatArray:
    """The symmetric scale that maps the largest magnitude of each slice to the end of the range.

    Args:
        weight: Any shape; for `PerGroup` the axis may end in a shorter group.
        type: A symmetric type.

    Returns:
        Scales in ONNX shape: () per tensor, [C] per axis, the weight's shape with the grouped axis
        divided (rounded up) per group.
    """
    assert type.symmetric, "weights are stored symmetrically"
    magnitude = np.abs(weight)
    match type.granularity:
        case PerTensor():
            largest = magnitude.max(initial=0.0)
        case PerAxis(axis):
            others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
            largest = magnitude.max(axis=others, initial=0.0)
        case PerGroup(axis, group_size):
            starts = np.arange(0, weight.shape[axis], group_size)
            largest = np.maximum.reduceat(magnitude, starts, axis=axis)
    top = np.float32(type.range[1])
    steps: FloatArray = np.maximum(np.asarray(largest, np.float32) / top, _SMALLEST_SCALE)
    return steps


def quantize(
    values: FloatArray,
    scale: FloatArray,
    type: QuantType,
    zero_point: int = 0,
) -> NDArray[Any]:
    """`saturate(round_half_even(values / scale) + zero_point)` in `type.storage`.

    Args:
        values: Finite floats.
        scale: In ONNX shape, see `weight_scale`.
        type: What to store.
        zero_point: The stored value that stands for 0.
    """
    steps = values / broadcast_scale(scale, values.shape, type.granularity)
    low, high = type.range
    if not type.is_float:
        steps = np.rint(steps) + np.float32(zero_point)
    stored: NDArray[Any] = np.clip(steps, low, high).astype(type.storage.numpy())
    return stored


def dequantize(
    stored: NDArray[Any], scale: FloatArray, type: QuantType, zero_point: int = 0
) -> FloatArray:
    """`(stored - zero_point) * scale` in float32."""
    centred = stored.astype(np.float32) - np.float32(zero_point)
    return np.asarray(centred * broadcast_scale(scale, stored.shape, type.granularity), np.float32)

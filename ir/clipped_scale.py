"""The scale of each slice of a weight by least squares, instead of by its largest magnitude.

    s = argmin over s of  sum_i  c_i (w_i - s round(w_i / s))^2

A few large weights make every step of their slice coarse.  Rounding them down to the end of a
narrower range costs less than that, the more so the fewer the steps are.  For given integers q the
best scale is sum(c w q) / sum(c q^2); integers are tried for some narrower ranges, and the pair of
the least error wins (Jung et al., Learning to quantize with interval loss, 2019, search a clipping
value; the closed form is one step of Lloyd, Least squares quantization in PCM, 1982).

Types whose integers reach one further down than up (-8 to 7) may take negative scales: the element
of the largest magnitude then lies on the longer side, whatever its sign is, and of 4 bits all 16
steps are in use.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import (
    as_scale,
    broadcast_scale,
    dequantize,
    quantize,
    reduce_slices,
    weight_scale,
)
from qcompiler.ir.types import Granularity, PerAxis, PerGroup, QuantType

__all__ = ["clipped_scale", "signed_scale"]

_RANGES = tuple(1 - 0.05 * step for step in range(11))
"""Parts of the full range that are tried.  Half as many lose 0.05 dB at 4 bits, and three times as
many, or more than one step of Lloyd, win less than that."""

_NEVER_0 = np.float32(1e-30)
"""What a sum over integers that are all 0 is divided by."""

_PIECE = 1 << 18
"""Elements looked at together: they stay in the cache, and need no memory for a copy of all."""


def clipped_scale(
    weight: NDArray[Any],
    type: QuantType,
    importance: NDArray[Any] | None = None,
    *,
    signed: bool = False,
) -> NDArray[Any]:
    """The symmetric scale of each slice that rounds it with the least squared error.

    Args:
        weight: Finite floats of any shape.
        type: A symmetric type.
        importance: What a squared error counts for, not negative, of a shape that broadcasts to the
            weight's: for a matrix [K, N] the mean square of each of its inputs, [K, 1], makes it
            the error of the product.  By default all count the same.
        signed: Whether a scale may be negative, where that rounds better.

    Returns:
        Scales of the expressed type in ONNX shape, as `weight_scale` returns them.  No slice has a
        larger error than with that.
    """
    if importance is None:
        importance = np.ones((), np.float32)
    importance = np.broadcast_to(importance, weight.shape)
    axis = _free_axis(type.granularity, weight.ndim)
    if axis is None:
        return _search(weight, importance, type, signed)
    count = min(-(-weight.size // _PIECE), weight.shape[axis]) or 1
    pieces = zip(*(np.array_split(part, count, axis) for part in (weight, importance)), strict=True)
    scales = [_search(part, counts, type, signed) for part, counts in pieces]
    return np.concatenate(scales, axis=0 if isinstance(type.granularity, PerAxis) else axis)


def signed_scale(weight: NDArray[Any], type: QuantType) -> NDArray[Any]:
    """The scale that maps the element of the largest magnitude to the end of the longer side.

    Args:
        weight: Finite floats of any shape.
        type: A symmetric type.

    Returns:
        Scales as `weight_scale` returns them, negative where that element is positive; those where
        no side is longer.
    """
    top, bottom = _reach(type)
    scale = weight_scale(weight, type)
    if bottom <= top:
        return scale
    return np.asarray(
        _signs(weight, type).astype(scale.dtype) * as_scale(scale * (top / bottom), type)
    )


def _reach(type: QuantType) -> tuple[float, float]:
    """Steps above 0, and below it."""
    return type.range[1] - type.middle, type.middle - type.range[0]


def _signs(weight: NDArray[Any], type: QuantType) -> NDArray[np.float32]:
    """Of each slice -1 where it reaches further up than down, else 1."""
    highest = reduce_slices(np.maximum, weight, type.granularity)
    lowest = reduce_slices(np.minimum, weight, type.granularity)
    return np.where(highest > -lowest, np.float32(-1), np.float32(1))


def _levels(steps: NDArray[np.float32], type: QuantType) -> NDArray[np.float32]:
    """What is stored for multiples of the scale, read with a scale of 1.

    Of integers without a detour by their type, which takes longer than all the rest.
    """
    if type.is_float or type.codebook is not None:
        exact = dataclasses.replace(type, expressed=ir.DataType.FLOAT)
        ones = np.ones(type.granularity.scale_shape(steps.shape), np.float32)
        return np.asarray(dequantize(quantize(steps, ones, exact), ones, exact), np.float32)
    top, bottom = _reach(type)
    levels = np.rint(steps, out=steps)
    return np.clip(levels, np.float32(-bottom), np.float32(top), out=levels)


def _free_axis(granularity: Granularity, rank: int) -> int | None:
    """An axis along which no two neighbours share a scale, if there is one."""
    match granularity:
        case PerAxis(axis):
            return axis
        case PerGroup(axis, _):
            return next((free for free in range(rank) if free != axis % rank), None)
    return None


def _search(
    weight: NDArray[Any], importance: NDArray[Any], type: QuantType, signed: bool
) -> NDArray[Any]:
    """The scales of one piece.

    In units of the steps that the largest magnitude gives: numbers from -2**15 to 2**15, whose
    squares neither overflow nor vanish, whatever the weights are.
    """
    widest = weight_scale(weight, type)
    units = broadcast_scale(widest, weight.shape, type.granularity).astype(np.float32)
    steps = np.asarray(weight, np.float32) / units
    ones = np.ones(widest.shape, np.float32)
    signs, parts = ones, _RANGES
    top, bottom = _reach(type)
    if signed and bottom > top:
        signs = _signs(steps, type)
        steps = steps * broadcast_scale(signs, weight.shape, type.granularity)
        parts = (*_RANGES, top / bottom)
    best, most = ones, np.zeros_like(ones)
    for part in parts:
        levels = _levels(steps / np.float32(part), type)
        product = reduce_slices(np.add, importance * steps * levels, type.granularity)
        square = np.maximum(
            reduce_slices(np.add, importance * levels * levels, type.granularity), _NEVER_0
        )
        # The squared error that is left is sum(c w^2) less product^2 / square.
        better = np.square(product) / square > most
        most = np.where(better, np.square(product) / square, most)
        best = np.where(better, product / square, best)
    return np.asarray(signs.astype(widest.dtype) * as_scale(best * widest.astype(np.float32), type))

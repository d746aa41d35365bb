"""The scales and zero points that a weight is rounded by: of its whole range, or of a narrower one.

Symmetric types take theirs from `ir.clipped_scale`.  An asymmetric one tries parts of the range of
each slice, and keeps the one of the least squared error, in which every element counts as much as
the mean square of the input that multiplies it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import (
    as_scale,
    broadcast_scale,
    quantize,
    reduce_slices,
    scale_and_zero_point,
)
from qcompiler.ir.clipped_scale import clipped_scale, signed_scale
from qcompiler.ir.two_level import on_two_levels
from qcompiler.ir.types import QuantType
from qcompiler.passes.rounded_weight import RoundedWeight

__all__ = ["RANGES", "rounded_on", "weight_grid"]

RANGES = ("max", "mse")
"""The whole range of each slice, or the part of it that rounds with the least squared error."""

_PARTS = tuple(1 - 0.08 * step for step in range(6))

_NEVER_0 = np.float32(1e-30)

Floats = NDArray[np.float32]


def weight_grid(
    weight: Floats, type: QuantType, range: str = "mse", importance: Floats | None = None
) -> tuple[Floats, NDArray[np.generic] | None]:
    """Scales and zero points of a matrix, in ONNX shape; no zero points for a symmetric type.

    Args:
        weight: [K, N], finite.
        type: Of integers.
        range: One of `RANGES`.
        importance: [K], what a squared error of each row counts for; by default all the same.
    """
    rows = None if importance is None else np.asarray(importance, np.float32)[:, None]
    if type.symmetric:
        if range == "max":
            scale = signed_scale(weight, type)
        else:
            scale = clipped_scale(weight, type, rows, signed=True)
        return on_two_levels(scale) if type.two_level else scale, None
    if range == "max":
        return scale_and_zero_point(weight, type)
    return _narrowest(weight, type, np.ones((1, 1), np.float32) if rows is None else rows)


def rounded_on(
    weight: Floats, type: QuantType, grid: tuple[Floats, NDArray[np.generic] | None]
) -> RoundedWeight:
    """Each element at the nearest step of a grid."""
    return RoundedWeight(quantize(weight, grid[0], type, grid[1]), *grid)


def _narrowest(weight: Floats, type: QuantType, rows: Floats) -> tuple[Floats, NDArray[np.generic]]:
    """The zero point and the least squares scale of that part of each range that fits best."""
    lowest = reduce_slices(np.minimum, weight, type.granularity)
    highest = reduce_slices(np.maximum, weight, type.granularity)
    first, last = type.range
    most = np.full(lowest.shape, -1, np.float32)
    best_scale, best_zero = np.ones_like(most), np.zeros_like(most)
    for part in _PARTS:
        scale = as_scale(np.asarray((highest - lowest) * (part / (last - first))), type)
        zero = np.clip(np.rint(first - lowest * part / scale), first, last).astype(np.float32)
        stored = quantize(weight, scale, type, zero).astype(np.float32)
        levels = stored - broadcast_scale(zero, weight.shape, type.granularity)
        product = reduce_slices(np.add, rows * weight * levels, type.granularity)
        square = reduce_slices(np.add, rows * np.square(levels), type.granularity)
        # What is left of the squared error of these integers is sum(c w^2) less this.
        explained = np.square(product) / np.maximum(square, _NEVER_0)
        better = explained > most
        most = np.where(better, explained, most)
        fitted = np.where(product > 0, product / np.maximum(square, _NEVER_0), scale)
        best_scale = np.where(better, fitted, best_scale)
        best_zero = np.where(better, zero, best_zero)
    return as_scale(best_scale, type), best_zero.astype(type.storage.numpy())

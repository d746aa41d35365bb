"""The grid that a weight is rounded on: of its whole range, or of a narrower one.

Symmetric types take their scales from `ir.clipped_scale`.  Others try parts of the range of each
slice, and keep the one of the least squared error, in which every element counts as much as the
mean square of the input that multiplies it: with zero points the scale of least squares, with
offsets (`offset_grid`) scale and offset.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

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
from qcompiler.ir.types import PerAxis, PerGroup, QuantType
from qcompiler.passes.offset_grid import fitted_offsets, whole_range
from qcompiler.passes.rounded_weight import RoundedWeight

__all__ = ["RANGES", "Grid", "rounded_on", "weight_grid"]

RANGES = ("max", "mse")
"""The whole range of each slice, or the part of it that rounds with the least squared error."""

_PARTS = (*(1 - 0.08 * step for step in range(6)), 1.1)
"""Of the range; more than all of it, where the zero point is not the one that fits it best.  Where
nothing counts, because no sample reached a group, the first stays: all of it."""

_SHIFTS = (0, -1, 1)
"""Of the zero point, from where the ends of the range put it: what is cut off need not be the same
on both sides.  SmolLM2's weights lose 7% of their squared error by it in groups of 32, those of 128
0.4%, and 4% where inputs differ much in what they count for."""

_PIECE = 1 << 18
"""Elements looked at together: they stay in the cache."""

_NEVER_0 = np.float32(1e-30)

Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Grid:
    """How stored values are read, in ONNX shape.

    Attributes:
        scale: One per slice.
        zero_point: The same, of the storage type; None for the middle.
        offset: The same, what a stored 0 stands for; None for 0.
    """

    scale: Floats
    zero_point: NDArray[Any] | None = None
    offset: Floats | None = None


def weight_grid(
    weight: Floats, type: QuantType, range: str = "mse", importance: Floats | None = None
) -> Grid:
    """The grid of a matrix.

    Args:
        weight: [K, N], finite.
        type: Of integers.
        range: One of `RANGES`.
        importance: [K], what a squared error of each row counts for; by default all the same.
    """
    rows = None if importance is None else np.asarray(importance, np.float32)[:, None]
    if type.offset:
        if range == "max":
            scale, offset = whole_range(weight, type)
        else:
            scale, offset = fitted_offsets(weight, type, rows)
        if type.two_level:
            scale, offset = on_two_levels(scale), on_two_levels(offset, zero=True)
        return Grid(scale, None, offset)
    if type.symmetric:
        if range == "max":
            scale = signed_scale(weight, type)
        else:
            scale = clipped_scale(weight, type, rows, signed=True)
        return Grid(on_two_levels(scale) if type.two_level else scale)
    if range == "max":
        return Grid(*scale_and_zero_point(weight, type))
    return _whole_zero_points(weight, type, np.ones((1, 1), np.float32) if rows is None else rows)


def rounded_on(weight: Floats, type: QuantType, grid: Grid) -> RoundedWeight:
    """Each element at the nearest step of a grid."""
    if grid.offset is not None:
        weight = weight - broadcast_scale(grid.offset, weight.shape, type.granularity)
    stored = quantize(weight, grid.scale, type, grid.zero_point)
    return RoundedWeight(stored, grid.scale, grid.zero_point, grid.offset)


def _whole_zero_points(weight: Floats, type: QuantType, rows: Floats) -> Grid:
    """The zero point and the scale of least squares of each slice, among those that are tried."""
    match type.granularity:
        case PerAxis(1) | PerGroup(0, _):
            count = max(weight.size // _PIECE, 1)
        case _:
            count = 1
    pieces = [_search(part, type, rows) for part in np.array_split(weight, count, axis=-1)]
    scale, zero = (np.concatenate(parts, axis=-1) for parts in zip(*pieces, strict=True))
    return Grid(as_scale(scale, type), zero.astype(type.storage.numpy()))


def _search(weight: Floats, type: QuantType, rows: Floats) -> tuple[Floats, Floats]:
    """Scales and zero points of columns."""
    lowest = reduce_slices(np.minimum, weight, type.granularity)
    highest = reduce_slices(np.maximum, weight, type.granularity)
    first, last = type.range
    width = np.maximum((highest - lowest) / (last - first), _NEVER_0)
    usual = np.rint(first - lowest / width)
    most = np.full(lowest.shape, -1, np.float32)
    best_scale, best_zero = np.ones_like(most), np.zeros_like(most)
    for shift, part in itertools.product(_SHIFTS, _PARTS):
        zero = np.clip(usual + shift, first, last)
        scale = as_scale(np.asarray(width * np.float32(part), np.float32), type)
        levels = _levels(weight, scale, zero, type)
        product = reduce_slices(np.add, rows * weight * levels, type.granularity)
        square = reduce_slices(np.add, rows * np.square(levels), type.granularity)
        # What is left of the squared error of these integers is sum(c w^2) less this.
        explained = np.square(product) / np.maximum(square, _NEVER_0)
        better = explained > most
        most = np.where(better, explained, most)
        fitted = np.where(product > 0, product / np.maximum(square, _NEVER_0), scale)
        best_scale = np.where(better, fitted, best_scale)
        best_zero = np.where(better, zero, best_zero)
    return best_scale, best_zero


def _levels(weight: Floats, scale: NDArray[Any], zero: Floats, type: QuantType) -> Floats:
    """Steps from the zero point: without a detour by the storage, which takes most of the time."""
    spread = partial(broadcast_scale, shape=weight.shape, granularity=type.granularity)
    levels = np.asarray(weight / spread(scale), np.float32)
    first, last = type.range
    return np.clip(np.rint(levels, out=levels), spread(first - zero), spread(last - zero))

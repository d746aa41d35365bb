"""Scales and offsets of the groups of a weight, by its range or by least squares.

    s, o = argmin over s, o of  sum_i  c_i (w_i - s q_i - o)^2        q_i = round((w_i - o) / s)

For given integers q that is a line through the points (q, w): s = cov(q, w) / var(q), and o the
mean that is left.  Integers are tried for some parts of the range of each group, and the line of
the least error wins, as in `ir.clipped_scale`.

Most weights lie close to 0.  Where steps are wide, a grid with a step at 0 rounds them better than
one that fits the ends of the range but has 0 between two steps: both kinds are tried.  SmolLM2 in
groups of 64, by the whole range, has a perplexity of 24.4 so, and of 26.8 by the ends alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import as_scale
from qcompiler.ir.types import PerGroup, QuantType

__all__ = ["fitted_offsets", "whole_range"]

Floats = NDArray[np.float32]

_PARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)

_PIECE = 1 << 18
"""Elements looked at together: they stay in the cache, and need no memory for a copy of all."""

_LEAST = np.float32(1e-6)
"""Of the largest importance: rows that count for nothing are rounded well all the same."""


def whole_range(weight: Floats, type: QuantType) -> tuple[Floats, Floats]:
    """The grid from the least to the largest weight of each group, moved to 0 where that is better.

    Args:
        weight: [K, N], finite.
        type: Integers with offsets, in groups of rows.

    Returns:
        Scale and offset, [G, N].
    """
    return _in_pieces(weight, partial(_whole, type=type))


def fitted_offsets(
    weight: Floats, type: QuantType, rows: Floats | None = None
) -> tuple[Floats, Floats]:
    """The grid of the least squared error.

    Args:
        weight: [K, N], finite.
        type: Integers with offsets, in groups of rows.
        rows: [K, 1], what a squared error of each row counts for; by default all the same.

    Returns:
        Scale and offset, [G, N].
    """
    counts = np.ones((len(weight), 1), np.float32)
    if rows is not None and rows.any():
        counts = np.maximum(rows / rows.max(), _LEAST)
    return _in_pieces(weight, partial(_fit, type=type, counts=counts))


def _in_pieces(
    weight: Floats, grid_of: Callable[[Floats], tuple[Floats, Floats]]
) -> tuple[Floats, Floats]:
    pieces = np.array_split(weight, min(-(-weight.size // _PIECE), weight.shape[1]) or 1, axis=1)
    found = [grid_of(piece) for piece in pieces]
    return np.hstack([scale for scale, _ in found]), np.hstack([offset for _, offset in found])


def _ends(weight: Floats, type: QuantType) -> tuple[Floats, Floats]:
    """The grid whose ends are the least and the largest weight of each group."""
    starts, (first, last) = _starts(weight, type), type.range
    lowest = np.minimum.reduceat(weight, starts, axis=0)
    # Halves, because the span of two float32 may be no float32.
    span = np.maximum.reduceat(weight, starts, axis=0) / 2 - lowest / 2
    scale = as_scale(np.asarray(span / ((last - first) / 2), np.float32), type)
    return scale, np.asarray(lowest - np.float32(first) * scale, np.float32)


def _with_0(scale: Floats, offset: Floats) -> Floats:
    """The offset next to this one that makes a step of 0."""
    return np.asarray(np.rint(offset / scale) * scale, np.float32)


def _whole(weight: Floats, type: QuantType) -> tuple[Floats, Floats]:
    starts = _starts(weight, type)
    lengths = np.diff([*starts, len(weight)])
    scale, offset = _ends(weight, type)
    offsets = offset, _with_0(scale, offset)
    errors = []
    for tried in offsets:
        step, zero = (np.repeat(part, lengths, axis=0) for part in (scale, tried))
        levels = np.clip(np.rint((weight - zero) / step), *type.range)
        error = (weight - zero) / step - levels
        errors.append(np.add.reduceat(np.square(error), starts, axis=0))
    return scale, np.where(errors[1] < errors[0], offsets[1], offsets[0])


def _starts(weight: Floats, type: QuantType) -> NDArray[np.int64]:
    assert isinstance(type.granularity, PerGroup) and weight.ndim == 2
    return np.arange(0, len(weight), type.granularity.group_size)


def _fit(weight: Floats, type: QuantType, counts: Floats) -> tuple[Floats, Floats]:
    """The grid of some columns."""
    starts, (first, last) = _starts(weight, type), type.range
    lengths = np.diff([*starts, len(weight)])

    def total(values: Floats) -> Floats:
        return np.asarray(np.add.reduceat(values, starts, axis=0))

    def spread(values: Floats) -> Floats:
        return np.repeat(values, lengths, axis=0)

    count = total(counts)
    mean = total(counts * weight) / count
    centred = weight - spread(mean)
    lowest = np.minimum.reduceat(centred, starts, axis=0)
    highest = np.maximum.reduceat(centred, starts, axis=0)
    scale, offset = _ends(centred, type)
    most = np.full(mean.shape, -1, np.float32)
    for part, with_0 in itertools.product(_PARTS, (False, True)):
        step = as_scale((highest - lowest) * np.float32(part / (last - first)), type)
        zero = np.asarray((highest + lowest) / 2 - step * ((first + last) / 2), np.float32)
        if with_0:
            zero = _with_0(step, zero + mean) - mean
        steps = (centred - spread(zero)) / spread(np.asarray(step, np.float32))
        levels = np.clip(np.rint(steps), first, last)
        weighted = counts * levels
        level = total(weighted) / count
        variance = total(weighted * levels) - count * np.square(level)
        covariance = total(weighted * centred)
        # What is left of the squared error is sum(c w^2) less this.
        explained = np.square(covariance) / np.maximum(variance, count * _LEAST)
        better = (explained > most) & (covariance > 0) & (variance > count * _LEAST)
        most = np.where(better, explained, most)
        slope = covariance / np.maximum(variance, count * _LEAST)
        scale = np.where(better, slope, scale)
        offset = np.where(better, -slope * level, offset)
    return as_scale(scale, type), np.asarray(offset + mean, np.float32)

"""Search the range of a tensor that is best to be divided into steps, by a histogram of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qcompiler.histogram import Histogram

__all__ = ["Range", "least_divergence", "least_error"]

Range = tuple[float, float]

_CANDIDATES = np.linspace(1.0, 0.05, 77)
"""Shares of the whole range that the searches try."""


def least_error(histogram: Histogram, seen: Range, levels: int) -> Range:
    """The range whose steps leave the least mean squared error.

    One end is searched, then the other, then the first again.

    Args:
        histogram: What is to be rounded.
        seen: The least and the greatest value.
        levels: How many steps the range is divided into.
    """
    held = np.flatnonzero(histogram.counts)
    values, counts = histogram.centers[held], histogram.counts[held]

    @functools.cache  # an end that is 0 has one candidate, and the second round often none
    def error(low: float, high: float) -> float:
        step, zero = _grid(low, high, levels)
        missed = np.rint(values / step)  # in place from here on: it runs some dozen times
        np.minimum(missed, levels - 1 - zero, out=missed)
        np.maximum(missed, -zero, out=missed)
        missed *= step
        missed -= values
        missed *= missed
        return float(np.dot(counts, missed))

    low, high = lowest, highest = min(seen[0], 0.0), max(seen[1], 0.0)
    # A grid ends up to half a step beyond the range that it was made for.
    slack = _grid(low, high, levels)[0] / 2
    above = _cut_off(values, counts, highest * _CANDIDATES + slack)
    below = _cut_off(-values[::-1], counts[::-1], -lowest * _CANDIDATES + slack)
    for _ in range(2):
        high = _least(highest, above, functools.partial(error, low))
        low = _least(lowest, below, lambda end: error(end, high))  # noqa: B023
    return low, high


def _least(end: float, bounds: NDArray[np.float64], error: Callable[[float], float]) -> float:
    """The share of `end` of the least error; `bounds` are below those of each, and grow."""
    best, least = end, math.inf
    for share, bound in zip(_CANDIDATES, bounds, strict=True):
        if bound > least:
            break
        if (found := error(float(share * end))) < least:
            best, least = float(share * end), found
    return best


def _cut_off(
    values: NDArray[np.float64], counts: NDArray[np.int64], ends: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The squared error of what lies above each of `ends`; `values` ascend."""
    from_end = [np.cumsum((counts * values**power)[::-1]) for power in range(3)]
    total, first, second = (np.append(sums[::-1], 0.0) for sums in from_end)
    at = np.searchsorted(values, ends, side="right")
    lost: NDArray[np.float64] = second[at] - 2 * ends * first[at] + ends**2 * total[at]
    return lost


def least_divergence(histogram: Histogram, seen: Range, levels: int) -> Range:
    """The range whose steps lose the least information (KL divergence), a share of both ends.

    After Migacz, "8-bit inference with TensorRT" (2017), with a range of two ends.

    Args:
        histogram: What is to be rounded.
        seen: The least and the greatest value.
        levels: How many steps the range is divided into.
    """
    counts = histogram.counts.copy()
    # Every range has a step for 0, and after a Relu half of all values would vote for that alone.
    counts[-histogram.first] = 0
    held = np.flatnonzero(counts)
    low, high = min(seen[0], 0.0), max(seen[1], 0.0)
    if not held.size:
        return low, high
    values, shares = histogram.centers[held], counts[held] / counts.sum()

    def divergence(share: float) -> float:
        """KL of the values, cut off at both ends, from what is left of them in steps."""
        inside = np.clip(values, share * low, share * high)
        _, steps = _rounded(values, share * low, share * high, levels)
        # A step's share spreads evenly over the bins that it stands for and that hold anything.
        bins, at = np.unique(inside, return_inverse=True)
        true = np.bincount(at, weights=shares, minlength=bins.size)
        kept = np.where(inside == values, shares, 0.0)
        step_of_bin = np.zeros(bins.size, np.int64)
        step_of_bin[at] = steps
        mass = np.bincount(step_of_bin, weights=np.bincount(at, kept, bins.size), minlength=levels)
        width = np.bincount(step_of_bin, minlength=levels)
        told = mass[step_of_bin] / width[step_of_bin]
        told = np.maximum(told / max(told.sum(), 1e-12), 1e-12)
        return float(np.dot(true, np.log(np.maximum(true, 1e-12) / told)))

    share = min(map(float, _CANDIDATES), key=divergence)
    return share * low, share * high


def _grid(low: float, high: float, levels: int) -> tuple[float, int]:
    """The step of [low, high], and how many steps 0 lies above its start."""
    step = max((high - low) / (levels - 1), math.ldexp(1.0, -149))
    return step, round(-low / step)


def _rounded(
    values: NDArray[np.float64], low: float, high: float, levels: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The values as `levels` steps of [low, high] give them back, and the steps, with 0 exact."""
    step, zero = _grid(low, high, levels)
    steps = np.clip(np.rint(values / step) + zero, 0, levels - 1)
    return (steps - zero) * step, steps.astype(np.int64)

"""A histogram in fixed memory, of values whose range is not known before the last of them is seen.

Bins are as wide as a power of two and begin at multiples of that.  When a value lies outside, the
width doubles and neighbours become one, exactly: what the histogram holds in the end depends
neither on the order in which values came nor on how they were cut into batches.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINS", "Histogram"]

BINS = 4096
"""16 for each of 256 steps; half of them may be empty, for the width is a power of two."""

_SMALLEST_EXPONENT = -126
"""2**-126 is the smallest normal float32: narrower bins would tell apart what float32 does not."""


class Histogram:
    """Counts of finite values, and always of the range around them that holds 0.

    Attributes:
        counts: [BINS], how many values each bin got.
        width: Of one bin, a power of two.
        first: Bin i holds [(first + i) * width, (first + i + 1) * width).
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.width = math.ldexp(1.0, _SMALLEST_EXPONENT)
        self.first = 0

    def add(self, values: NDArray[Any]) -> None:
        """Count the values of an array of any shape; all must be finite."""
        if not values.size:
            return
        self._widen(min(float(values.min()), 0.0), max(float(values.max()), 0.0))
        # Multiplied by a power of two float32 rounds nothing, unless that makes it too small.
        exact = np.dtype(np.float32 if self.width <= 1 else np.float64)
        bins = np.multiply(values.reshape(-1), 1 / self.width, dtype=exact)
        np.floor(bins, out=bins)
        bins -= self.first
        self.counts += np.bincount(bins.astype(np.int64), minlength=BINS)

    @property
    def centers(self) -> NDArray[np.float64]:
        """[BINS], the middle of each bin."""
        bins = np.arange(self.first, self.first + BINS, dtype=np.float64)
        return (bins + 0.5) * self.width

    def _widen(self, low: float, high: float) -> None:
        """Make bins hold [low, high] too, in the narrowest width that does."""
        last = self.first + BINS - 1
        if self.first <= math.floor(low / self.width) and math.floor(high / self.width) <= last:
            return
        held = np.flatnonzero(self.counts)
        if held.size:
            low = min(low, (self.first + int(held[0])) * self.width)
            high = max(high, (self.first + int(held[-1])) * self.width)
        doublings, width = 0, self.width
        while math.floor(high / width) - math.floor(low / width) >= BINS:
            doublings, width = doublings + 1, width * 2
        first = math.floor(low / width)
        counts = np.zeros(BINS, np.int64)
        np.add.at(counts, ((held + self.first) >> doublings) - first, self.counts[held])
        self.counts, self.width, self.first = counts, width, first

"""Where to cut off the range of a tensor before it is divided into steps.

A narrower range has finer steps and cuts off more; each method finds its own balance:

min-max          everything that was seen
moving-average   the average over samples of their ends, later ones weighing more
percentile       all but the outermost of a hundred parts on either side
entropy          the least loss of information (KL divergence), see `range_search`
mse              the least mean squared error of the rounded values, see there too
sigma            so many standard deviations around the mean
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.histogram import Histogram
from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.range_search import Range, least_divergence, least_error

__all__ = ["METHODS", "Clipping", "Observed"]

_AT_ONCE = 1 << 15
"""Values to count together: one by one each call costs more than its values."""


class Observed:
    """What was seen of one tensor, in memory that does not grow.

    Attributes:
        low: The least value.
        high: The greatest.
        mean_low: Moving average of each sample's least value.
        mean_high: The same of its greatest.
    """

    def __init__(self, clipping: Clipping) -> None:
        self.low, self.high = math.inf, -math.inf
        self.mean_low, self.mean_high = math.nan, math.nan
        self._clipping = clipping
        self._histogram = Histogram()
        self._waiting: list[NDArray[Any]] = []

    @property
    def histogram(self) -> Histogram:
        """Of a share of the values."""
        self._histogram.add(np.concatenate([np.zeros(0, np.float32), *self._waiting]))
        self._waiting.clear()
        return self._histogram

    def add(self, values: NDArray[Any], ends: Range) -> None:
        """Look at the tensor of one sample; an empty one tells nothing.

        Args:
            values: Those that the histogram counts, of any shape.
            ends: The least and the greatest of all; the wrong way round of an empty tensor.

        Raises:
            ValueError: NaN or infinity among the values.
        """
        low, high = ends
        if low > high:
            return
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN or Inf among the values")
        first = math.isinf(self.low)
        self.low, self.high = min(self.low, low), max(self.high, high)
        keep = 0.0 if first else self._clipping.momentum
        self.mean_low = low if first else keep * self.mean_low + (1 - keep) * low
        self.mean_high = high if first else keep * self.mean_high + (1 - keep) * high
        if self._clipping.counts:
            self._waiting.append(values.reshape(-1))
            if sum(part.size for part in self._waiting) >= _AT_ONCE:
                _ = self.histogram

    def range(self, levels: int = 256) -> Range:
        """The range to divide into `levels` steps; within what was seen, and it holds 0."""
        low, high = METHODS[self._clipping.method].cut(self, self._clipping.amount, levels)
        return max(min(low, 0.0), min(self.low, 0.0)), min(max(high, 0.0), max(self.high, 0.0))


def _min_max(seen: Observed, amount: float, levels: int) -> Range:
    return seen.low, seen.high


def _moving_average(seen: Observed, amount: float, levels: int) -> Range:
    return seen.mean_low, seen.mean_high


def _percentile(seen: Observed, amount: float, levels: int) -> Range:
    histogram = seen.histogram
    shares = np.cumsum(histogram.counts) / histogram.counts.sum()
    tail, edge = 1 - amount / 100, histogram.first
    low = int(np.searchsorted(shares, tail, side="right"))
    high = int(np.searchsorted(shares, 1 - tail, side="left"))
    return (edge + low) * histogram.width, (edge + high + 1) * histogram.width


def _sigma(seen: Observed, amount: float, levels: int) -> Range:
    histogram = seen.histogram
    counts, centers = histogram.counts, histogram.centers
    mean = float(np.average(centers, weights=counts))
    spread = math.sqrt(float(np.average((centers - mean) ** 2, weights=counts)))
    return mean - amount * spread, mean + amount * spread


def _mse(seen: Observed, amount: float, levels: int) -> Range:
    return least_error(seen.histogram, (seen.low, seen.high), levels)


def _entropy(seen: Observed, amount: float, levels: int) -> Range:
    return least_divergence(seen.histogram, (seen.low, seen.high), levels)


@dataclasses.dataclass(frozen=True)
class _Method:
    """One way to cut: its function, and the amount it takes.

    Attributes:
        cut: (what was seen, amount, levels) -> range.
        counts: Whether it needs a histogram.
        default: The amount if none is given; None for methods that take none.
        least: Amounts lie above this,
        most: and not above that.
    """

    cut: Callable[[Observed, float, int], Range]
    counts: bool = True
    default: float | None = None
    least: float = 0.0
    most: float = math.inf


METHODS = {
    "min-max": _Method(_min_max, counts=False),
    "moving-average": _Method(_moving_average, counts=False, default=0.9, most=0.999),
    "percentile": _Method(_percentile, default=99.99, least=50.0, most=100.0),
    "entropy": _Method(_entropy),
    "mse": _Method(_mse),
    "sigma": _Method(_sigma, default=6.0),
}
"""By the name that recipes use."""


@dataclasses.dataclass(frozen=True)
class Clipping:
    """A method and its amount: "percentile=99.9" as text.

    Attributes:
        method: One of `METHODS`.
        amount: Momentum, percentage or number of deviations; NaN for methods that take none.
    """

    method: str = "min-max"
    amount: float = math.nan

    def __post_init__(self) -> None:
        """Check both, and take the method's amount if none was given.

        Raises:
            OptionError: An unknown method, an amount for one that takes none, or out of its range.
        """
        if self.method not in METHODS:
            hint = did_you_mean(self.method, METHODS) or f"; one of {', '.join(METHODS)}"
            raise OptionError(f"unknown calibration method {self.method!r}{hint}")
        method = METHODS[self.method]
        if math.isnan(self.amount):
            object.__setattr__(self, "amount", method.default or math.nan)
        elif method.default is None:
            raise OptionError(f"calibration {self.method!r} takes no amount, not {self.amount:g}")
        elif not method.least < self.amount <= method.most or math.isinf(self.amount):
            top = f"at most {method.most:g}" if math.isfinite(method.most) else "finite"
            raise OptionError(
                f"calibration {self.method}={self.amount:g}: must be above {method.least:g} and "
                f"{top}"
            )

    @property
    def counts(self) -> bool:
        """Whether the method reads a histogram."""
        return METHODS[self.method].counts

    @property
    def momentum(self) -> float:
        """How much of a moving average each sample leaves as it was."""
        return self.amount if self.method == "moving-average" else 0.0

    @classmethod
    def parse(cls, text: str) -> Clipping:
        """Read "entropy" or "percentile=99.9".

        Raises:
            OptionError: Not of that form, or not a method.
        """
        if not isinstance(text, str):
            raise OptionError(f"calibration must be a text such as 'mse', not {text!r}")
        method, given, amount = text.partition("=")
        try:
            number = float(amount) if given else math.nan
        except ValueError:
            number = math.nan
        if given and math.isnan(number):
            raise OptionError(f"calibration {text!r}: {amount!r} is not a number")
        return cls(method.strip(), number)

    def __str__(self) -> str:
        return self.method if math.isnan(self.amount) else f"{self.method}={self.amount:g}"

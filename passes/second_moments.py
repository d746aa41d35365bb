"""What a product's activations are like, as far as rounding its weight has to know.

    H = E[x xT]   [K, K]      m = E[|x|]   [K]

With W rounded to W', the mean square error of a row of the result is the trace of (W - W')T H
(W - W'): H is half the Hessian of GPTQ (Frantar et al., 2022).  Samples are added one by one, so
that only H and one sample are in memory.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.errors import CalibrationError, OptionError, QCompilerError
from qcompiler.ir.on_disk import let_go
from qcompiler.passes.rounded_weight import Layer, finite_weight

__all__ = ["LayerRuns", "Moments", "Progress", "Walk", "Walker"]

T = TypeVar("T")

Rows = NDArray[np.float32]

_BLOCK = 128
"""Rows of a matrix that are looked at together: no copy of all, and they stay in the cache."""

_TOO_LARGE = 1e16
"""Sums of a million squares are float32, their products with weights too."""


class Walk(Protocol):
    """Runs a model on samples, in the order of its nodes, as far as it is asked to.

    Attributes:
        digest: Hash of the model, of the samples, and of what runs them.
    """

    @property
    def digest(self) -> str: ...  # noqa: D102

    def rows(self, value: ir.Value) -> Iterable[tuple[str, Rows]]:
        """What messages call each sample, and the rows [tokens, K] that `value` has on it.

        Values are asked for in the order in which they were announced; some may be left out.  What
        lies before them is run as the model is when they are asked for.
        """

    def __enter__(self) -> Walk: ...
    def __exit__(
        self,
        type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Walker(Protocol):
    """Starts a walk that will stop at some values, in graph order."""

    def __call__(self, model: ir.Model, stops: list[ir.Value]) -> Walk:
        """Start it."""


@dataclasses.dataclass(frozen=True)
class LayerRuns:
    """What passes need that look at layers one by one.

    Attributes:
        walk: Runs the model; None if there are no samples.
        executor: Where layers that read the same activations are treated, side by side.
        tell: Hears what was done, which share of all that is, and how many seconds the rest will
            take; 0 where that is not known.
    """

    walk: Walker | None = None
    executor: concurrent.futures.Executor | None = None
    tell: Callable[[str, float, float], None] | None = None

    def progress(self, count: int = 1) -> Progress:
        """Starts the clock: what to tell of each of so many things from now on."""
        return Progress(self.tell or (lambda text, share, left: None), count)

    def walker_for(self, layers: Sequence[Layer], does: str) -> Walker:
        """What runs the model to see what goes into layers.

        Args:
            layers: At least one.
            does: Who does what to them, for messages: "gptq rounds".

        Raises:
            CalibrationError: There are no samples.
            ModelError: A weight holds NaN or Inf.
        """
        for layer in layers:
            finite_weight(layer.nodes[0], layer.weight)
            let_go(layer.weight)
        if self.walk is None:
            raise CalibrationError(
                f"{does} {layers[0].name} and {len(layers) - 1} more by what goes into them: "
                "give samples with --calib DIR (calibration=...), or choose weights that need none"
            )
        return self.walk

    def map(self, function: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
        """What the function makes of each, in order.

        Raises:
            OptionError: The executor is shut down, or fails.
        """
        if self.executor is None:
            return list(map(function, *arguments))
        try:
            return list(self.executor.map(function, *arguments))
        except (QCompilerError, MemoryError):
            raise
        except Exception as error:
            # Those of clusters raise types of their own.
            raise OptionError(
                f"the executor fails: {type(error).__name__}: {error}; give one that is not shut "
                "down, whose workers can import qcompiler, or leave it out"
            ) from error


class Progress:
    """Tells of one layer after the other, and how long the rest will take at that rate."""

    def __init__(self, tell: Callable[[str, float, float], None], count: int) -> None:
        """Start the clock; for `tell` see `LayerRuns`."""
        self._tell, self._count = tell, count
        self._since, self._kept = time.perf_counter(), 0.0

    def __call__(self, text: str, done: float, *, kept: bool = False) -> None:
        """Say what was done, and how much is done now; what was kept took no time."""
        if kept:
            self._since, self._kept = time.perf_counter(), done
        new, left = done - self._kept, 0.0
        if new > 0:
            left = (time.perf_counter() - self._since) * (self._count - done) / new
        self._tell(text, done / self._count, left)


class Moments:
    """The moments of the rows seen so far.

    Attributes:
        second: E[x xT], [K, K].
        magnitude: E[|x|], [K].
        count: Rows; none where no sample reaches the tensor, as an expert that no token is for.
    """

    def __init__(self, depth: int) -> None:
        self.second = np.zeros((depth, depth), np.float32)
        self.magnitude = np.zeros(depth, np.float32)
        self.count = 0
        # Of the samples: how many, their sizes squared, their squared correlations times sizes.
        self._samples, self._squared_sizes, self._correlated = 0, 0, 0.0

    @classmethod
    def of(cls, runs: Iterable[tuple[str, Rows]], depth: int, name: str) -> Moments:
        """The moments of all rows of all samples.

        Args:
            runs: What messages call each sample, and its rows.
            depth: K.
            name: The tensor, for messages.

        Raises:
            CalibrationError: A row is NaN, Inf or too large to square.
        """
        moments = cls(depth)
        for label, rows in runs:
            largest = float(np.abs(rows).max(initial=0))
            if not largest < _TOO_LARGE:  # NaN is not less either
                finite = math.isfinite(largest)
                said = f"{largest:.0e}, too large to square" if finite else "NaN or Inf"
                raise CalibrationError(
                    f"{label}: tensor {name!r} becomes {said}; repair or remove the sample"
                )
            moments.add(rows)
        return moments

    def add(self, rows: Rows) -> None:
        """Count rows, [tokens, K], in."""
        if not len(rows):
            return
        self.count += len(rows)
        share = np.float32(len(rows) / self.count)
        product = rows.T @ rows
        self._samples += 1
        self._squared_sizes += len(rows) ** 2
        self._correlated += len(rows) * _squared_correlations(product)
        product *= share / np.float32(len(rows))
        self.second *= 1 - share
        self.second += product
        self.magnitude *= 1 - share
        self.magnitude += np.abs(rows).mean(axis=0, dtype=np.float32) * share

    def chance(self) -> float:
        """Which share of what inputs have in common is chance of the samples, from 0 to 1.

        The variance of the correlations r over the sum of their squares, by which to shrink them
        for the least squared error (Schaefer and Strimmer, 2005).  It is that of independent rows,
        (1 - r^2) / n, and what single samples are farther from each other than that makes them:
        the rows of one sample are no independent draws.
        """
        alive = int(np.count_nonzero(np.diag(self.second) > 0))
        common = _squared_correlations(self.second)
        if not common > 0:
            return 0.0
        of_rows = (alive * (alive - 1) - common) / self.count
        beyond = self._correlated / self.count - common - (self._samples - 1) * of_rows
        # As many samples of one size; of fewer than two nothing is to be learned about others.
        alike = self.count**2 / self._squared_sizes
        variance = of_rows + max(beyond, 0.0) / max(alike - 1, 1.0)
        return float(np.clip(variance / common, 0, 1))

    def error(self, difference: Rows) -> float:
        """Mean square error of a row of the result, summed over it, for W - W', [K, N]."""
        return float(np.vdot(difference, self.second @ difference))


def _squared_correlations(moments: Rows) -> float:
    """The sum of r^2 off the diagonal of second moments, [K, K]: a block of rows at a time."""
    power, total = np.diag(moments), 0.0
    weights = np.zeros(len(moments), np.float32)
    np.divide(1, np.sqrt(power), out=weights, where=power > 0)
    for start in range(0, len(moments), _BLOCK):
        rows = slice(start, start + _BLOCK)
        part = moments[rows] * weights
        part *= weights[rows, None]
        total += float(np.vdot(part, part))
    return max(total - np.count_nonzero(power > 0), 0.0)

"""How far one output is from what it should be, summed up sample by sample.

SQNR    10 log10(sum of model^2 / sum of (model - bundle)^2), in dB
cosine  of all values of all samples as one vector
top-1   how often the largest of C scores is the same one
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Accuracy", "ErrorSums", "OutputError"]

_FEWEST_CLASSES = 100
_FEATURES = ("hidden", "state", "embed", "feature")
"""A 3-D output has class scores if its last axis is longer, and its name says nothing else."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Share of samples whose largest score is the labelled one, before and after."""

    model: float
    bundle: float


@dataclasses.dataclass(frozen=True)
class OutputError:
    """One output over all samples.

    Attributes:
        name: Output name.
        values: Numbers compared.
        sqnr: In dB; None where both sides are equal, bit for bit.
        cosine: Of all values as one vector; None where a side is all zero.
        max_error: Largest absolute difference.
        not_finite: NaN and Inf of the bundle where the model has a number; left out of the rest.
        rows: Rows of scores compared, 0 if this does not look like class scores.
        top1: Share of rows whose largest score is in the same place.
        accuracy: Against labels, if there are any.
        resized: Samples on which the bundle makes another size of it, as values decide how many
            boxes there are; left out of the rest. If it is all of them, SQNR is -300 dB.
    """

    name: str
    values: int
    sqnr: float | None
    cosine: float | None
    max_error: float
    not_finite: int
    rows: int = 0
    top1: float | None = None
    accuracy: Accuracy | None = None
    resized: int = 0


@dataclasses.dataclass
class ErrorSums:
    """What has to be remembered of one output, however many samples there are.

    `scored` is the shape of what the last sample has class scores for, empty if for nothing.
    """

    name: str
    values: int = 0
    not_finite: int = 0
    resized: int = 0
    signal: float = 0.0
    other: float = 0.0
    product: float = 0.0
    noise: float = 0.0
    max_error: float = 0.0
    rows: int = 0
    scored: tuple[int, ...] = ()
    agreeing: int = 0
    labelled: int = 0
    right: tuple[int, int] = (0, 0)

    def add(
        self,
        expected: NDArray[Any],
        actual: NDArray[Any],
        truth: NDArray[Any] | None,
    ) -> None:
        """Add one sample."""
        if expected.dtype.kind not in "fiub":
            return
        if expected.shape != actual.shape:
            self.resized += 1
            return
        if expected.dtype.kind == "f" and _holds_scores(self.name, expected.shape):
            self._add_scores(expected, actual, truth)
        a, b = expected.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
        finite = np.isfinite(a) & np.isfinite(b)
        self.not_finite += int((np.isfinite(a) & ~np.isfinite(b)).sum())
        a, b = a[finite], b[finite]
        if not a.size:
            return
        self.values += a.size
        self.signal += float(a @ a)
        self.other += float(b @ b)
        self.product += float(a @ b)
        self.noise += float((a - b) @ (a - b))
        self.max_error = max(self.max_error, float(np.abs(a - b).max()))

    def _add_scores(
        self,
        expected: NDArray[Any],
        actual: NDArray[Any],
        truth: NDArray[Any] | None,
    ) -> None:
        before, after = expected.argmax(axis=-1), actual.argmax(axis=-1)
        self.rows += before.size
        self.scored = before.shape
        self.agreeing += int((before == after).sum())
        if truth is None or truth.shape != before.shape:
            return  # the labels are another output's
        self.labelled += truth.size
        hits = int((before == truth).sum()), int((after == truth).sum())
        self.right = self.right[0] + hits[0], self.right[1] + hits[1]

    def result(self) -> OutputError:
        """The sums as figures."""
        norms = math.sqrt(self.signal) * math.sqrt(self.other)
        equal = self.noise == 0.0 and not self.not_finite and not self.resized
        sqnr = _decibels(self.signal, self.noise) if self.values else -300.0
        accuracy = None
        if self.labelled:
            accuracy = Accuracy(*(hits / self.labelled for hits in self.right))
        return OutputError(
            name=self.name,
            values=self.values,
            sqnr=None if equal else sqnr,
            cosine=self.product / norms if norms else None,
            max_error=self.max_error,
            not_finite=self.not_finite,
            rows=self.rows,
            top1=self.agreeing / self.rows if self.rows else None,
            accuracy=accuracy,
            resized=self.resized,
        )


def _holds_scores(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the last axis looks like classes: of [N, classes], or of [batch, steps, classes]."""
    if 0 in shape or shape[-1:] == (1,):
        return False
    if len(shape) != 3:
        return len(shape) == 2
    if "logit" in name.lower():
        return True
    hidden = any(word in name.lower() for word in _FEATURES)
    return shape[-1] > _FEWEST_CLASSES and not hidden


def _decibels(signal: float, noise: float) -> float:
    # JSON has no infinity; float64 sums cannot tell more than 300 dB apart anyway.
    if not signal or not noise:
        return -300.0 if noise else 300.0
    return min(max(10 * math.log10(signal / noise), -300.0), 300.0)

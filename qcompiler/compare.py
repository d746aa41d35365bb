"""Compare: how far a bundle's answers are from its model's, over samples.

    SQNR    10 log10(sum of model^2 / sum of (model - bundle)^2), in dB
    cosine  of all values of all samples as one vector
    top-1   how often the largest of C scores is the same one

A task metric hides damage, so these stand beside it, never behind it.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.bench import open_model
from qcompiler.calibrate import Samples, check_sample
from qcompiler.ir.errors import BundleError, CalibrationError, ModelError, OptionError

__all__ = ["Accuracy", "Comparison", "OutputError", "compare"]


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


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All outputs over all samples."""

    model: Path
    bundle: Path
    native: bool
    samples: int
    outputs: tuple[OutputError, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        content = dataclasses.asdict(self)
        return content | {"bundle": str(self.bundle), "model": str(self.model)}


def compare(
    model: Path,
    bundle: Path,
    data: str | os.PathLike[str],
    *,
    labels: str | None = None,
    native: bool = True,
    progress: Callable[[str, float, int], None] | None = None,
) -> Comparison:
    """Run both on every sample and sum up the differences.

    Args:
        model: An ONNX file, or a bundle to compare with.
        bundle: A bundle, or any ONNX file.
        data: Folder of `.npz` samples.
        labels: Array of the samples with the right class of each row.
        native: Use the bundle's kernels; False runs its functions' bodies.
        progress: Told ("sample", done, total).

    Raises:
        CalibrationError: A sample that does not fit, or has no labels of that name.
        OptionError: Labels were given, and no output looks like class scores.
        ModelError: A side cannot be loaded or fails.
        BundleError: The bundle is incomplete, altered, or has other outputs than the model.
    """
    samples = Samples(data)
    first, second = open_model(model), open_model(bundle, native=native)
    names = [output.name for output in first.get_outputs()]
    missing = set(names) - {output.name for output in second.get_outputs()}
    if missing:
        raise BundleError(f"{bundle} is not of {model}: it has no output {sorted(missing)}")
    sums = {name: _Sums() for name in names}
    for index, (file, sample) in enumerate(samples):
        feed = check_sample(file, sample, first.get_inputs())
        truth = None if labels is None else _labels_of(file, sample, labels)
        pairs = zip(names, _run(first, names, feed, model, file),
                    _run(second, names, feed, bundle, file), strict=True)  # fmt: skip
        for name, expected, actual in pairs:
            if np.shape(expected) != np.shape(actual):
                raise BundleError(
                    f"{file}: output {name!r} has shape {list(np.shape(actual))} in {bundle}, "
                    f"{list(np.shape(expected))} in {model}"
                )
            sums[name].add(np.asarray(expected), np.asarray(actual), truth, file)
        if progress is not None:
            progress("sample", index + 1, len(samples))
    outputs = tuple(total.result(name) for name, total in sums.items())
    if labels is not None and all(output.accuracy is None for output in outputs):
        raise OptionError(f"labels {labels!r}: no output is a 2-D float of [N, classes]")
    return Comparison(model, bundle, native, len(samples), outputs)


@dataclasses.dataclass
class _Sums:
    """What has to be remembered of one output, however many samples there are."""

    values: int = 0
    not_finite: int = 0
    signal: float = 0.0
    other: float = 0.0
    product: float = 0.0
    noise: float = 0.0
    max_error: float = 0.0
    rows: int = 0
    agreeing: int = 0
    labelled: int = 0
    right: tuple[int, int] = (0, 0)

    def add(
        self,
        expected: NDArray[Any],
        actual: NDArray[Any],
        truth: NDArray[Any] | None,
        file: str,
    ) -> None:
        """Add one sample."""
        if expected.dtype.kind not in "fiub":
            return
        if expected.dtype.kind == "f" and expected.ndim == 2 and expected.shape[1] > 1:
            self._add_scores(expected, actual, truth, file)
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
        file: str,
    ) -> None:
        before, after = expected.argmax(axis=1), actual.argmax(axis=1)
        self.rows += len(before)
        self.agreeing += int((before == after).sum())
        if truth is None:
            return
        if truth.shape != before.shape:
            raise CalibrationError(
                f"{file}: the labels have shape {list(truth.shape)}, there are {len(before)} rows"
            )
        self.labelled += len(truth)
        hits = int((before == truth).sum()), int((after == truth).sum())
        self.right = self.right[0] + hits[0], self.right[1] + hits[1]

    def result(self, name: str) -> OutputError:
        """The sums as figures."""
        norms = math.sqrt(self.signal) * math.sqrt(self.other)
        equal = self.noise == 0.0 and not self.not_finite
        accuracy = None
        if self.labelled:
            accuracy = Accuracy(*(hits / self.labelled for hits in self.right))
        return OutputError(
            name=name,
            values=self.values,
            sqnr=None if equal else _decibels(self.signal, self.noise),
            cosine=self.product / norms if norms else None,
            max_error=self.max_error,
            not_finite=self.not_finite,
            rows=self.rows,
            top1=self.agreeing / self.rows if self.rows else None,
            accuracy=accuracy,
        )


def _decibels(signal: float, noise: float) -> float:
    # JSON has no infinity; float64 sums cannot tell more than 300 dB apart anyway.
    if not signal or not noise:
        return -300.0 if noise else 300.0
    return min(max(10 * math.log10(signal / noise), -300.0), 300.0)


def _labels_of(file: str, sample: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    if name not in sample:
        raise CalibrationError(f"{file} has no array {name!r} of labels; it has {sorted(sample)}")
    labels = sample[name]
    if labels.dtype.kind not in "iu":
        raise CalibrationError(f"{file}: labels {name!r} are {labels.dtype}, not integers")
    return labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _run(
    session: Any, names: Sequence[str], feed: dict[str, NDArray[Any]], path: Path, file: str
) -> Sequence[Any]:
    try:
        outputs: Sequence[Any] = session.run(names, feed)
    except Exception as error:
        # ORT raises bare RuntimeErrors as well as its own types.
        raise ModelError(f"{path} fails on {file}: {error}") from error
    return outputs

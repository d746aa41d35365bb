"""Compare: how far a bundle's answers are from its model's, over samples.

A task metric hides damage, so these stand beside it, never behind it.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.bundle import MANIFEST
from qcompiler.exact_copy import save_exact
from qcompiler.frontend import onnx_file
from qcompiler.ir.errors import (
    BundleError,
    CalibrationError,
    ModelError,
    OptionError,
    said_by_ort,
)
from qcompiler.metric import Metric, MetricValues, find_metric, measure
from qcompiler.node_errors import NodeError, node_errors, worst_first
from qcompiler.output_error import Accuracy, ErrorSums, OutputError
from qcompiler.passes.shift_weights import ShiftWeights
from qcompiler.runtime import open_model, open_session
from qcompiler.samples import Samples, Source, check_sample, samples_from

__all__ = ["Accuracy", "Comparison", "OutputError", "compare"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All outputs over all samples."""

    model: Path
    bundle: Path
    native: bool
    samples: int
    outputs: tuple[OutputError, ...]
    nodes: tuple[NodeError, ...] = ()
    metric: MetricValues | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; nodes in the graph's order, and the names of the worst first."""
        content = dataclasses.asdict(self)
        for entry, node in zip(content["nodes"], self.nodes, strict=True):
            entry |= {"can_stay_float": node.can_stay_float, "remedy": node.remedy}
        if self.metric is not None:  # JSON has no NaN
            content["metric"] |= {k: _finite(getattr(self.metric, k)) for k in ("model", "bundle")}
        worst = [node.node for node in worst_first(self.nodes)]
        return content | {"bundle": str(self.bundle), "model": str(self.model), "worst": worst}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare(
    model: Path,
    bundle: Path,
    data: Source | Samples,
    *,
    labels: str | None = None,
    native: bool = True,
    nodes: bool = False,
    metric: Metric | str | None = None,
    progress: Callable[[str, float, int], None] | None = None,
) -> Comparison:
    """Run both on every sample and sum up the differences.

    Args:
        model: An ONNX file or a `.pt2`, or a bundle to compare with.  Of a quantized one, what it
            means counts: its integer sums are exact here, on every processor.
        bundle: A bundle, or any ONNX file, run as ONNX Runtime runs it.
        data: Samples for both.
        labels: Array of the samples with the right class of each row.
        native: Use the bundle's kernels; False runs its functions' bodies.
        nodes: Look inside, too, see `node_errors`.
        metric: A function of your own, or "module:function": it is given something that runs a
            side, {input: array} -> {output: array}, and the samples, and returns a number.
        progress: Told (what is run, samples done, samples in all).

    Raises:
        CalibrationError: A sample that does not fit, or has no labels of that name.
        OptionError: Labels were given, and no output looks like class scores; or the metric fails.
        ModelError: A side cannot be loaded or fails.
        BundleError: The bundle is incomplete, altered, or has other outputs than the model.
    """
    samples = samples_from(data)
    merit = None if metric is None else find_metric(metric)
    with onnx_file(model) as source:
        sides = _Sides(model, bundle, _open_exact(source), open_model(bundle, native=native))
        sides.check()
        inside = list[NodeError]()
        if nodes:
            inside = node_errors(source, bundle, samples, native=native, progress=progress)
    outputs = sides.outputs(samples, labels, progress)
    if labels is not None and all(output.accuracy is None for output in outputs):
        raise OptionError(
            f"labels {labels!r}: no output is a float of [N, classes] with a row per label"
        )
    values = None
    if merit is not None:
        before, after = (measure(*merit, side, samples) for side in (sides.first, sides.second))
        values = MetricValues(merit[0], before, after)
    return Comparison(model, bundle, native, len(samples), outputs, tuple(inside), values)


@dataclasses.dataclass(frozen=True)
class _Sides:
    """What is compared: the model's session first, then the bundle's."""

    model: Path
    bundle: Path
    first: Any
    second: Any

    def check(self) -> None:
        """Refuse a bundle that lacks an output."""
        names = {output.name for output in self.first.get_outputs()}
        missing = names - {output.name for output in self.second.get_outputs()}
        if missing:
            raise BundleError(
                f"{self.bundle} is not of {self.model}: it has no output {sorted(missing)}"
            )

    def outputs(
        self,
        samples: Samples,
        labels: str | None,
        progress: Callable[[str, float, int], None] | None,
    ) -> tuple[OutputError, ...]:
        """Run both on every sample."""
        sums = {output.name: ErrorSums(output.name) for output in self.first.get_outputs()}
        for index, (file, sample) in enumerate(samples):
            feed = check_sample(file, sample, self.first.get_inputs())
            truth = None if labels is None else _labels_of(file, sample, labels)
            for name, (expected, actual) in self._run(file, feed).items():
                sums[name].add(expected, actual, truth)
            if truth is not None:
                _check_rows(file, truth, sums.values())
            if progress is not None:
                progress("the outputs", index + 1, len(samples))
        return tuple(total.result() for total in sums.values())

    def _run(
        self, file: str, feed: dict[str, NDArray[Any]]
    ) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        """What either side makes of one sample, by the name of the output."""
        outputs = self.first.get_outputs()
        names = [output.name for output in outputs]
        before = _run(self.first, names, feed, self.model, file)
        after = _run(self.second, names, feed, self.bundle, file)
        for output, expected, actual in zip(outputs, before, after, strict=True):
            if not _may_differ(np.shape(expected), np.shape(actual), output.shape or ()):
                raise BundleError(
                    f"{file}: output {output.name!r} has shape {list(np.shape(actual))} in "
                    f"{self.bundle}, {list(np.shape(expected))} in {self.model}"
                )
        pairs = zip(map(np.asarray, before), map(np.asarray, after), strict=True)
        return dict(zip(names, pairs, strict=True))


def _open_exact(source: Path) -> Any:
    """A session of the model; its integer sums are exact if it has weights of int8."""
    try:
        model = None if source.is_dir() or source.name == MANIFEST else ir.load(source)
    except Exception:
        model = None  # opening it says what is wrong
    if model is None or not ShiftWeights()(model.clone()).modified:
        return open_model(source)
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        file = Path(folder) / "model.onnx"
        disabled = save_exact(model, file)
        return open_session(file, disabled=disabled)


def _may_differ(
    expected: tuple[int, ...], actual: tuple[int, ...], declared: Sequence[int | str | None]
) -> bool:
    """Whether both shapes may be of one output: where sizes differ it must have said none."""
    open_sizes = declared or [None] * len(expected)
    return len(expected) == len(actual) and all(
        size == other or not isinstance(known, int)
        for size, other, known in zip(expected, actual, open_sizes, strict=False)
    )


def _check_rows(file: str, truth: NDArray[Any], sums: Iterable[ErrorSums]) -> None:
    """Refuse labels that are nobody's, unless no output has scores at all (said at the end)."""
    scored = [list(total.scored) for total in sums if total.scored]
    if scored and list(truth.shape) not in scored:
        raise CalibrationError(
            f"{file}: the labels have shape {list(truth.shape)}, there are scores for {scored[0]}"
        )


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
        raise ModelError(f"{path} fails on {file}: {said_by_ort(error)}") from error
    return outputs

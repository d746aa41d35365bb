"""A figure of merit of the user's own, of a model and of its bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from qcompiler.ir.errors import OptionError
from qcompiler.sample_function import find_function
from qcompiler.samples import Sample, Samples, check_sample

__all__ = ["Metric", "MetricValues", "Run", "find_metric", "measure"]

Run = Callable[[Sample], Sample]
"""Runs a side: {input: array} -> {output: array}."""

Metric = Callable[[Run, Iterable[tuple[str, Sample]]], float]
"""Given a side and the samples (pairs of a name and arrays by input), its figure of merit."""


@dataclasses.dataclass(frozen=True)
class MetricValues:
    """What the metric says of either side."""

    name: str
    model: float
    bundle: float


class _Named:
    """Samples whose arrays bear the names of a model's inputs, besides names of their own."""

    def __init__(self, samples: Samples, inputs: Sequence[Any]) -> None:
        self._samples, self._inputs = samples, inputs

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[tuple[str, Sample]]:
        for name, sample in self._samples:
            yield name, sample | check_sample(name, sample, self._inputs)


def find_metric(metric: Metric | str) -> tuple[str, Metric]:
    """A metric, and what to call it.

    Raises:
        OptionError: "module:function" does not name a function.
    """
    if callable(metric):
        return getattr(metric, "__name__", "metric"), metric
    found: Any = find_function(metric)
    if found is None:
        raise OptionError(f"metric {metric!r} is not module:function")
    return metric, found


def measure(name: str, metric: Metric, session: Any, samples: Samples) -> float:
    """What a metric says of a session.

    Raises:
        OptionError: The metric fails, or returns something that is no number.
    """
    names = [output.name for output in session.get_outputs()]
    inputs = session.get_inputs()

    def run(sample: Sample) -> Sample:
        if not isinstance(sample, Mapping):
            raise TypeError(
                f"run takes the arrays of a sample, not {type(sample).__name__}: "
                "for name, arrays in samples: run(arrays)"
            )
        feed = {i.name: sample[i.name] for i in inputs if i.name in sample}
        return dict(zip(names, session.run(names, feed), strict=True))

    try:
        return float(metric(run, _Named(samples, inputs)))
    except (Exception, SystemExit) as error:
        # It is the user's code: anything may come out of it.
        raise OptionError(f"metric {name} fails: {type(error).__name__}: {error}") from error

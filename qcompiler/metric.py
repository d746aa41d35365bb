"""A figure of merit of the user's own, of a model and of its bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from qcompiler.ir.errors import OptionError
from qcompiler.sample_function import find_function
from qcompiler.samples import Sample, Samples

__all__ = ["Metric", "MetricValues", "Run", "find_metric", "measure"]

Run = Callable[[Sample], Sample]
"""Runs a side: {input: array} -> {output: array}."""

Metric = Callable[[Run, Samples], float]
"""Given a side and the samples (pairs of a name and arrays by input), its figure of merit."""


@dataclasses.dataclass(frozen=True)
class MetricValues:
    """What the metric says of either side."""

    name: str
    model: float
    bundle: float


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

    def run(sample: Sample) -> Sample:
        return dict(zip(names, session.run(names, sample), strict=True))

    try:
        return float(metric(run, samples))
    except Exception as error:
        # It is the user's code: anything may come out of it.
        raise OptionError(f"metric {name} fails: {type(error).__name__}: {error}") from error

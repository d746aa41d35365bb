"""Bench: time two models against each other, in turn, in one process.

Runs alternate, model then bundle and next time the other way round, so that clock drift and
neighbours meet both alike.  Each session has threads of its own; the ones of the session that just
ran are told to stop spinning, or they would hold the cores while the other runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qcompiler.cores import available_cores, busy_cores
from qcompiler.frontend import onnx_file
from qcompiler.installed import import_onnxruntime
from qcompiler.ir.errors import ModelError, OptionError, said_by_ort
from qcompiler.random_inputs import SMALLEST_VOCABULARY, Feed, InputShape, random_feed
from qcompiler.runtime import open_model
from qcompiler.samples import Samples, Source, check_sample, samples_from
from qcompiler.session_options import QUIET
from qcompiler.vocabularies import vocabularies_of_file

__all__ = ["Bench", "Result", "Timing", "bench"]

_WARM_UP_RUNS = 3
_FEWEST_ROUNDS = 5
_SAMPLES_IN_MEMORY = 32
_SPINNING = "on during a run, stopped after it (session.force_spinning_stop)"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one run: the middle and the fastest of all."""

    median: float
    minimum: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What one number of threads gave.

    Attributes:
        threads: Threads inside one op, for either side.
        rounds: Runs of each side.
        model: The side compared against.
        bundle: The side in question.
        speedup: Median of the model over that of the bundle: above 1 the bundle is faster.
        speedup_of_minima: The same of the fastest runs.
        spread: First and last quartile of the ratio, over rounds.
    """

    threads: int
    rounds: int
    model: Timing
    bundle: Timing
    speedup: float
    speedup_of_minima: float
    spread: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Bench:
    """A finished measurement.

    Attributes:
        bundle: Path of the side in question.
        model: Path of the side compared against.
        providers: Execution providers of both.
        inputs: What was fed; of the first sample where there are several.
        samples: Number of different samples, 0 for random values.
        spinning: What ORT's idle threads did.
        cores: Cores this process may use.
        load: How many of them others kept busy just before; None where that is not known.
        results: One per number of threads.
    """

    bundle: Path
    model: Path
    providers: tuple[str, ...]
    inputs: tuple[InputShape, ...]
    samples: int
    spinning: str
    cores: int
    load: float | None
    results: tuple[Result, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; times in seconds."""
        content = dataclasses.asdict(self)
        return content | {"bundle": str(self.bundle), "model": str(self.model)}


def bench(
    bundle: Path,
    model: Path,
    *,
    threads: Sequence[int] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    data: Source | Samples | None = None,
    seconds: float = 5.0,
    progress: Callable[[str, float, int], None] | None = None,
) -> Bench:
    """Time `bundle` against `model`.

    Args:
        bundle: A bundle, or any ONNX file.
        model: An ONNX file or a `.pt2`, or another bundle.
        threads: Numbers of threads to try; by default one, and all cores.
        shapes: Shapes of random inputs; dynamic dimensions left open get a default.
        data: Samples to feed instead of random values.
        seconds: Time to measure for, per number of threads.
        progress: Told (threads, percent done, 100).

    Raises:
        OptionError: `seconds` or `threads` out of range, an unknown input, a shape that does not
            fit.
        CalibrationError: A sample that does not fit.
        ModelError: A side cannot be loaded or fails.
        BundleError: The bundle is incomplete or altered.
    """
    if not 0 < seconds < math.inf:
        raise OptionError(f"seconds must be above 0 and finite, not {seconds}")
    counts = list(dict.fromkeys(threads or (1, available_cores())))
    load = busy_cores()
    results: list[Result] = []
    with onnx_file(model) as source:
        for index, count in enumerate(counts):
            first, second = _sessions(source, bundle, count)
            if index == 0:
                feeds, fed = _feeds(source, first.get_inputs(), shapes or {}, data)
            step = _percent(progress, count, index, len(counts))
            with _explained([] if data is not None else fed):
                results.append(_measure(first, second, feeds, count, seconds, step))
    return Bench(
        bundle, model, tuple(second.get_providers()), tuple(fed),
        0 if data is None else len(feeds), _SPINNING, available_cores(), load, tuple(results),
    )  # fmt: skip


def _sessions(model: Path, bundle: Path, threads: int) -> tuple[Any, Any]:
    """Both sides alike, with the providers that the bundle chooses."""

    def options() -> Any:
        options = import_onnxruntime().SessionOptions()
        options.log_severity_level = QUIET
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return options

    second = open_model(bundle, threads=threads, options=options())
    first = open_model(model, threads=threads, options=options(), providers=second.get_providers())
    names = [sorted(value.name for value in session.get_inputs()) for session in (first, second)]
    if names[0] != names[1]:
        raise OptionError(f"not the same model: one takes {names[0]}, the other {names[1]}")
    return first, second


def _percent(
    progress: Callable[[str, float, int], None] | None, threads: int, index: int, count: int
) -> Callable[[float], None]:
    """From the share done of one measurement to the percent done of all."""
    if progress is None:
        return lambda share: None
    label = f"{threads} thread{'s' if threads > 1 else ''}"
    return lambda share: progress(label, round(100 * (index + share) / count), 100)


def _feeds(
    model: Path,
    inputs: Sequence[Any],
    shapes: Mapping[str, tuple[int, ...]],
    data: Source | Samples | None,
) -> tuple[list[Feed], list[InputShape]]:  # fmt: skip
    if data is None:
        integers = any("int" in expected.type for expected in inputs)
        sizes = vocabularies_of_file(model) if integers else {}
        limits = {name: min(size, SMALLEST_VOCABULARY) for name, size in sizes.items()}
        feed, fed = random_feed(inputs, shapes, limits)
        return [feed], fed
    if shapes:
        raise OptionError("give shapes or data, not both: samples have shapes of their own")
    files = itertools.islice(samples_from(data), _SAMPLES_IN_MEMORY)
    feeds = [check_sample(name, sample, inputs) for name, sample in files]
    fed = [InputShape(k, str(v.dtype), v.shape, "sample", {}) for k, v in feeds[0].items()]
    return feeds, fed


@contextlib.contextmanager
def _explained(made_up: Sequence[InputShape]) -> Iterator[None]:
    """Where the model fails on inputs that were made up, say what was guessed and what to do."""
    try:
        yield
    except ModelError as error:
        if not made_up:
            raise
        assumed = {name: size for fed in made_up for name, size in fed.assumed.items()}
        listed = ", ".join(f"{name}={size}" for name, size in assumed.items())
        guess = f"assuming {listed}, " if listed else ""
        way = "--shapes NAME=1x128,… or --data DIR" if listed else "--data DIR"
        raise ModelError(
            f"the inputs were made up, {guess}and may not suit the model: give {way}; {error}"
        ) from error


def _measure(first: Any, second: Any, feeds: Sequence[Feed], threads: int, seconds: float,
             progress: Callable[[float], None]) -> Result:  # fmt: skip
    for feed in [*feeds[:_WARM_UP_RUNS]] * _WARM_UP_RUNS:
        _time(first, feed), _time(second, feed)
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or len(times) < _FEWEST_ROUNDS:
        feed = feeds[len(times) // 2 % len(feeds)]
        if len(times) % 2:
            after = _time(second, feed)
            times.append((_time(first, feed), after))
        else:
            times.append((_time(first, feed), _time(second, feed)))
        progress(min(spent / seconds, 1.0))
    progress(1.0)
    return _result(threads, times)


def _time(session: Any, feed: Feed) -> float:
    start = time.perf_counter()
    try:
        session.run(None, feed)
    except Exception as error:
        # ORT raises bare RuntimeErrors as well as its own types.
        raise ModelError(f"the model fails on these inputs: {said_by_ort(error)}") from error
    return time.perf_counter() - start


def _result(threads: int, times: Sequence[tuple[float, float]]) -> Result:
    model, bundle = (
        Timing(statistics.median(side), min(side)) for side in zip(*times, strict=True)
    )
    low, _, high = statistics.quantiles((a / b for a, b in times), n=4)
    return Result(threads, len(times), model, bundle, model.median / bundle.median,
                  model.minimum / bundle.minimum, (low, high))  # fmt: skip

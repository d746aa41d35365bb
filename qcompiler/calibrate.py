"""Calibration: run the float model on samples and remember what its tensors held.

One batch is in memory at a time, or two small samples, and only the tensors that a target
needs are computed; what leaves the graph is a summary of each (`summaries`).  Ranges that were
found once are found again by the hash of the model and of all samples.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.clipping import Clipping, Observed
from qcompiler.installed import import_onnxruntime
from qcompiler.ir.errors import CalibrationError, ModelError, OptionError
from qcompiler.ir.types import TensorStats
from qcompiler.probe import Probe
from qcompiler.random_inputs import random_feed
from qcompiler.samples import Sample, Samples
from qcompiler.summaries import Summary, summarized
from qcompiler.targets.cache import KernelCache, content_key
from qcompiler.vocabularies import vocabularies

__all__ = [
    "TOKENS",
    "is_large",
    "made_up",
    "observe",
    "run_exactly",
    "sample_tokens",
    "some_rows",
]

Runs = Iterable[tuple[str, Sample]]
"""What messages call each sample, and the tensors on it."""

TOKENS = 512
"""The most tokens of one tensor that `sample_tokens` returns."""

_RUNS = 32
"""The most samples that it runs, evenly spaced: 16 tokens of each say as much as 4 of 128."""

_ROWS = 64
"""Rows that are made up for an input that takes any number of them."""

_AT_ONCE = 2
"""Small samples that run side by side; large ones keep all cores busy, and take memory."""

_OPSET = 18
"""The first in which all reductions take their axes as an input."""

_LARGEST = 1 << 30
"""Bytes of weights, as the floats that ONNX Runtime makes of most: to run more at once would
take memory for all. It may be done part by part (`sampled_parts`)."""


def observe(
    model: ir.Model,
    names: Sequence[str] | Mapping[str, str | None],
    samples: Samples,
    progress: Callable[[int, int], None] | None = None,
    clipping: Clipping | None = None,
) -> Mapping[str, TensorStats]:
    """The ranges of the named tensors over all samples; 0 lies in each.

    A tensor that was empty on every sample has none, and is left out.

    Args:
        model: A float model; it is not changed.
        names: Tensors to observe; by name, if the range of one is cut off in another way.
        samples: What to run it on.
        progress: Called with (done, total) after each sample.
        clipping: Where to cut the others off; by default nowhere.

    Raises:
        CalibrationError: A bad sample, or a tensor that is NaN or Inf; names both.
        OptionError: A model of an opset below 18.
    """
    _check_opset(model)
    clippings, total = _clippings(names, clipping or Clipping()), len(samples)
    version = import_onnxruntime().__version__
    counted = [name for name in names if clippings[name].counts]
    wider, summaries = summarized(model, list(names), counted, total)
    parts = [part for s in summaries.values() for part in s.names]
    with _reading(samples) as digest, Probe(wider, parts) as probe:
        cache = KernelCache()
        methods = json.dumps({name: str(clippings[name]) for name in sorted(clippings)})
        key = content_key("ranges", probe.digest, digest(), methods, version)
        if (known := cache.get(key)) is not None:
            return {name: TensorStats(*ends) for name, ends in json.loads(known).items()}
        seen = {name: Observed(clippings[name]) for name in names}
        runs = probe.run(lambda inputs: samples, at_once=_AT_ONCE if samples.are_small else 1)
        for done, (label, tensors) in enumerate(runs, 1):
            if (broken := _look(tensors, summaries, seen)) is not None:
                sample = next(itertools.islice(samples, done - 1, None))
                raise _not_finite(label, _origin(model, list(names), sample) or broken)
            if progress is not None:
                progress(done, total)
    ranges = _ranges(seen, samples)
    cache.keep(key, ranges)
    return {name: TensorStats(*ends) for name, ends in ranges.items()}


@contextlib.contextmanager
def _reading(samples: Samples) -> Iterator[Callable[[], str]]:
    """Hash samples while something else is done; gives what waits for that."""
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        yield beside.submit(lambda: samples.digest).result


def _check_opset(model: ir.Model) -> None:
    opset = model.graph.opset_imports.get("", _OPSET)
    if opset < _OPSET:
        raise OptionError(
            f"samples are run through models of opset {_OPSET} or later, and this one has {opset}: "
            "begin with canonicalize, which raises it"
        )


def _ranges(seen: Mapping[str, Observed], samples: Samples) -> dict[str, tuple[float, float]]:
    """Of all tensors that held a value.

    Raises:
        CalibrationError: None did.
    """
    ranges = {name: o.range() for name, o in seen.items() if o.low <= o.high}
    if seen and not ranges:
        first = next(iter(seen))
        raise CalibrationError(
            f"the samples are empty: tensor {first!r} never held a value in {samples.name}; give "
            "some that have at least one row"
        )
    return ranges


def _clippings(
    names: Sequence[str] | Mapping[str, str | None], usual: Clipping
) -> Mapping[str, Clipping]:
    asked = names if isinstance(names, Mapping) else dict.fromkeys(names)
    return {name: Clipping.parse(text) if text else usual for name, text in asked.items()}


def _look(tensors: Sample, of: Mapping[str, Summary], seen: Mapping[str, Observed]) -> str | None:
    """Look at the tensors of one sample; the first that is not finite."""
    for name, summary in of.items():
        try:
            seen[name].add(summary.values(tensors), summary.ends(tensors))
        except ValueError:
            return name
    return None


def _origin(model: ir.Model, names: Sequence[str], sample: tuple[str, Sample]) -> str | None:
    """The first of some tensors, in the order of the graph, that is not finite on a sample."""
    with Probe(model, names) as probe:
        ((_, tensors),) = probe.run(lambda inputs: [sample])
    return next((name for name in names if not np.isfinite(tensors[name]).all()), None)


def run_exactly(
    model: ir.Model, names: Sequence[str], samples: Samples, most: int = 4
) -> Mapping[str, NDArray[np.float32]]:
    """The named tensors, a row for each of some samples; nothing of the model is fused.

    Args:
        model: Of any stage before kernels; it is not changed.
        names: Tensors of one row each, [1, K].
        samples: What to run it on.
        most: So many of them, evenly spaced.

    Returns:
        {name: [rows, K]}; of a batch without pictures there is no row.

    Raises:
        CalibrationError: A bad sample; names it.
        OptionError: A model of an opset below 18.
    """
    _check_opset(model)
    step = -(-len(samples) // most)
    rows: dict[str, list[NDArray[Any]]] = {name: [] for name in names}

    def drawn(inputs: Sequence[Any]) -> Iterator[tuple[str, Sample]]:
        for label, sample in itertools.islice(samples, 0, None, step):
            if any(array.size for array in sample.values()):  # of none there is no mean
                yield label, sample

    with Probe(model, names) as probe:
        for _, tensors in probe.run(drawn, optimized=False):
            for name, array in tensors.items():
                rows[name].append(array)
    if not any(map(len, itertools.chain(*rows.values()))):
        raise CalibrationError(
            f"the samples are empty: those of {samples.name} that were run hold no values; give "
            "some that have at least one row"
        )
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def sample_tokens(
    model: ir.Model, names: Sequence[str], samples: Samples | None = None
) -> Mapping[str, NDArray[np.float32]]:
    """Some rows along the last axis of the named tensors, at most 512 of each.

    Args:
        model: A float model; it is not changed.
        names: Tensors to take rows of.
        samples: What to run it on; by default on inputs made up for it, see `random_feed`, with
            token ids of the whole vocabulary.

    Returns:
        {name: [tokens, K]}.  On made-up inputs nothing, if the model does not run on them, or if
        its weights, as floats, are larger than 1 GiB.

    Raises:
        CalibrationError: A bad sample, or a tensor that is NaN or Inf on one; names both.
    """
    if samples is not None:
        step = -(-len(samples) // _RUNS)
        with Probe(model, names) as probe:
            share = max(1, TOKENS * step // len(samples))
            some = probe.run(lambda inputs: itertools.islice(samples, 0, None, step))
            return some_rows(some, share)
    if is_large(model):
        return {}

    def drawn(inputs: Sequence[Any]) -> Iterator[tuple[str, Sample]]:
        yield "made-up inputs", made_up(model, inputs)

    try:
        with Probe(model, names) as probe:
            return some_rows(probe.run(drawn, optimized=False), TOKENS)
    except (CalibrationError, ModelError, OptionError):
        return {}  # whatever is wrong with inputs that nobody gave is nobody's mistake


def made_up(model: ir.Model, inputs: Sequence[Any]) -> Sample:
    """A sample that nobody gave: `random_feed`, with token ids of the whole vocabulary.

    Args:
        model: What it is for.
        inputs: As a session describes them.

    Raises:
        OptionError: An input whose values or sizes cannot be made up.
    """
    return random_feed(inputs, _many_rows(inputs), vocabularies(model))[0]


def _many_rows(inputs: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """Shapes for inputs that are rows of features, as many as one likes: of one nothing is learned.

    The largest of a channel over a single row is chance, and the rows of a batch need no more runs.
    """
    rows = (each for each in inputs if len(each.shape) == 2 and "float" in each.type)
    free = (each for each in rows if isinstance(each.shape[1], int))
    return {e.name: (_ROWS, e.shape[1]) for e in free if not isinstance(e.shape[0], int)}


def is_large(model: ir.Model) -> bool:
    """Whether running all of a model at once takes more memory than its passes may."""
    weights = [value.const_value for value in model.graph.initializers.values()]
    floats = sum(tensor.size for tensor in weights if tensor is not None)
    return floats * np.dtype(np.float32).itemsize > _LARGEST


def some_rows(runs: Runs, share: int) -> dict[str, NDArray[np.float32]]:
    """Up to `share` rows of every tensor of each run, evenly spaced."""
    rows: dict[str, list[NDArray[Any]]] = {}
    for label, tensors in runs:
        for name, array in tensors.items():
            if not np.isfinite(array).all():
                raise _not_finite(label, name)
            tokens = array.reshape(-1, array.shape[-1])
            rows.setdefault(name, []).append(tokens[:: max(1, -(-len(tokens) // share))])
    joined = {name: np.concatenate(parts)[:TOKENS] for name, parts in rows.items()}
    return {name: tokens for name, tokens in joined.items() if len(tokens)}


def _not_finite(label: str, name: str) -> CalibrationError:
    return CalibrationError(
        f"{label}: tensor {name!r} becomes NaN or Inf; repair or remove the sample"
    )

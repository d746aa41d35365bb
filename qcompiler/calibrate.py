"""Calibration: run the float model on samples and remember what its tensors held.

A sample set is a folder of `.npz` files, each one batch with an array per model input.  One sample
is in memory at a time, and only the tensors that a target needs are computed and looked at.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qcompiler.ir.errors import CalibrationError, ModelError, OptionError
from qcompiler.ir.graph import constant
from qcompiler.ir.types import TensorStats
from qcompiler.random_inputs import random_feed
from qcompiler.runtime import import_onnxruntime, open_session

__all__ = ["Sample", "Samples", "check_sample", "observe", "sample_tokens"]

Sample = dict[str, NDArray[Any]]

_TOKENS = 512
"""The most tokens of one tensor that `sample_tokens` returns."""

_LARGEST_FOR_MADE_UP = 1 << 30
"""Bytes of weights: a larger model is only run where somebody gave samples to run it on, because
that takes memory for all of it."""


class Samples:
    """The `.npz` samples of a folder (or one file), read one at a time in name order."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Find the samples.

        Raises:
            CalibrationError: The path does not exist or holds no `.npz`.
        """
        root = Path(path)
        self.files = sorted(root.glob("*.npz")) if root.is_dir() else [root]
        if not root.exists():
            raise CalibrationError(f"no samples: {root} does not exist")
        if not self.files:
            raise CalibrationError(f"no samples: {root} holds no .npz file")

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[tuple[str, Sample]]:
        """File name and arrays of each sample.

        Raises:
            CalibrationError: A file that is not an `.npz` of plain arrays.
        """
        for file in self.files:
            try:
                content = np.load(file, allow_pickle=False)
                if not isinstance(content, np.lib.npyio.NpzFile):
                    raise ValueError("it is a single array; save it with np.savez(file, name=…)")
                with content:
                    yield file.name, {name: content[name] for name in content.files}
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise CalibrationError(f"{file} is not an .npz of plain arrays: {error}") from error


def check_sample(name: str, sample: Sample, inputs: Sequence[Any]) -> Sample:
    """The arrays of `sample` that the model takes, after checking each.

    Args:
        name: File name, for the message.
        sample: The arrays.
        inputs: `session.get_inputs()`.

    Raises:
        CalibrationError: A missing input, a wrong dtype or shape, NaN or Inf.
    """
    feeds: Sample = {}
    for expected in inputs:
        if expected.name not in sample:
            raise CalibrationError(
                f"{name} has no array for input {expected.name!r}; it has {sorted(sample)}"
            )
        array = sample[expected.name]
        wanted = _numpy_dtype(expected.type)
        if wanted is not None and array.dtype != wanted:
            raise CalibrationError(
                f"{name}: input {expected.name!r} is {array.dtype}, the model takes {wanted}"
            )
        fits = len(array.shape) == len(expected.shape) and all(
            not isinstance(dim, int) or dim == size
            for dim, size in zip(expected.shape, array.shape, strict=True)
        )
        if not fits:
            raise CalibrationError(
                f"{name}: input {expected.name!r} has shape {list(array.shape)}, the model takes "
                f"{expected.shape}"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CalibrationError(f"{name}: input {expected.name!r} holds NaN or Inf")
        feeds[expected.name] = array
    return feeds


def observe(
    model: ir.Model,
    names: Sequence[str],
    samples: Samples,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[str, TensorStats]:
    """Smallest and largest value of the named tensors over all samples.

    Args:
        model: A float model; it is not changed.
        names: Tensors to observe.
        samples: What to run it on.
        progress: Called with (done, total) after each sample.

    Raises:
        CalibrationError: A bad sample, or a tensor that is NaN or Inf; names both.
    """
    low = dict.fromkeys(names, np.inf)
    high = dict.fromkeys(names, -np.inf)
    for index, tensors in enumerate(_tensors(model, names, lambda inputs: samples)):
        for name, array in tensors.items():
            if array.size:
                low[name] = min(low[name], float(array.min()))
                high[name] = max(high[name], float(array.max()))
        if progress is not None:
            progress(index + 1, len(samples))
    empty = [name for name in names if low[name] > high[name]]
    if empty:
        raise CalibrationError(f"the samples are empty: tensor {empty[0]!r} never held a value")
    return {name: TensorStats(low[name], high[name]) for name in names}


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
        it is larger than 1 GiB.

    Raises:
        CalibrationError: A bad sample, or a tensor that is NaN or Inf on one; names both.
    """
    if samples is not None:
        share = max(1, _TOKENS // len(samples))
        return _some_rows(_tensors(model, names, lambda inputs: samples), share)
    weights = [value.const_value for value in model.graph.initializers.values()]
    if sum(tensor.nbytes for tensor in weights if tensor is not None) > _LARGEST_FOR_MADE_UP:
        return {}
    limits = _vocabularies(model)

    def made_up(inputs: Sequence[Any]) -> Iterator[tuple[str, Sample]]:
        yield "made-up inputs", random_feed(inputs, {}, limits)[0]

    try:
        return _some_rows(_tensors(model, names, made_up, optimized=False), _TOKENS)
    except (CalibrationError, ModelError, OptionError):
        return {}  # whatever is wrong with inputs that nobody gave is nobody's mistake


def _some_rows(runs: Iterable[Sample], share: int) -> dict[str, NDArray[np.float32]]:
    """Up to `share` rows of every tensor of each run, evenly spaced."""
    rows: dict[str, list[NDArray[Any]]] = {}
    for tensors in runs:
        for name, array in tensors.items():
            tokens = array.reshape(-1, array.shape[-1])
            rows.setdefault(name, []).append(tokens[:: max(1, -(-len(tokens) // share))])
    joined = {name: np.concatenate(parts)[:_TOKENS] for name, parts in rows.items()}
    return {name: tokens for name, tokens in joined.items() if len(tokens)}


def _vocabularies(model: ir.Model) -> dict[str, int]:
    """The inputs that are indices into a table of weights, and its length."""
    tables = {}
    for node in model.graph:
        if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
            table, ids = constant(node.inputs[0]), node.inputs[1]
            if table is not None and table.ndim and ids is not None and ids.is_graph_input():
                tables[ids.name or ""] = len(table)
    return tables


def _tensors(
    model: ir.Model,
    names: Sequence[str],
    draw: Callable[[Sequence[Any]], Iterable[tuple[str, Sample]]],
    *,
    optimized: bool = True,
) -> Iterator[Sample]:
    """The named tensors on each sample that `draw` gives for a session's inputs, all finite.

    One run of a large graph is over before ORT would have optimized it.
    """
    given = {value.name for value in model.graph.inputs}
    computed = [name for name in names if name not in given]
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = open_session(_expose(model, computed, Path(folder)), options=options)
        inputs = session.get_inputs()
        for file, sample in draw(inputs):
            feeds = check_sample(file, sample, inputs)
            tensors = feeds | _run(session, computed, feeds, file)
            for name in names:
                if not np.isfinite(tensors[name]).all():
                    raise CalibrationError(f"{file}: tensor {name!r} becomes NaN or Inf")
            yield {name: tensors[name] for name in names}


def _run(session: Any, names: Sequence[str], feeds: Sample, file: str) -> Sample:
    if not names:
        return {}
    try:
        return dict(zip(names, session.run(names, feeds), strict=True))
    except Exception as error:
        # ORT raises bare RuntimeErrors as well as its own types.
        raise CalibrationError(f"the model fails on {file}: {error}") from error


def _expose(model: ir.Model, names: Sequence[str], folder: Path) -> Path:
    """Save a copy of `model` whose outputs are the named tensors, if any are named."""
    copy = model.clone()
    graph = copy.graph
    values = {value.name: value for node in graph for value in node.outputs}
    if names:
        graph.outputs.clear()
        graph.outputs.extend(values[name] for name in names)
        common.RemoveUnusedNodesPass()(copy)
    path = folder / "observed.onnx"
    ir.save(copy, path, external_data="observed.onnx.data")
    return path


def _numpy_dtype(ort_type: str) -> np.dtype[Any] | None:
    names = {"float": "float32", "double": "float64", "float16": "float16", "bool": "bool"}
    inner = ort_type.removeprefix("tensor(").removesuffix(")")
    try:
        return np.dtype(names.get(inner, inner))
    except TypeError:
        return None

"""Calibration: run the float model on samples and remember what its tensors held.

A sample set is a folder of `.npz` files, each one batch with an array per model input.  One sample
is in memory at a time, and only the tensors that a target needs are computed and looked at.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.errors import CalibrationError
from qcompiler.ir.types import TensorStats
from qcompiler.runtime import open_session

__all__ = ["Sample", "Samples", "check_sample", "observe"]

Sample = dict[str, NDArray[Any]]


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
    given = {value.name for value in model.graph.inputs}
    computed = [name for name in names if name not in given]
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        session = open_session(_expose(model, computed, Path(folder)))
        inputs = session.get_inputs()
        for index, (file, sample) in enumerate(samples):
            feeds = check_sample(file, sample, inputs)
            tensors = feeds | _run(session, computed, feeds, file)
            for name in names:
                array = tensors[name]
                if not np.isfinite(array).all():
                    raise CalibrationError(f"{file}: tensor {name!r} becomes NaN or Inf")
                if array.size:
                    low[name] = min(low[name], float(array.min()))
                    high[name] = max(high[name], float(array.max()))
            if progress is not None:
                progress(index + 1, len(samples))
    empty = [name for name in names if low[name] > high[name]]
    if empty:
        raise CalibrationError(f"the samples are empty: tensor {empty[0]!r} never held a value")
    return {name: TensorStats(low[name], high[name]) for name in names}


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

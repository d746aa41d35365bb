"""Samples of a model's inputs: a folder of `.npz` files, each one batch with an array per input."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.ir.errors import CalibrationError

__all__ = ["Sample", "Samples", "check_sample"]

Sample = dict[str, NDArray[Any]]
"""An array per input."""


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
        """What messages call each sample, and its arrays.

        Raises:
            CalibrationError: A file that is not an `.npz` of plain arrays.
        """
        for number, file in enumerate(self.files, 1):
            name = f"{file} (sample {number} of {len(self.files)})"
            try:
                content = np.load(file, allow_pickle=False)
                if not isinstance(content, np.lib.npyio.NpzFile):
                    raise ValueError("it is a single array; save it with np.savez(file, name=…)")
                with content:
                    arrays = {key: content[key] for key in content.files}
            except (EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
                raise CalibrationError(f"{name} is not an .npz of plain arrays: {error}") from error
            yield name, arrays

    def check(self, inputs: Sequence[Any]) -> None:
        """Read every sample and check it against a model's inputs, see `check_sample`.

        Raises:
            CalibrationError: The first one that does not fit.
        """
        for name, sample in self:
            check_sample(name, sample, inputs)


def check_sample(name: str, sample: Sample, inputs: Sequence[Any]) -> Sample:
    """The arrays of `sample` that the model takes, after checking each.

    Args:
        name: What to call the sample in a message.
        sample: The arrays.
        inputs: `session.get_inputs()`, or the like of it.

    Raises:
        CalibrationError: A missing input, a wrong dtype or shape, NaN or Inf.
    """
    feeds: Sample = {}
    for expected in inputs:
        if expected.name not in sample:
            raise CalibrationError(
                f"{name} has no array for input {expected.name!r}, only {sorted(sample)}; save it "
                f"with np.savez(file, {_keyword(expected.name)})"
            )
        array = sample[expected.name]
        wanted = _numpy_dtype(expected.type)
        if wanted is not None and array.dtype != wanted:
            raise CalibrationError(
                f"{name}: input {expected.name!r} is {array.dtype}, the model takes {wanted}; save "
                f"it as array.astype({str(wanted)!r})"
            )
        if not _fits(array.shape, expected.shape):
            raise CalibrationError(
                f"{name}: input {expected.name!r} has shape {list(array.shape)}, the model takes "
                f"{expected.shape}; give every sample its batch dimension and these sizes"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int(array.size - np.isfinite(array).sum())
            raise CalibrationError(
                f"{name}: input {expected.name!r} holds {bad} NaN or Inf; repair or remove the file"
            )
        feeds[expected.name] = array
    return feeds


def _fits(shape: tuple[int, ...], expected: Sequence[int | str | None]) -> bool:
    """Whether an array of `shape` may be fed; no shape at all means that any rank may."""
    return not expected or (
        len(shape) == len(expected)
        and all(
            not isinstance(dim, int) or dim == size
            for dim, size in zip(expected, shape, strict=True)
        )
    )


def _keyword(name: str) -> str:
    """How an array of this name is passed to `np.savez`."""
    return f"{name}=…" if name.isidentifier() else f"**{{{name!r}: …}}"


def _numpy_dtype(ort_type: str) -> np.dtype[Any] | None:
    names = {"float": "float32", "double": "float64", "float16": "float16", "bool": "bool"}
    inner = ort_type.removeprefix("tensor(").removesuffix(")")
    try:
        return np.dtype(names.get(inner, inner))
    except TypeError:
        return None

"""Samples of a model's inputs: from a folder, a file or a function, one in memory at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.arguments import require, require_path
from qcompiler.images import IMAGES, Preprocess
from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.sample_files import Sample, find_files, read_file
from qcompiler.sample_function import find_function, samples_of

__all__ = ["Sample", "Samples", "Source", "check_sample", "disagreement", "samples_from"]

_SMALL = 1 << 20
"""Bytes of a small array: a picture of 224 x 224 has 588 KiB."""

Source = str | os.PathLike[str] | Callable[[], Any] | list[Any]
"""A folder or file, "module:function", the function itself, or a list of samples."""


class Samples:
    """The samples of a source, in the same order whenever they are read.

    A folder holds `.npz` files (an array per input), `.npy` files (the only input), ONNX
    `test_data_set_*` folders or images; a file is one of those.  A function returns or yields
    samples, a list holds them: an array, a sequence of arrays in the order of the inputs, a
    dictionary, or the path of a file.
    """

    def __init__(self, source: Source, preprocess: Preprocess | None = None) -> None:
        """Find the samples.

        Args:
            source: Where they are.
            preprocess: What is done to images.

        Raises:
            CalibrationError: There is nothing, or several kinds of files.
            OptionError: `preprocess` without images, or images without it; what is no source.
        """
        require("preprocess", preprocess, Preprocess, "a Preprocess")
        self.name, self._function = _named(source)
        self._files = [] if self._function is not None else find_files(Path(self.name))
        kinds = {file.suffix.lower() for file in self._files}
        images = bool(kinds & IMAGES)
        if images != (preprocess is not None):
            raise OptionError(
                f"{self.name} holds images: say with --preprocess size=224,… what the model takes"
                if images
                else f"{self.name} holds no images: leave out --preprocess"
            )
        self._preprocess = preprocess
        self._count = len(self._files)
        self._digest: str | None = None
        self._all_small = True

    def __len__(self) -> int:
        """How many there are; a function is asked for all of them to find out."""
        if not self._count:
            self._count = sum(1 for _ in self)
        return self._count

    def __iter__(self) -> Iterator[tuple[str, Sample]]:
        """What messages call each sample, and its arrays.

        Raises:
            CalibrationError: A file that cannot be read, or what the function raises.
        """
        if self._function is not None:
            yield from self._ask(self._function)
        image = self._preprocess
        for number, file in enumerate(self._files, 1):
            name = f"{file} (sample {number} of {len(self._files)})"
            try:
                arrays = read_file(file) if image is None else {"#0": image.read(file)}
            except ValueError as error:
                raise CalibrationError(f"{name} is {error}") from error
            yield name, arrays

    def _ask(self, function: Callable[[], Any]) -> Iterator[tuple[str, Sample]]:
        count = 0
        for sample in samples_of(self.name, function):
            count += 1
            yield sample
        if count < self._count:
            raise CalibrationError(
                f"{self.name} gave {self._count} samples at first and {count} when it was asked "
                "again: let it make them anew each time"
            )

    @property
    def digest(self) -> str:
        """Hash of all arrays and their names."""
        if self._digest is None:
            self._digest = self._hash(self)
        return self._digest

    @property
    def are_small(self) -> bool:
        """Whether no sample is a batch of several rows, or more than 1 MiB."""
        _ = self.digest
        return self._all_small

    def check(self, inputs: Sequence[Any]) -> None:
        """Read every sample and check it against a model's inputs, see `check_sample`.

        Raises:
            CalibrationError: The first one that does not fit, or there is none.
        """

        def checked() -> Iterator[tuple[str, Sample]]:
            for name, sample in self:
                image = self._preprocess is not None
                yield name, check_sample(name, sample, inputs, image=image)

        self._digest = self._hash(checked())
        if not self._count:
            raise CalibrationError(f"no samples: {self.name} gives none")

    def _hash(self, samples: Iterable[tuple[str, Sample]]) -> str:
        digest, count = hashlib.sha256(), 0
        for count, (_, sample) in enumerate(samples, 1):
            for key, array in sample.items():
                digest.update(f"{count} {key} {array.dtype} {array.shape} ".encode())
                digest.update(np.ascontiguousarray(array).data if array.size else b"")
                small = array.shape[:1] in ((), (0,), (1,)) and array.nbytes <= _SMALL
                self._all_small = self._all_small and small
        self._count = count
        return digest.hexdigest()


def _named(source: Source) -> tuple[str, Callable[[], Any] | None]:
    """What messages call a source, and the function that gives its samples, if it is no path.

    Raises:
        OptionError: It is no source, or its function is not found.
    """
    if isinstance(source, list):
        return "the list", lambda: source
    if callable(source):
        return getattr(source, "__name__", "samples"), source
    if not isinstance(source, str | os.PathLike):
        require("samples", source, str, "a path, a function or a list")
    require_path("samples", source)
    return str(source), find_function(source)


def samples_from(source: Source | Samples) -> Samples:
    """The samples of a source, or those that were given."""
    return source if isinstance(source, Samples) else Samples(source)


def check_sample(
    name: str, sample: Sample, inputs: Sequence[Any], *, image: bool = False
) -> Sample:
    """The arrays of `sample` that the model takes, after checking each.

    Args:
        name: What to call the sample in a message.
        sample: The arrays.
        inputs: `session.get_inputs()`, or the like of it.
        image: It was made of an image: messages then say what to do about that.

    Raises:
        CalibrationError: A missing input, a wrong dtype or shape, NaN or Inf.
    """
    feeds: Sample = {}
    if f"#{len(inputs)}" in sample:
        raise CalibrationError(
            f"{name} has {len(sample)} arrays without names, the model takes "
            f"{[expected.name for expected in inputs]}"
        )
    for index, expected in enumerate(inputs):
        array = sample.get(expected.name, sample.get(f"#{index}"))
        if array is None:
            wanted = f"input {expected.name!r}"
            raise CalibrationError(
                f"{name} is an image, and there is no array for {wanted}; images are for models of "
                "one input: give .npz files, or module:function, with all of them"
                if image
                else f"{name} has no array for {wanted}, only {sorted(sample)}; name it so: "
                f"np.savez(file, {_keyword(expected.name)}), in Python {{{expected.name!r}: …}}"
            )
        _check_array(f"{name}: input {expected.name!r}", array, expected, image)
        feeds[expected.name] = array
    return feeds


def _check_array(what: str, array: NDArray[Any], expected: Any, image: bool) -> None:
    """Refuse what an input does not take; `expected` is the session's description of it."""
    if expected.type == "tensor(bfloat16)":
        raise CalibrationError(
            f"{what} is bfloat16, which numpy has not: export the model with float16 or float32 "
            "inputs, or leave the samples out"
        )
    wanted = _numpy_dtype(expected.type)
    if wanted is not None and array.dtype != wanted:
        way_out = f"--preprocess dtype={wanted}" if image else f"array.astype({str(wanted)!r})"
        raise CalibrationError(f"{what} is {array.dtype}, the model takes {wanted}; give {way_out}")
    if not _fits(array.shape, expected.shape):
        raise CalibrationError(
            f"{what} has shape {list(array.shape)}, the model takes {expected.shape}; "
            + (
                "say size, order=gray or layout=nhwc in --preprocess; each image is a batch of 1"
                if image
                else "give every sample its batch dimension and these sizes"
            )
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise CalibrationError(f"{what} holds {bad} NaN or Inf; repair the sample, or leave it out")


def disagreement(sample: Sample, inputs: Sequence[Any]) -> str:
    """Which arrays of a sample have two sizes for one dimension that the model names, if any do.

    Not an error by itself: there are models that call two dimensions the same and take any.
    """
    seen: dict[str, tuple[str, int]] = {}
    for expected in inputs:
        for dim, size in zip(expected.shape, sample[expected.name].shape, strict=False):
            if not isinstance(dim, str):
                continue
            name, known = seen.setdefault(dim, (expected.name, size))
            if known != size:
                return (
                    f"; {dim!r} is {known} in input {name!r} and {size} in input "
                    f"{expected.name!r}: give both the same size"
                )
    return ""


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

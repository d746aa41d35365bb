"""Samples that a Python function makes, found by "module:function"."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.images import IMAGES
from qcompiler.ir.errors import CalibrationError, OptionError, did_you_mean
from qcompiler.sample_files import Sample, find_files, is_folder_of_files, read_file

__all__ = ["find_function", "samples_of"]

SampleFunction = Callable[[], Iterable[Any]]


def find_function(text: str | os.PathLike[str]) -> SampleFunction | None:
    """The function that "module:function" names; None for anything that is a path.

    The current folder is looked in too.

    Raises:
        OptionError: There is no such module, or no such function in it.
    """
    name = os.fspath(text)
    if not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name) or Path(name).exists():
        return None
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # It is the user's code: anything may come out of it.
        hint = ""
        if module_name.endswith(".py"):
            hint = f"; a module has no .py: {module_name.removesuffix('.py')}:{function_name}"
        raise OptionError(
            f"{name}: cannot import {module_name} ({type(error).__name__}: {error}){hint}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [each for each, made in vars(module).items() if callable(made)]
        hint = did_you_mean(function_name, known)
        raise OptionError(f"{name}: {module_name} has no function {function_name!r}{hint}")
    found: SampleFunction = function
    return found


def samples_of(name: str, function: SampleFunction) -> Iterator[tuple[str, Sample]]:
    """What messages call each sample of the function, and its arrays.

    Raises:
        CalibrationError: What the function raises, or gives that is no sample.
    """
    number, samples = 0, iter(_guarded(name, function))
    for number, given in enumerate(samples, 1):
        label = f"sample {number} of {name}"
        if isinstance(given, str | os.PathLike):
            label = f"{os.fspath(given)} ({label})"
            yield label, _read(label, Path(given))
        else:
            yield label, _as_sample(label, given)


def _guarded(name: str, function: SampleFunction) -> Iterator[Any]:
    try:
        given: Any = function()
        iterates = hasattr(given, "__iter__") or hasattr(given, "__getitem__")
        # Letters and keys are no samples.
        if isinstance(given, str | bytes | Mapping) or not iterates:
            raise CalibrationError(
                f"{name} returns a {type(given).__name__}: let it return a list of samples, or "
                "yield one after the other"
            )
        yield from given
    except CalibrationError:
        raise
    except (Exception, SystemExit) as error:
        raise CalibrationError(f"{name} fails: {type(error).__name__}: {error}") from error


def _read(label: str, path: Path) -> Sample:
    """The arrays of a file that stands for a sample.

    Raises:
        CalibrationError: It is no single file of arrays.
    """
    try:
        alone = not is_folder_of_files(path) and find_files(path) == [path]
    except CalibrationError as error:
        raise CalibrationError(f"{label}: {error}") from error
    if not alone or path.suffix.lower() in IMAGES:
        raise CalibrationError(
            f"{label} is no .npz or .npy file: a folder, or images, are a source of their own; "
            "give that instead of the list"
        )
    try:
        return read_file(path)
    except ValueError as error:
        raise CalibrationError(f"{label} is {error}") from error


def _as_sample(label: str, given: Any) -> Sample:
    if isinstance(given, Mapping):
        arrays = {str(key): np.asarray(value) for key, value in given.items()}
    else:
        several = given if isinstance(given, list | tuple) else [given]
        arrays = {f"#{index}": np.asarray(value) for index, value in enumerate(several)}
    for key, array in arrays.items():
        if array.dtype == object:
            raise CalibrationError(
                f"{label}: {key!r} is no array; give a dictionary of arrays by input, or arrays in "
                "the order of the inputs"
            )
    return arrays

"""Large arrays in files that have no name, so that memory holds those that are being looked at.

Passes make new weights of all layers of a model, one after the other: scaled ones, rounded ones of
a byte each.  Their file is gone when the last view of the array is, however the process ends.
"""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["let_go", "letting_go", "on_disk"]

_LARGE = 1 << 20
"""Bytes: to map a smaller array takes longer than it is worth."""


def on_disk(array: NDArray[Any]) -> NDArray[Any]:
    """The array, a large one as a mapping of a temporary file, which cannot be written to.

    Where the disk refuses (`TMPDIR` says which), it stays in memory.
    """
    if array.nbytes < _LARGE or _mapping(array) is not None:
        return array
    flat = np.ascontiguousarray(array)
    try:
        with tempfile.TemporaryFile(prefix="qcompiler-") as file:
            flat.reshape(-1).view(np.uint8).tofile(file)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:
        return array
    return np.ndarray(array.shape, flat.dtype, buffer=mapped)


def let_go(value: ir.Value) -> None:
    """Let the system take back the pages of a weight that is mapped from a file, for now."""
    _let_go(value.const_value)


def letting_go() -> Callable[[ir.TensorProtocol, object], None]:
    """What `ir.save` is to tell of each tensor: the one before it is written, and let go."""
    written: list[ir.TensorProtocol] = []

    def tell(tensor: ir.TensorProtocol, place: object) -> None:
        while written:
            _let_go(written.pop())
        written.append(tensor)

    return tell


def _let_go(tensor: ir.TensorProtocol | None) -> None:
    mapped = tensor.raw if isinstance(tensor, ir.ExternalTensor) else None
    if isinstance(tensor, ir.Tensor):
        mapped = _mapping(tensor.raw)
    if mapped is not None:
        with contextlib.suppress(AttributeError):  # not every system has MADV_DONTNEED
            mapped.madvise(mmap.MADV_DONTNEED)


def _mapping(array: object) -> mmap.mmap | None:
    """What an array, or the one that it is a view of, is mapped from."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) else None

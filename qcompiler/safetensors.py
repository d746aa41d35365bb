"""Read tensors of a `.safetensors` file, as few at a time as are asked for.

Eight bytes give the length of a JSON header, which names each tensor with its type, its shape and
where its bytes lie behind the header.  Of a checkpoint in several files an index tells the file of
each tensor, so that one that was not downloaded is missed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qcompiler.ir.errors import ModelError, cannot_read

__all__ = ["SafeTensors"]

_TYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip
_INDEX = ".safetensors.index.json"

_MOST_HEADER = 100_000_000
"""Bytes: what the format's own reader takes at most."""


class SafeTensors:
    """The tensors of a file, or of all such files in a folder: of those of its index, if any."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the headers.

        Raises:
            ModelError: There is no such file, or it is damaged; a tensor is in two files, or not in
                that of the index.
        """
        given = Path(path)
        indexed = _index(given)
        files = sorted({given / file for file in indexed.values()}) or [given]
        if given.is_dir() and not indexed:
            files = sorted(given.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{given} holds no .safetensors file")
        self.name = str(given)
        self._where: dict[str, tuple[Path, np.dtype[Any], tuple[int, ...], int]] = {}
        for file in files:
            for name, place in _header(file):
                if name in self._where:
                    raise ModelError(f"{file} and {self._where[name][0]} both hold {name!r}")
                self._where[name] = place
        for name, wanted in indexed.items():
            if name not in self._where or self._where[name][0] != given / wanted:
                raise ModelError(
                    f"{given / wanted} holds no {name!r}, which its index says is there"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, which is not read for it."""
        return self._where[name][2]

    def __getitem__(self, name: str) -> NDArray[Any]:
        file, dtype, shape, offset = self._where[name]
        count = int(np.prod(shape))
        return np.fromfile(file, dtype, count, offset=offset).reshape(shape)


def _index(folder: Path) -> dict[str, str]:
    """By tensor the name of the file that an index in the folder says; nothing without an index."""
    found = sorted(folder.glob(f"*{_INDEX}")) if folder.is_dir() else []
    if not found:
        return {}
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelError(
            f"{folder} holds {len(found)} indices: {names}; leave there that of the layers' files"
        )
    try:
        places = json.loads(found[0].read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{found[0]} is no index of a checkpoint: {error!r}") from error
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise ModelError(f"{found[0]} names {file!r}, which is no file of its own folder")
        if not (folder / file).is_file():
            raise ModelError(
                f"{found[0]} names {file}, which is not there: the checkpoint is not whole; "
                "download it again"
            )
    return files


def _header(file: Path) -> Iterator[tuple[str, tuple[Path, np.dtype[Any], tuple[int, ...], int]]]:
    """Where each tensor of a file lies, checked against the file's length."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MOST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            content = json.loads(stream.read(length))
        size = file.stat().st_size
        for name, entry in content.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _TYPES:
                raise ValueError(f"{name!r} is {entry['dtype']}, which is not read here")
            dtype, (first, last) = np.dtype(_TYPES[entry["dtype"]]), entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            whole = last - first == int(np.prod(shape)) * dtype.itemsize
            if not whole or first < 0 or 8 + length + last > size:
                raise ValueError(f"{name!r} does not lie within it")
            yield name, (file, dtype, shape, 8 + length + first)
    except OSError as error:
        message = cannot_read("checkpoint", file, error, "a .safetensors file, or its folder")
        raise ModelError(message) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is no whole safetensors file: {error}") from error

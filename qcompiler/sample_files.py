"""Files that hold samples: `.npz`, `.npy`, ONNX test data and images; none of them is unpickled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.images import IMAGES
from qcompiler.ir.errors import CalibrationError

__all__ = ["Sample", "find_files", "is_folder_of_files", "read_file"]

Sample = dict[str, NDArray[Any]]
"""An array per input, by its name, or "#0", "#1", ... in order where arrays have no names."""

_TEST_DATA = "test_data_set_"
"""Folders of this name hold a protobuf per input, as in ONNX's model zoo."""


def find_files(root: Path) -> list[Path]:
    """The files (or `test_data_set_*` folders) of samples in a folder, in order; or the one given.

    Images are looked for in folders below, too.

    Raises:
        CalibrationError: There are none, or there are several kinds.
    """
    if not root.exists():
        raise CalibrationError(f"no samples: {root} does not exist")
    if not root.is_dir() or _kind(root) is not None:
        if _kind(root) is None or not (root.is_file() or root.is_dir()):
            raise CalibrationError(f"{root} is no file of samples: those are {_KINDS}")
        return [root]
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        kind = _kind(path)
        if kind is not None and (kind == "images" or path.parent == root):
            found.setdefault(kind, []).append(path)
    if not found:
        raise CalibrationError(f"no samples: {root} holds no {_KINDS}")
    if len(found) > 1:
        raise CalibrationError(f"{root} holds {' and '.join(found)}: give a folder of one kind")
    return found.popitem()[1]


def is_folder_of_files(path: Path) -> bool:
    """Whether this is a folder, but not one that is a sample itself."""
    return path.is_dir() and _kind(path) is None


def read_file(path: Path) -> Sample:
    """The arrays of a file that holds no image.

    Raises:
        ValueError: It is not what its name says; the message says why.
    """
    kind = _kind(path)
    assert kind is not None
    try:
        return _READERS[kind](path)
    except Exception as error:
        # zipfile, its decompressors and numpy's header parser raise a dozen unrelated types.
        reason = str(error) or type(error).__name__
        if "allow_pickle" in reason:
            # numpy takes whatever else it meets for a pickle.
            reason = "it holds pickled objects, which are never loaded, or is damaged"
        raise ValueError(f"not {_ONE[kind]}: {reason}") from error


def _kind(path: Path) -> str | None:
    if path.name.startswith("."):
        return None  # what desktops leave behind
    if path.name.startswith(_TEST_DATA) and path.is_dir():
        return f"{_TEST_DATA}* folders"
    suffix = path.suffix.lower()
    if suffix in (".npz", ".npy"):
        return f"{suffix} files"
    return "images" if suffix in IMAGES else None


def _read_npz(path: Path) -> Sample:
    content = np.load(path, allow_pickle=False)
    if not isinstance(content, np.lib.npyio.NpzFile):
        raise ValueError("it is a single array; save it with np.savez(file, name=…)")
    with content:
        return {key: content[key] for key in content.files}


def _read_npy(path: Path) -> Sample:
    content = np.load(path, allow_pickle=False)
    if not isinstance(content, np.ndarray):
        raise ValueError("it is an .npz")
    return {"#0": content}


def _read_test_data(path: Path) -> Sample:
    import onnx
    from onnx import numpy_helper

    files = sorted(path.glob("input_*.pb"), key=lambda file: (len(file.name), file.name))
    if not files:
        raise ValueError("it holds no input_0.pb")
    sample = {}
    for index, file in enumerate(files):
        try:
            tensor = onnx.TensorProto.FromString(file.read_bytes())
            sample[tensor.name or f"#{index}"] = numpy_helper.to_array(tensor)
        except Exception as error:
            # Malformed protobufs raise types of protobuf's own, and bare ones of numpy.
            raise ValueError(f"{file.name} holds no tensor ({error})") from error
    return sample


_READERS: dict[str, Callable[[Path], Sample]] = {
    ".npz files": _read_npz,
    ".npy files": _read_npy,
    f"{_TEST_DATA}* folders": _read_test_data,
}

_ONE = {
    ".npz files": "an .npz of plain arrays",
    ".npy files": "an .npy of a plain array",
    f"{_TEST_DATA}* folders": "a folder of ONNX test data",
}

_KINDS = f"{', '.join(_READERS)} or images"

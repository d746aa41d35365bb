"""Models as ONNX files, large weights beside them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from qcompiler.ir.errors import ModelError, OptionError, first_cause
from qcompiler.ir.graph import every_graph
from qcompiler.ir.on_disk import letting_go

__all__ = ["WeightFile", "beside", "save_model", "saving", "weight_files"]

_INLINE_LIMIT = 1 << 30
"""Above this many bytes weights go into a file of their own: protobuf ends at 2 GiB."""

_SMALL = 1024
"""Bytes: smaller tensors stay inside the model, where viewers show them."""


def save_model(model: ir.Model, path: Path) -> None:
    """Write an ONNX file; weights that are large or lie outside go into `<name>.data` beside it.

    Both are written apart and moved in, so that what was there stays if that fails.

    Raises:
        OptionError: The disk refuses.
        ModelError: The model cannot be expressed as a file.
    """
    tensors = [tensor for value in _initializers(model) if (tensor := value.const_value)]
    outside = any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
    is_large = sum(tensor.nbytes for tensor in tensors) > _INLINE_LIMIT
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        saving(path),
        tempfile.TemporaryDirectory(prefix=".qcompiler-", dir=path.parent) as folder,
    ):
        data = beside(path).name if outside or is_large else None
        ir.save(model, Path(folder, path.name), external_data=data, callback=letting_go())
        # The weights first: a model never lies beside those of another.
        for file in sorted(Path(folder).iterdir(), reverse=True):
            os.replace(file, path.parent / file.name)


def beside(path: Path) -> Path:
    """The file of weights that `save_model` may write with a model."""
    return path.with_name(f"{path.name}.data")


def weight_files(model: ir.Model) -> set[Path]:
    """The files in which weights of a model lie."""
    tensors = (value.const_value for value in _initializers(model))
    return {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


class WeightFile:
    """One file of weights that many models share: equal tensors are written once."""

    def __init__(self, path: Path) -> None:
        """Start an empty file.

        Raises:
            OptionError: The disk refuses.
        """
        self.path = path
        self._offsets: dict[tuple[int, bytes], int] = {}
        with saving(path):
            path.write_bytes(b"")

    def save_model(self, model: ir.Model, path: Path) -> None:
        """Write an ONNX file in the same folder, its weights into this file.

        Raises:
            OptionError: The disk refuses.
            ModelError: The model cannot be expressed as a file.
        """
        copy = model.clone()
        with saving(path):
            for value in _initializers(copy):
                tensor = value.const_value
                assert tensor is not None
                if tensor.nbytes >= _SMALL and tensor.dtype is not ir.DataType.STRING:
                    value.const_value = self._outside(tensor, path.parent)
            ir.save(copy, path)

    def _outside(self, tensor: ir.TensorProtocol, folder: Path) -> ir.ExternalTensor:
        content = tensor.tobytes()
        key = (len(content), hashlib.sha256(content).digest())
        if key not in self._offsets:
            with self.path.open("ab") as file:
                self._offsets[key] = file.tell()
                file.write(content)
        return ir.ExternalTensor(
            self.path.name, self._offsets[key], len(content), tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()), name=tensor.name or "", base_dir=folder,
        )  # fmt: skip


@contextlib.contextmanager
def saving(path: Path, hint: str = "") -> Iterator[None]:
    """Explain what goes wrong while `path` is written, and what to do where the disk refuses."""
    try:
        yield
    except OSError as error:
        # numpy's own message is a count of bytes.
        reason = error.strerror or f"is the disk full? ({error})"
        raise OptionError(f"cannot write {path}: {reason}{hint}") from error
    except Exception as error:
        # Names that are not UTF-8, for one, come as far as this.
        raise ModelError(f"the model cannot be saved: {first_cause(error)}") from error


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    """Those of the graph and of its branches and loops that hold a tensor."""
    for graph in every_graph(model.graph):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value

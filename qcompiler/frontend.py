"""Front doors: an ONNX file, an `onnx_ir.Model`, or something of torch's, as one model."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from qcompiler.bundle import MANIFEST
from qcompiler.from_torch import is_torch_file, load_torch
from qcompiler.ir.errors import ModelError, OptionError, QCompilerError
from qcompiler.ir.sparse import densify
from qcompiler.old_functions import inline_old_functions
from qcompiler.runtime import open_session

if TYPE_CHECKING:
    import torch

__all__ = ["is_of_torch", "load_model", "onnx_file"]


def load_model(
    source: str | os.PathLike[str] | ir.Model | torch.export.ExportedProgram | torch.nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> ir.Model:
    """Read a model; weights in external files stay on disk until they are used.

    Args:
        source: A path, of an ONNX file or a `.pt2`; a model (it is copied); an exported program; or
            a torch module, such as a `torch.fx.GraphModule`, with example inputs.
        example_inputs: For a module: its positional arguments, or a mapping of keyword arguments.
        dynamic_shapes: For a module: which dimensions vary, as `torch.export.export` takes them.

    Raises:
        ModelError: Missing, corrupt or incomplete, or not accepted by the ONNX checker.
        OptionError: Example inputs are missing, or are given for something else than a module.
    """
    given = example_inputs is not None or dynamic_shapes is not None
    if given and isinstance(source, str | os.PathLike | ir.Model):
        raise OptionError(
            "example_inputs and dynamic_shapes are for a torch module: a saved model has shapes of "
            "its own; leave them out"
        )
    if isinstance(source, ir.Model):
        return source.clone()
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return load_torch(path) if is_torch_file(path) else _load_file(path)
    return load_torch(source, example_inputs, dynamic_shapes)


def is_of_torch(source: object) -> bool:
    """Whether `source` must be exported first: anything but an ONNX file or an `onnx_ir.Model`."""
    if isinstance(source, str | os.PathLike):
        return is_torch_file(Path(source))
    return not isinstance(source, ir.Model)


@contextlib.contextmanager
def onnx_file(source: str | os.PathLike[str] | ir.Model) -> Iterator[Path]:
    """The ONNX file at `source`, or one written of it for as long as it is needed."""
    if isinstance(source, str | os.PathLike) and not is_of_torch(source):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        file = Path(folder) / "model.onnx"
        ir.save(load_model(source), file, external_data="model.onnx.data")
        yield file


def _load_file(path: Path) -> ir.Model:
    if not path.exists():
        raise ModelError(f"no model: {path} does not exist")
    if (path / MANIFEST).is_file():
        raise ModelError(f"{path} is a bundle; give the model that it was compiled from")
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give the .onnx file inside it")
    if not path.is_file():
        raise ModelError(f"{path} is no regular file")
    try:
        proto = onnx.load(path, load_external_data=False)
        densify(proto)
        model: ir.Model = ir.from_proto(inline_old_functions(proto))
        ir.external_data.set_base_dir(model.graph, path.parent)
    except Exception as error:
        # The protobuf and onnx_ir readers share no exception type for malformed bytes.
        raise ModelError(
            f"{path} is not a readable ONNX model (corrupt or truncated?): {_first_line(error)}; "
            "copy or export it again"
        ) from error
    if not len(model.graph):
        raise ModelError(f"{path} holds no nodes: not an ONNX model, or an empty one")
    _check_external_data(model, path)
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:
        # ValidationError, but also bare protobuf and C++ errors for malformed fields.  ORT takes
        # some models that the checker does not, inputs without a shape for one.
        try:
            open_session(path)
        except QCompilerError as refusal:
            # What the checker says first may be the one thing that ORT would not have minded.
            reason = _first_line(refusal).rpartition(f"{path} failed:")[2]
            raise ModelError(
                f"{path} is not a valid ONNX model: ONNX Runtime says: {reason}; "
                f"the ONNX checker: {_first_line(error)}"
            ) from error
    return model


def _check_external_data(model: ir.Model, path: Path) -> None:
    """Every external tensor must lie inside the model's folder and be complete."""
    folder = path.parent.absolute()
    for graph in [model.graph, *model.graph.subgraphs()]:
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            file = Path(os.path.normpath(folder / tensor.location))
            if not file.is_relative_to(folder):
                raise ModelError(
                    f"{path}: tensor {value.name!r} lies outside the model's folder "
                    f"({tensor.location}); move the file beside the model"
                )
            if not file.is_file():
                raise ModelError(
                    f"{path}: external data {tensor.location!r} of tensor {value.name!r} is "
                    f"missing; copy it into {folder}"
                )
            if file.is_symlink():
                # ONNX's own checker refuses them: a link may lead anywhere.
                raise ModelError(
                    f"{path}: external data {tensor.location!r} is a symbolic link, as in a hub's "
                    "cache; copy the model with cp -rL and compile the copy"
                )
            end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
            if end > file.stat().st_size:
                raise ModelError(
                    f"{path}: external data {tensor.location!r} is truncated: tensor "
                    f"{value.name!r} ends at byte {end} of {file.stat().st_size}"
                )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

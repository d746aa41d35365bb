"""Front doors: an ONNX file, an `onnx_ir.Model` or a `torch.export` program, as one model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from qcompiler.ir.errors import ModelError, QCompilerError
from qcompiler.ir.sparse import densify
from qcompiler.runtime import open_session

if TYPE_CHECKING:
    import torch

__all__ = ["load_model"]


def load_model(
    source: str | os.PathLike[str] | ir.Model | torch.export.ExportedProgram,
) -> ir.Model:
    """Read a model; weights in external files stay on disk until they are used.

    Args:
        source: A path, a model (it is copied) or an exported program.

    Raises:
        ModelError: Missing, corrupt or incomplete, or not accepted by the ONNX checker.
    """
    if isinstance(source, ir.Model):
        return source.clone()
    if isinstance(source, str | os.PathLike):
        return _load_file(Path(source))
    return _export(source)


def _load_file(path: Path) -> ir.Model:
    if not path.exists():
        raise ModelError(f"no model: {path} does not exist")
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give the .onnx file inside it")
    try:
        proto = onnx.load(path, load_external_data=False)
        densify(proto)
        model: ir.Model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
    except Exception as error:
        # The protobuf and onnx_ir readers share no exception type for malformed bytes.
        raise ModelError(
            f"{path} is not a readable ONNX model (corrupt or truncated?): {_first_line(error)}"
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
        except QCompilerError:
            message = f"{path} is not a valid ONNX model: {_first_line(error)}"
            raise ModelError(message) from error
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


def _export(program: torch.export.ExportedProgram) -> ir.Model:
    try:
        import torch
    except ImportError as error:
        raise ModelError(
            f"cannot read a {type(program).__name__}: torch is not installed "
            "(pip install 'qcompiler[torch]')"
        ) from error
    if not isinstance(program, torch.export.ExportedProgram):
        raise ModelError(
            f"cannot read a {type(program).__name__}: give a path, an onnx_ir.Model or a "
            "torch.export.ExportedProgram"
        )
    try:
        exported = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(f"torch cannot express this program in ONNX: {error}") from error
    assert exported is not None
    # The exporter's model shares memory with torch; bytes of our own outlive it.
    model: ir.Model = ir.from_proto(exported.model_proto)
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

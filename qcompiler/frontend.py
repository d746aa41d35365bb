"""Front doors: an ONNX file, an `onnx_ir.Model`, or something of torch's, as one model."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from qcompiler.arguments import require_path, require_utf8
from qcompiler.bundle import MANIFEST
from qcompiler.faults import fault_of, map_of, weight_given_twice
from qcompiler.from_torch import is_torch_file, is_torch_object, load_torch
from qcompiler.installed import import_onnxruntime
from qcompiler.ir.errors import ModelError, OptionError, QCompilerError, VerifyError, first_cause
from qcompiler.ir.graph import every_graph, function_label
from qcompiler.ir.onnx_rules import problems_in
from qcompiler.ir.sparse import densify
from qcompiler.old_functions import inline_old_functions
from qcompiler.runtime import open_session
from qcompiler.session_options import QUIET
from qcompiler.source import check_whole

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_kind", "check_opens", "is_of_torch", "load_model", "onnx_file", "source_is_blamed",
]  # fmt: skip


def check_kind(source: object) -> None:
    """Refuse what is no model of any kind.

    Raises:
        ModelError: Says what may be given.
    """
    if not isinstance(source, str | os.PathLike | ir.Model) and not is_torch_object(source):
        what = "no model was given" if source is None else f"cannot read a {type(source).__name__}"
        raise ModelError(
            f"{what}: give a path, an onnx_ir.Model, a torch.export.ExportedProgram, or a "
            "torch.fx.GraphModule with example_inputs"
        )
    if isinstance(source, str | os.PathLike):
        require_path("source", source)


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
    check_kind(source)
    given = example_inputs is not None or dynamic_shapes is not None
    if given and isinstance(source, str | os.PathLike | ir.Model):
        raise OptionError(
            "example_inputs and dynamic_shapes are for a torch module: a saved model has shapes of "
            "its own; leave them out"
        )
    if isinstance(source, ir.Model):
        check_whole(source, "the model")
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


def check_opens(source: str | os.PathLike[str] | ir.Model) -> None:
    """Let ONNX Runtime open a model.

    Raises:
        ModelError: It refuses: which node is at fault, or what it says.
    """
    with onnx_file(source) as file:
        try:
            _let_ort_open(file)
        except ModelError as error:
            name = str(source) if isinstance(source, str | os.PathLike) else "the model"
            raise ModelError(
                f"{name} is not a valid ONNX model: {_refusal(ir.load(file), error, file)}"
            ) from error


@contextlib.contextmanager
def source_is_blamed(source: str | os.PathLike[str] | ir.Model, foreign: bool) -> Iterator[None]:
    """Runs passes: what one of them is said to have broken may have been broken before.

    The types of a model are known once they are inferred, and then it may turn out that two of them
    do not go together.

    Args:
        source: Where the model is from.
        foreign: ONNX Runtime does not know all of its ops.

    Raises:
        ModelError: A pass broke a rule of its stage, and ONNX Runtime refuses the source already.
    """
    try:
        yield
    except VerifyError:
        if not foreign:
            check_opens(source)
        raise


def _load_file(path: Path) -> ir.Model:
    if not path.exists():
        raise ModelError(f"no model: {path} does not exist")
    if (path / MANIFEST).is_file() or path.name == MANIFEST:
        raise ModelError(f"{path} is a bundle; give the model that it was compiled from")
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give the .onnx file inside it")
    if not path.is_file():
        raise ModelError(f"{path} is no regular file")
    require_utf8("model", path)
    model = _read(path)
    if not len(model.graph):
        raise ModelError(f"{path} holds no nodes: not an ONNX model, or an empty one")
    _check_external_data(model, path)
    check_whole(model, str(path))
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:
        # ValidationError, but also bare protobuf and C++ errors for malformed fields.  ORT takes
        # some models that the checker does not, inputs without a shape for one.
        try:
            _let_ort_open(path)
        except QCompilerError as refusal:
            raise ModelError(
                f"{path} is not a valid ONNX model: {_refusal(model, refusal, path, error)}"
            ) from error
    return model


def _let_ort_open(path: Path) -> None:
    """Let ONNX Runtime look at a file whose weights stay where they are: packing copies them all.

    Raises:
        ModelError: It refuses.
    """
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = QUIET
    options.add_session_config_entry("session.disable_prepacking", "1")
    open_session(path, options=options)


def _read(path: Path) -> ir.Model:
    """The model of a file.

    Raises:
        ModelError: It is none, or a broken one.
    """
    proto = None
    try:
        proto = onnx.load(path, load_external_data=False)
        densify(proto)
        with _silent_reader():
            model: ir.Model = ir.from_proto(inline_old_functions(proto))
        ir.external_data.set_base_dir(model.graph, path.parent)
    except Exception as error:
        # The protobuf and onnx_ir readers share no exception type for malformed bytes.
        fault = None if proto is None else fault_of(proto)
        if fault is not None:
            raise ModelError(
                f"{path} is not a valid ONNX model: {fault}; export it again"
            ) from error
        if proto is not None and (name := map_of(proto)) is not None:
            raise ModelError(
                f"{path}: {name!r} holds maps from labels to numbers (ZipMap), which are not "
                "supported: export the model with tensors of probabilities (zipmap=False)"
            ) from error
        raise ModelError(
            f"{path} is not a readable ONNX model (corrupt or truncated?): "
            f"{_first_line(first_cause(error))}; copy or export it again"
        ) from error
    if (name := weight_given_twice(proto)) is not None:
        raise ModelError(
            f"{path} is not a valid ONNX model: two weights that differ are named {name!r}; export "
            "it again"
        )
    return model


@contextlib.contextmanager
def _silent_reader() -> Iterator[None]:
    """Values that nothing defines are logged by onnx_ir, and refused by us."""
    logger = logging.getLogger("onnx_ir.serde")
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


def _refusal(
    model: ir.Model, error: QCompilerError, file: Path, checker: Exception | None = None
) -> str:
    """Why ONNX Runtime refuses a model: the node that breaks a rule, or its own words.

    What the checker says may be the one thing that ONNX Runtime would not have minded.
    """
    owners: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for owner in owners:
        for _, node, problem in problems_in(owner):
            place = f"{function_label(owner)}: " if isinstance(owner, ir.Function) else ""
            return f"{place}node {node!r}: {problem}"
    if fault := fault_of(onnx.load(file, load_external_data=False)):
        return f"{fault}; export it again"
    said = f"ONNX Runtime says: {_first_line(error).partition(f'{file}: ')[2]}"
    return said if checker is None else f"{said}; the ONNX checker: {_first_line(checker)}"


def _check_external_data(model: ir.Model, path: Path) -> None:
    """Every external tensor must lie inside the model's folder and be complete."""
    for graph in every_graph(model.graph):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and (
                problem := _fault_of_external(tensor, value.name, path.parent.absolute())
            ):
                raise ModelError(f"{path}: {problem}")


def _fault_of_external(tensor: ir.ExternalTensor, name: str | None, folder: Path) -> str | None:
    if not tensor.location:
        return (
            f"external data of tensor {name!r} has no location, the file that it lies in; export "
            "the model again"
        )
    file = Path(os.path.normpath(folder / tensor.location))
    if not file.is_relative_to(folder):
        return (
            f"tensor {name!r} lies outside the model's folder ({tensor.location}); move the file "
            "beside the model"
        )
    data = f"external data {tensor.location!r}"
    if not file.is_file():
        return f"{data} of tensor {name!r} is missing; copy it into {folder}"
    if file.is_symlink():
        # ONNX's own checker refuses them: a link may lead anywhere.
        return (
            f"{data} is a symbolic link, as in a hub's cache; copy the model with cp -rL and "
            "compile the copy"
        )
    if tensor.length not in (None, 0, tensor.nbytes):
        return (
            f"external data of tensor {name!r} is said to be {tensor.length} bytes, but "
            f"{list(tensor.shape)} of {tensor.dtype} is {tensor.nbytes}; export the model again"
        )
    end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
    if end > file.stat().st_size:
        size = file.stat().st_size
        return f"{data} is truncated: tensor {name!r} ends at byte {end} of {size}"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""torch in: exported programs, saved ones, and modules with example inputs, as one ONNX model.

Nothing here imports torch before there is something of torch's to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from qcompiler.ir.errors import ModelError, OptionError

if TYPE_CHECKING:
    import torch

__all__ = ["is_torch_file", "is_torch_object", "load_torch", "notes_on_state"]

UNWRITTEN = "qcompiler.unwritten"
"""Metadata of a model: what its program writes to in place, and the model does not."""

_SUFFIXES = frozenset({".pt2", ".pt", ".pth", ".ckpt"})
_ZIP = b"PK\x03\x04"


def is_torch_file(path: Path) -> bool:
    """Whether torch wrote the file, by its suffix or because it is a zip archive, as no ONNX is."""
    if not path.is_file():
        return False
    if path.suffix in _SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_ZIP)) == _ZIP
    except OSError:
        return False  # whoever reads it says why


def load_torch(
    source: Path | torch.export.ExportedProgram | torch.nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> ir.Model:
    """The ONNX model of a saved program, a program, or a module with the inputs to capture it by.

    Args:
        source: A `.pt2` file, a program, or a module: a `torch.fx.GraphModule` is one.
        example_inputs: For a module: its positional arguments, or keyword arguments as a mapping.
        dynamic_shapes: For a module: which dimensions vary, as `torch.export.export` takes them.

    Raises:
        ModelError: torch is not installed, or cannot read, capture or translate `source`.
    """
    what = str(source) if isinstance(source, Path) else f"a {type(source).__name__}"
    try:
        import torch
    except ImportError as error:
        raise ModelError(
            f"cannot read {what}: torch is not installed (pip install 'qcompiler[torch]')"
        ) from error
    from qcompiler.from_torch.archive import read_program
    from qcompiler.from_torch.capture import capture
    from qcompiler.from_torch.export import to_onnx
    from qcompiler.from_torch.signature import refuse_training

    given = example_inputs is not None or dynamic_shapes is not None
    if isinstance(source, Path):
        source = read_program(source)
    elif isinstance(source, torch.export.ExportedProgram) and given:
        raise OptionError(
            "a torch.export.ExportedProgram has inputs and dynamic shapes of its own; leave out "
            "example_inputs and dynamic_shapes"
        )
    is_graph = isinstance(source, torch.export.ExportedProgram | torch.fx.GraphModule)
    if not isinstance(source, torch.export.ExportedProgram):
        source = capture(source, example_inputs, dynamic_shapes)
    model = to_onnx(source)
    if is_graph:
        refuse_training(model)
    return model


def is_torch_object(source: object) -> bool:
    """Whether a class of `source` is torch's: a module of the user's own derives from one."""
    return any(base.__module__.split(".")[0] == "torch" for base in type(source).__mro__)


def notes_on_state(model: ir.Model) -> tuple[str, ...]:
    """What a user should know of state that is not kept, in a sentence."""
    written = model.metadata_props.get(UNWRITTEN)
    if written is None:
        return ()
    return (
        f"the module writes to its {written}, and ONNX models keep nothing between runs: each run "
        "begins with the same values; to keep them, let the module take and return them",
    )

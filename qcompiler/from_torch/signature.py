"""What a program returns and writes that ONNX has no word for."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch.export.graph_signature import ConstantArgument, OutputKind

from qcompiler.from_torch import UNWRITTEN
from qcompiler.ir.errors import ModelError

__all__ = ["check_outputs", "mark_unwritten"]

_WRITES = {OutputKind.BUFFER_MUTATION: "buffer", OutputKind.USER_INPUT_MUTATION: "input"}


def check_outputs(program: torch.export.ExportedProgram) -> None:
    """Refuse results that are no tensors; None is left out, as torch's exporter does.

    Raises:
        ModelError: Says which.
    """
    specs = [s for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    for index, spec in enumerate(specs):
        if isinstance(spec.arg, ConstantArgument) and spec.arg.value is not None:
            raise ModelError(
                f"result {index} of the program is {spec.arg.value!r}, a constant and no tensor: "
                "let the module return tensors only"
            )


def mark_unwritten(model: ir.Model, program: torch.export.ExportedProgram) -> None:
    """Write down which buffers and inputs the program changes in place.

    Args:
        model: Made of it.
        program: Decomposed: before that, writes are not among its results.
    """
    specs = program.graph_signature.output_specs
    found = [f"{_WRITES[s.kind]} {s.target!r}" for s in specs if s.kind in _WRITES]
    if found:
        model.metadata_props[UNWRITTEN] = ", ".join(found)

"""What a program returns, writes and draws that a model of ONNX cannot mean."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch.export.graph_signature import ConstantArgument, OutputKind

from qcompiler.from_torch import UNWRITTEN
from qcompiler.ir.errors import ModelError
from qcompiler.ir.graph import constant, every_node, label

__all__ = ["check_outputs", "mark_unwritten", "refuse_training"]

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

    A buffer that no result is made of, such as the counter of a BatchNorm, is none of them.

    Args:
        model: Made of it.
        program: Decomposed: before that, writes are not among its results.
    """
    signature, read = program.graph_signature, _read_by_results(program)
    unread = {buffer for name, buffer in signature.inputs_to_buffers.items() if name not in read}
    found = [
        f"{_WRITES[spec.kind]} {spec.target!r}"
        for spec in signature.output_specs
        if spec.kind in _WRITES and spec.target not in unread
    ]
    if found:
        model.metadata_props[UNWRITTEN] = ", ".join(found)


def _read_by_results(program: torch.export.ExportedProgram) -> set[str]:
    """Names of the nodes that results are made of."""
    nodes = {node.name: node for node in program.graph.nodes}
    results = program.graph_signature.user_outputs
    waiting, found = [nodes[name] for name in results if name in nodes], set[str]()
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found.add(node.name)
            waiting += node.all_input_nodes
    return found


def refuse_training(model: ir.Model) -> None:
    """Refuse what was traced in training mode: graphs, unlike modules, do not say so themselves.

    Raises:
        ModelError: A Dropout draws at random.
    """
    for node in every_node(model.graph):
        mode = node.inputs[2] if node.op_type == "Dropout" and len(node.inputs) > 2 else None
        training = constant(mode)
        if training is not None and training.item():
            raise ModelError(
                f"the program is in training mode, its {label(node)!r} drops values at random: "
                "export module.eval(), or call move_exported_model_to_eval(module) of "
                "torchao.quantization.pt2e; a module that is meant to do that can be given itself"
            )

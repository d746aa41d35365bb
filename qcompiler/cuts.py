"""Cut a bundle's model where it has a tensor of the source's: to look at it, or to feed it.

A tensor of the bundle that bears the name of one of the source's is that one, computed otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

import onnx_ir as ir

from qcompiler.ir.decisions import decision_of
from qcompiler.passes.fuse_requantize import separate_results

__all__ = ["EXACT", "Cut", "altered", "cuts_of", "separated"]

_QUANTIZED, _DEQUANTIZED = "_quantized", "_dequantized"
"""What `insert_qdq` appends to the name of a tensor that it stores as integers, and gives back."""

_HALF = "_float16"
"""What `convert_float16` appends to the name of a tensor beside its float32 form."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)

EXACT = "{}@model"
"""The input that stands for a tensor of the model's."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """A tensor that both have: where it lies in the bundle, and its name in the model."""

    value: ir.Value
    tensor: str
    steps: tuple[ir.Value, ir.Value] | None
    """Scale and zero point, where the bundle has it as integers."""
    node: ir.Node


def separated(path: Path) -> ir.Model:
    """A bundle's model, with the floats that its products quantize themselves."""
    model = ir.load(path)
    separate_results(model)
    return model


def cuts_of(bundle: ir.Model, known: Collection[str]) -> list[Cut]:
    """The results of nodes that are not computed in float and that the model has too."""
    cuts: list[Cut] = []
    for node in bundle.graph:
        if decision_of(node).action == "float":
            continue
        if node.op_type == "DequantizeLinear" and any(c.value is node.inputs[0] for c in cuts):
            continue  # what it gives back was looked at where it was stored
        for value in node.outputs:
            steps = _steps(node) if value.dtype not in _FLOATS else None
            suffix = _QUANTIZED if steps else _HALF if _is_half(value) else _DEQUANTIZED
            name = value.name or ""
            tensor = name if name in known else name.removesuffix(suffix)
            if tensor in known and (steps is not None or value.dtype in _FLOATS):
                cuts.append(Cut(value, tensor, steps, node))
    return cuts


def _steps(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Scale and zero point of the integers that a node stores."""
    by_op = {"QuantizeLinear": slice(1, 3), "QConv": slice(6, 8)}
    found = [value for value in node.inputs[by_op.get(node.op_type, slice(0))] if value is not None]
    if len(found) == 2:
        return found[0], found[1]
    # A product that stores integers has its scale once per column; those who read it have it once.
    for user, index in (use for value in node.outputs for use in value.uses()):
        scale, zero = (*user.inputs[index + 1 : index + 3], None, None)[:2]
        stored = user.inputs[index]
        if not (scale and zero and stored and zero.dtype == stored.dtype):
            continue
        if scale.dtype is ir.DataType.FLOAT and _is_one(scale) and _is_one(zero):
            return scale, zero
    return None


def _is_one(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.size == 1


def altered(path: Path, cuts: Sequence[Cut], *, exact: bool) -> bytes:
    """The bundle's model with the cut tensors as outputs; and if `exact`, as inputs as well."""
    model = separated(path)
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    steps_of = {v.name: v for v in graph.initializers.values()} | values
    fed: dict[str, ir.Value] = {}
    shown: list[ir.Value] = []
    for cut in cuts:
        value = values[cut.value.name]
        uses = tuple(value.uses())
        steps = None if cut.steps is None else [steps_of[step.name] for step in cut.steps]
        if steps is not None:
            shown.append(_append(graph, ir.node("DequantizeLinear", [value, *steps])))
        elif _is_half(value):
            shown.append(_append(graph, _cast(value, ir.DataType.FLOAT)))
        else:
            shown.append(value)
        if not exact:
            continue
        if cut.tensor not in fed:
            fed[cut.tensor] = _input(graph, cut)
        source = fed[cut.tensor]
        if steps is not None:
            source = _prepend(graph, ir.node("QuantizeLinear", [source, *steps]))
        elif _is_half(value):
            source = _prepend(graph, _cast(source, ir.DataType.FLOAT16))
        for use in uses:
            use.node.replace_input_with(use.idx, source)
    graph.outputs.clear()
    graph.outputs.extend(shown)
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def _input(graph: ir.Graph, cut: Cut) -> ir.Value:
    value = ir.Value(
        name=EXACT.format(cut.tensor), type=ir.TensorType(ir.DataType.FLOAT), shape=cut.value.shape
    )
    graph.inputs.append(value)
    return value


def _append(graph: ir.Graph, node: ir.Node) -> ir.Value:
    node.outputs[0].name = f"shown@{len(graph)}"
    graph.append(node)
    return node.outputs[0]


def _prepend(graph: ir.Graph, node: ir.Node) -> ir.Value:
    node.outputs[0].name = f"stored@{len(graph)}"
    graph.insert_before(graph[0], node)
    return node.outputs[0]


def _cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    return ir.node("Cast", [value], {"to": to})


def _is_half(value: ir.Value) -> bool:
    return value.dtype is ir.DataType.FLOAT16

"""What is wrong with an ONNX file that its readers refuse, by the name of what has it.

Their own words are about their code: the file may be truncated, they say, of a value made twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

__all__ = ["fault_of"]

_TYPES = frozenset(ir.DataType)


def fault_of(model: onnx.ModelProto) -> str | None:
    """The first fault that is found, None where it is none of those that are looked for."""
    for graph in _graphs(model.graph):
        for faults in (_made_twice(graph), _unknown_types(graph), _misplaced(graph)):
            for fault in faults:
                return fault
    return None


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _made_twice(graph: onnx.GraphProto) -> Iterator[str]:
    makers = {value.name: "an input of that name" for value in graph.input}
    makers |= {tensor.name: "a weight of that name" for tensor in graph.initializer}
    for node in graph.node:
        for name in node.output:
            if name in makers:
                yield f"{name!r} is made twice, by {makers[name]} and by {_label(node)}"
            if name:
                makers[name] = _label(node)


def _unknown_types(graph: onnx.GraphProto) -> Iterator[str]:
    typed = [(f"tensor {tensor.name!r}", tensor.data_type) for tensor in _tensors(graph)]
    for value in (*graph.input, *graph.output, *graph.value_info):
        typed.append((f"value {value.name!r}", value.type.tensor_type.elem_type))
    for owner, number in typed:
        if number not in _TYPES:
            yield f"{owner} is of element type {number}, which ONNX {onnx.__version__} has not"


def _misplaced(graph: onnx.GraphProto) -> Iterator[str]:
    for tensor in _tensors(graph):
        for entry in tensor.external_data:
            if entry.key in ("offset", "length") and not entry.value.isdecimal():
                yield (
                    f"external data of tensor {tensor.name!r}: its {entry.key} is {entry.value!r}, "
                    "which is no number of bytes"
                )


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _label(node: onnx.NodeProto) -> str:
    return (
        f"{node.op_type} {node.name!r}" if node.name else f"{node.op_type}({', '.join(node.input)})"
    )

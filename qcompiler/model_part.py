"""Write the part of a model that some of its tensors depend on, without copying the model first.

Only what computes them is written, and nothing is said of tensors in between, which ONNX Runtime
finds out for itself, nor of decisions: a graph of thousands of nodes opens in half the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from qcompiler.ir.graph import bodies
from qcompiler.model_file import saving

__all__ = ["save_part"]

_SMALL = 8192
"""Bytes: larger weights go into a file beside the model, because protobuf ends at 2 GiB.  To map a
small one takes longer than to read it with the nodes."""

_PAGE = 4096
"""What offsets of weights are multiples of, so that they can be mapped."""


def save_part(model: ir.Model, tensors: Sequence[ir.Value], path: Path) -> None:
    """Write a model whose outputs are `tensors`; its weights go beside it.

    Args:
        model: It is not changed.
        tensors: Results of nodes of its main graph.
        path: The file.

    Raises:
        OptionError: The disk refuses the file.
        ModelError: The model cannot be expressed as a file.
    """
    graph = model.graph
    nodes, constants = _needed(graph, tensors)
    shell = ir.GraphView(
        graph.inputs, tensors, nodes=(), opset_imports=graph.opset_imports, name=graph.name
    )
    with saving(path):
        functions = list(model.functions.values())
        part = ir.Model(shell, ir_version=model.ir_version, functions=functions)  # type: ignore[arg-type]
        proto = ir.to_proto(part)
        for node in nodes:
            _write_node(proto.graph.node.add(), node)
            if node.domain != "":  # what ONNX Runtime may be unable to infer
                _describe(proto.graph, node, tensors)
        with path.with_name(f"{path.name}.data").open("wb") as file:
            for value in constants:
                _write(proto.graph.initializer.add(), value, file)
        path.write_bytes(proto.SerializeToString())


def _needed(graph: ir.Graph, tensors: Sequence[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes of the graph that `tensors` depend on, in order, and the constants."""
    wanted: set[ir.Value | None] = set(tensors)
    nodes = []
    for node in reversed(graph):
        if not wanted.isdisjoint(node.outputs):
            nodes.append(node)
            wanted.update(_reads(node))
    return nodes[::-1], [value for value in graph.initializers.values() if value in wanted]


def _reads(node: ir.Node) -> Iterator[ir.Value | None]:
    """What a node reads, and the graphs inside it, which may also hand out what lies outside."""
    yield from node.inputs
    for body in bodies(node):
        yield from body.outputs
        for inner in body:
            yield from _reads(inner)


def _write_node(proto: onnx.NodeProto, node: ir.Node) -> None:
    """What computes, and the name that errors give."""
    proto.op_type, proto.domain, proto.name = node.op_type, node.domain, node.name or ""
    proto.input.extend([value.name or "" if value is not None else "" for value in node.inputs])
    proto.output.extend([value.name or "" for value in node.outputs])
    for attribute in node.attributes.data.values():
        ir.serde.serialize_attribute_into(proto.attribute.add(), attribute)


def _describe(proto: onnx.GraphProto, node: ir.Node, outputs: Sequence[ir.Value]) -> None:
    for value in node.outputs:
        if value.type is not None and value not in outputs:
            ir.serde.serialize_value_into(proto.value_info.add(), value)


def _write(proto: onnx.TensorProto, value: ir.Value, file: BinaryIO) -> None:
    """One constant: small ones and texts into the model, others into the file."""
    tensor = value.const_value
    assert tensor is not None
    if tensor.dtype is ir.DataType.STRING:
        ir.serde.serialize_tensor_into(proto, tensor)
        proto.name = value.name or ""
        return
    proto.name = value.name or ""
    proto.data_type = int(tensor.dtype)
    proto.dims.extend(tensor.shape.numpy())
    if tensor.nbytes <= _SMALL:
        proto.raw_data = tensor.tobytes()
    else:
        file.write(bytes(-file.tell() % _PAGE))
        place = {"location": Path(file.name).name, "offset": file.tell(), "length": tensor.nbytes}
        for key, number in place.items():
            proto.external_data.add(key=key, value=str(number))
        proto.data_location = onnx.TensorProto.EXTERNAL
        file.write(tensor.tobytes())

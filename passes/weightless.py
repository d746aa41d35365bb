"""Write a model without its weights, for what is done in C++: inferring shapes, raising opsets.

Protobuf ends at 2 GiB, and neither depends on what a weight holds.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

__all__ = ["SMALL", "weightless_proto"]

SMALL = 1024
"""Bytes up to which integers may be a shape, indices or axes, whose values matter."""

_FEW = 64
"""The same of floats: scales of eight axes, or the ends of a Range."""


def weightless_proto(model: ir.Model) -> onnx.ModelProto:
    """A model whose initializers are its last inputs, and large ones nothing else.

    Small ones are inputs as well because before IR 4 all must be.

    Args:
        model: It is not changed, but for initializers: they are said to be what they are, and small
            ones in other files are read.
    """
    graph = model.graph
    declared = set(graph.inputs)
    shell = ir.GraphView(
        graph.inputs, graph.outputs, nodes=(), doc_string=graph.doc_string,
        opset_imports=graph.opset_imports, name=graph.name, metadata_props=graph.metadata_props,
    )  # fmt: skip
    functions = list(model.functions.values())
    version = model.ir_version
    proto = ir.to_proto(ir.Model(shell, ir_version=version, functions=functions))  # type: ignore[arg-type]
    for value in graph.initializers.values():
        if value.const_value is not None:
            _write_initializer(proto.graph, value, declared=value in declared)
    for node in graph:
        ir.serde.serialize_node_into(proto.graph.node.add(), node, model_ir_version=version)
        for value in node.outputs:
            known = value.type is not None or value.shape is not None
            if known and value.name and not value.is_graph_output():
                ir.serde.serialize_value_into(proto.graph.value_info.add(), value)
    return proto


def _write_initializer(proto: onnx.GraphProto, value: ir.Value, *, declared: bool) -> None:
    tensor = value.const_value
    assert tensor is not None
    dimensions = tensor.shape.numpy()
    if value.dtype != tensor.dtype:
        value.type = ir.TensorType(tensor.dtype)
    if value.shape is None or value.shape != dimensions:
        value.shape = ir.Shape(dimensions)
    if not declared:
        written = proto.input.add(name=value.name).type.tensor_type
        written.elem_type = int(tensor.dtype)
        written.shape.SetInParent()  # a scalar's, too, which has no dimension
        for size in dimensions:
            written.shape.dim.add(dim_value=size)
    if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= SMALL:
        # C++ would not find its file.
        tensor = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)
        value.const_value = tensor
    if tensor.nbytes <= (SMALL if tensor.dtype.is_integer() else _FEW):
        tensor.name = value.name
        ir.serde.serialize_tensor_into(proto.initializer.add(), tensor)

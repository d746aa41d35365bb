"""Infer types and shapes: what ONNX's inference learns is added to what the model says of itself.

    y = Reshape(x, [0, -1, 64])   =>   y : float[n, m, 64]

1. Weights stay where they are: protobuf ends at 2 GiB, and no shape depends on what they hold.
2. What the model says wrongly gives way: inference then also starts from its inputs alone, and what
   it finds counts more.  ORT does the same, so such a model runs.
3. What inference does not know stays as it was said: results of custom ops, names of dimensions.
4. ORT's MatMulNBits, which ONNX does not know, is inferred as the MatMul of floats that it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir

from qcompiler.ir.graph import every_node

__all__ = ["SMALL", "InferShapes", "weights_as_inputs"]

SMALL = 1024
"""Bytes up to which a tensor may be a shape, an axis or a scale, whose values matter."""
_FLOAT = onnx.TensorProto.FLOAT
_PRODUCT = "MatMulNBits"


class InferShapes(ir.passes.InPlacePass):
    """Give each value a type and a shape, as far as they can be known."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Infer in place; what cannot be inferred is no error."""
        with weights_as_inputs(model):
            proto = ir.to_proto(model)
        if any(node.op_type == _PRODUCT for node in every_node(model.graph)):
            inputs = proto.graph.input
            kinds = {value.name: value.type.tensor_type.elem_type for value in inputs}
            inputs.extend(_stand_in(proto.graph, kinds))
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
            return ir.passes.PassResult(model, _learn(model.graph, inferred.graph))
        except Exception:
            # Contradictions are among what strict inference refuses, and C++ errors of all kinds.
            changed = _learn_leniently(model, proto)
            _forget(model.graph, proto.graph)
            return ir.passes.PassResult(model, _learn_leniently(model, proto) or changed)


def _stand_in(graph: onnx.GraphProto, kinds: Mapping[str, int]) -> Iterator[onnx.ValueInfoProto]:
    """Put a MatMul by an input of the main graph in the place of each MatMulNBits; the inputs."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _stand_in(attribute.g, kinds)
        if node.op_type != _PRODUCT or node.domain != "com.microsoft":
            continue
        given = {attribute.name: attribute.i for attribute in node.attribute}
        kind, sizes = kinds.get(node.input[2]), [given.get("K"), given.get("N")]
        weight = f"{node.output[0]}_weight_of_few_bits"
        yield onnx.helper.make_tensor_value_info(weight, kind or _FLOAT, sizes)
        inputs = [node.input[0], weight]
        node.CopyFrom(onnx.helper.make_node("MatMul", inputs, [node.output[0]], node.name))


def _learn_leniently(model: ir.Model, proto: onnx.ModelProto) -> bool:
    with contextlib.suppress(Exception):
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    return _learn(model.graph, proto.graph)


@contextlib.contextmanager
def weights_as_inputs(model: ir.Model) -> Iterator[list[ir.Value]]:
    """Inside the block, initializers of the main graph are its last inputs, large ones only that.

    The model can then go through protobuf; small ones are inputs because before IR 4 all must be.
    """
    graph = model.graph
    inputs, initializers = list(graph.inputs), list(graph.initializers.values())
    declared = set(inputs)
    moved = [value for value in initializers if value not in declared and value.const_value]
    for value in moved:
        assert value.const_value is not None
        value.type = ir.TensorType(value.const_value.dtype)
        value.shape = ir.Shape(value.const_value.shape.numpy())
        if value.const_value.nbytes > SMALL:
            del graph.initializers[str(value.name)]
        elif isinstance(value.const_value, ir.ExternalTensor):
            # Axes and shapes, which C++ would not find in another file.
            array = value.const_value.numpy().copy()
            value.const_value = ir.Tensor(array, dtype=value.dtype, name=value.name)
    graph.inputs.extend(moved)
    try:
        yield moved
    finally:
        graph.inputs.clear()
        graph.inputs.extend(inputs)
        graph.initializers.clear()
        for value in initializers:
            graph.register_initializer(value)


def _branches(
    graph: ir.Graph, proto: onnx.GraphProto
) -> Iterator[tuple[ir.Graph, onnx.GraphProto]]:
    """The graphs inside the nodes of a graph, each with its proto."""
    for node, written in zip(graph, proto.node, strict=True):
        if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            for attribute in written.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    yield node.attributes[attribute.name].as_graph(), attribute.g


def _forget(graph: ir.Graph, proto: onnx.GraphProto) -> None:
    """Take from a proto what it says of the results of standard ops."""
    standard = {out.name for node in graph if node.domain == "" for out in node.outputs}
    kept = [info for info in proto.value_info if info.name not in standard]
    del proto.value_info[:]
    proto.value_info.extend(kept)
    for output in proto.output:
        if output.name in standard and output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    for inner, written in _branches(graph, proto):
        _forget(inner, written)


def _learn(graph: ir.Graph, proto: onnx.GraphProto) -> bool:
    """Take over what a proto says of a graph's results; whether anything was new."""
    known = {info.name: info.type for info in [*proto.value_info, *proto.output]}
    changed = False
    for node in graph:
        for value in node.outputs:
            if value.name and value.name in known:
                changed |= _learn_type(value, known[value.name])
    for inner, written in _branches(graph, proto):
        changed |= _learn(inner, written)
    return changed


def _learn_type(value: ir.Value, proto: onnx.TypeProto) -> bool:
    if not proto.HasField("tensor_type"):
        type = ir.serde.deserialize_type_proto_for_type(proto)  # a sequence, an optional
        changed, value.type = type != value.type, type or value.type
        return changed
    tensor, before = proto.tensor_type, (value.type, value.shape)
    if tensor.elem_type and (value.type is None or value.type.dtype != tensor.elem_type):
        value.type = ir.TensorType(ir.DataType(tensor.elem_type))
    if tensor.HasField("shape"):
        inferred = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
                    for dim in tensor.shape.dim]  # fmt: skip
        if value.shape is None or value.shape != inferred:
            value.shape = _merge(ir.Shape(inferred), value.shape)
    return before != (value.type, value.shape)


def _merge(inferred: ir.Shape, said: ir.Shape | None) -> ir.Shape:
    """The inferred shape, with the names and sizes that only the model gives; none if it errs."""
    if said is None or len(said) != len(inferred):
        return inferred
    pairs = list(zip(inferred, said, strict=True))
    if any(isinstance(new, int) and isinstance(old, int) and new != old for new, old in pairs):
        return inferred
    return ir.Shape([new if isinstance(new, int) or not _says(old) else old for new, old in pairs])


def _says(dimension: int | ir.SymbolicDim) -> bool:
    return isinstance(dimension, int) or dimension.value is not None

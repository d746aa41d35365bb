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
import dataclasses
from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir

from qcompiler.ir.graph import bodies, every_node
from qcompiler.passes.infer_in_parts import infer_shapes
from qcompiler.passes.weightless import weightless_proto

__all__ = ["InferShapes", "merge_shapes"]

_FLOAT = onnx.TensorProto.FLOAT
_PRODUCT = "MatMulNBits"


class InferShapes(ir.passes.InPlacePass):
    """Give each value a type and a shape, as far as they can be known.

    Attributes:
        in_doubt: Whether the last model was contradictory, or had something ONNX cannot infer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_doubt = False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Infer in place; what cannot be inferred is no error."""
        self.in_doubt = False
        proto = weightless_proto(model)
        if any(node.op_type == _PRODUCT for node in every_node(model.graph)):
            inputs = proto.graph.input
            kinds = {value.name: value.type.tensor_type.elem_type for value in inputs}
            inputs.extend(_stand_in(proto.graph, kinds))
        try:
            inferred = infer_shapes(proto, strict=True)
            return ir.passes.PassResult(model, _learn(model.graph, inferred.graph))
        except Exception:
            # Contradictions are among what strict inference refuses, and C++ errors of all kinds.
            self.in_doubt, changed = True, _learn_leniently(model, proto)
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
        proto = infer_shapes(proto, strict=False)
    return _learn(model.graph, proto.graph)


def _branches(
    graph: ir.Graph, proto: onnx.GraphProto
) -> Iterator[tuple[ir.Graph, onnx.GraphProto]]:
    """The graphs inside the nodes of a graph, each with its proto."""
    for node, written in zip(graph, proto.node, strict=True):
        if bodies(node):
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


@dataclasses.dataclass(frozen=True)
class _Said:
    """A tensor's type and dimensions, as far as a proto says them."""

    dtype: ir.DataType | None
    dimensions: list[int | ir.SymbolicDim] | None


def _learn(graph: ir.Graph, proto: onnx.GraphProto) -> bool:
    """Take over what a proto says of a graph's results; whether anything was new."""
    known = {info.name: info.type for info in [*proto.value_info, *proto.output]}
    read: dict[bytes, _Said] = {}
    changed = False
    for node in graph:
        for value in node.outputs:
            if value.name and value.name in known:
                changed |= _learn_type(value, known[value.name], read)
    for inner, written in _branches(graph, proto):
        changed |= _learn(inner, written)
    return changed


def _learn_type(value: ir.Value, proto: onnx.TypeProto, read: dict[bytes, _Said]) -> bool:
    if not proto.HasField("tensor_type"):
        type = ir.serde.deserialize_type_proto_for_type(proto)  # a sequence, an optional
        changed, value.type = type != value.type, type or value.type
        return changed
    # Thousands of values are of a few types, and each field of a proto takes time to read.
    key, changed = proto.SerializeToString(), False
    said = read[key] if key in read else read.setdefault(key, _said(proto.tensor_type))
    if said.dtype is not None and (value.type is None or value.type.dtype != said.dtype):
        value.type, changed = ir.TensorType(said.dtype), True
    if said.dimensions is not None and (value.shape is None or value.shape != said.dimensions):
        before, value.shape = value.shape, merge_shapes(ir.Shape(said.dimensions), value.shape)
        changed = changed or before != value.shape
    return changed


def _said(tensor: onnx.TypeProto.Tensor) -> _Said:
    dimensions = [
        dim.dim_value if dim.HasField("dim_value") else ir.SymbolicDim(dim.dim_param or None)
        for dim in tensor.shape.dim
    ]
    dtype = ir.DataType(tensor.elem_type) if tensor.elem_type else None
    return _Said(dtype, dimensions if tensor.HasField("shape") else None)


def merge_shapes(inferred: ir.Shape, said: ir.Shape | None) -> ir.Shape:
    """The inferred shape, with the names and sizes that only the model gives; none if it errs."""
    if said is None or len(said) != len(inferred):
        return inferred
    pairs = list(zip(inferred, said, strict=True))
    if any(isinstance(new, int) and isinstance(old, int) and new != old for new, old in pairs):
        return inferred
    return ir.Shape([new if isinstance(new, int) or not _says(old) else old for new, old in pairs])


def _says(dimension: int | ir.SymbolicDim) -> bool:
    return isinstance(dimension, int) or dimension.value is not None

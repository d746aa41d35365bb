"""The graph edit that every pass makes which rounds weights, and which products it is made for.

    y = MatMul(x, W)   =>   y = MatMul(x, DQ(W_q, s))       or DQ(W_q, s, z)
                                                            or DQ(W_q, s) + Gather(o, groups)

No zero point of ONNX lies between two integers, so offsets o [G, N] are added, the row of its group
for each row of W.  A weight that other nodes read too keeps its float form for them.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import broadcast_scale, dequantize, slices_below_scale
from qcompiler.ir.decisions import add_note, plan_of
from qcompiler.ir.errors import ModelError
from qcompiler.ir.graph import constant, drop_if_unread, label, new_initializer
from qcompiler.ir.on_disk import let_go
from qcompiler.ir.two_level import split_scale
from qcompiler.ir.types import PerAxis, PerGroup, QuantType

__all__ = [
    "Layer",
    "RoundedWeight",
    "by_data",
    "finite_weight",
    "layers_of",
    "note_small_weights",
    "place_dequantize",
]


@dataclasses.dataclass(frozen=True)
class RoundedWeight:
    """Stored values and how to read them, in ONNX shapes.

    Attributes:
        stored: [K, N] of the storage type.
        scale: Of the expressed type, one per slice or group.
        zero_point: In the shape of the scale, of the storage type; None stands for the middle.
        offset: In the shape of the scale, what a stored 0 stands for; None stands for 0.
    """

    stored: NDArray[Any]
    scale: NDArray[Any]
    zero_point: NDArray[Any] | None = None
    offset: NDArray[Any] | None = None

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Arrays of types that numpy's own file format knows: it has none of 4 bits."""
        byte = np.uint8 if self.stored.dtype.name.startswith("u") else np.int8
        arrays = {"stored": self.stored.astype(byte), "scale": self.scale}
        if self.zero_point is not None:
            arrays["zero_point"] = self.zero_point.astype(byte)
        if self.offset is not None:
            arrays["offset"] = self.offset
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], type: QuantType) -> RoundedWeight:
        """What `to_arrays` gave."""
        storage, zero = type.storage.numpy(), arrays.get("zero_point")
        return cls(
            arrays["stored"].astype(storage),
            arrays["scale"],
            None if zero is None else zero.astype(storage),
            arrays.get("offset"),
        )

    def floats(self, type: QuantType) -> NDArray[np.float32]:
        """What its DequantizeLinear will compute."""
        floats = np.asarray(dequantize(self.stored, self.scale, type, self.zero_point), np.float32)
        if self.offset is not None:
            floats += broadcast_scale(self.offset, floats.shape, type.granularity)
        return floats


@dataclasses.dataclass(frozen=True)
class Layer:
    """A matrix that is to be rounded, and the planned products that read it.

    Attributes:
        weight: The constant, [K, N].
        type: What it is to be stored as.
        nodes: The MatMuls, in graph order.
    """

    weight: ir.Value
    type: QuantType
    nodes: tuple[ir.Node, ...]

    @property
    def name(self) -> str:
        """How messages and caches call it: by the first product that reads it."""
        return label(self.nodes[0])

    @property
    def data(self) -> ir.Value:
        """What the first product multiplies, [..., K]."""
        value = self.nodes[0].inputs[0]
        assert value is not None
        return value

    def replace(self, graph: ir.Graph, rounded: RoundedWeight) -> None:
        """Let the products read the rounded weight."""
        array = constant(self.weight)
        assert array is not None
        note_small_weights(self.nodes, array, rounded.scale, self.type)
        dequantize = place_dequantize(graph, self.weight, self.type, rounded)
        for node in self.nodes:
            node.replace_input_with(1, dequantize.outputs[0])
        let_go(self.weight)
        drop_if_unread(self.weight)


def layers_of(nodes: Iterable[ir.Node], *roundings: str) -> list[Layer]:
    """The matrices that MatMuls plan to round in one of these ways, while they are still floats.

    Each is there once per type, in the order of the nodes.
    """
    found: dict[tuple[ir.Value, QuantType], list[ir.Node]] = {}
    for node in nodes:
        plan = plan_of(node) if node.op_type == "MatMul" else None
        weight = node.inputs[1] if plan is not None else None
        if plan is None or plan.rounding not in roundings:
            continue
        if weight is not None and constant(weight) is not None:
            found.setdefault((weight, plan.weight), []).append(node)
    return [Layer(weight, type, tuple(nodes)) for (weight, type), nodes in found.items()]


def by_data(layers: Sequence[Layer]) -> dict[ir.Value, list[Layer]]:
    """Layers whose first products read the same value, in the order of the first of them."""
    groups: dict[ir.Value, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.data, []).append(layer)
    return groups


def finite_weight(node: ir.Node, weight: ir.Value) -> NDArray[np.float32]:
    """The floats of a constant.

    Raises:
        ModelError: It holds NaN or Inf.
    """
    array = np.asarray(constant(weight), np.float32)
    count = int(array.size - np.isfinite(array).sum())
    if count:
        named = shlex.quote(node.name or "")
        raise ModelError(
            f"the weight {weight.name!r} of {label(node)!r} holds {count} NaN or Inf; repair the "
            f"model, or keep the node float with --keep-float {named}"
        )
    return array


def note_small_weights(
    nodes: Iterable[ir.Node], weight: NDArray[Any], scale: NDArray[Any], type: QuantType
) -> None:
    """Say where weights lie below the smallest scale: denormal ones, for example, become 0."""
    if count := slices_below_scale(weight, scale, type):
        for node in nodes:
            add_note(
                node, f"weights of {count} scales are below the smallest, and lose bits or all"
            )


def place_dequantize(
    graph: ir.Graph, weight: ir.Value, type: QuantType, rounded: RoundedWeight
) -> ir.Node:
    """What makes the floats of a rounded weight, at the front of the graph.

    A DequantizeLinear; of a weight with offsets the Add behind it.
    """
    name = weight.name or "weight"
    stored = rounded.stored
    # First, because each goes to the front: an Add stands behind the last of what it reads.
    offset = None if rounded.offset is None else _place_offset(graph, name, type, rounded)
    inputs = [
        new_initializer(graph, f"{name}_{type.storage.name.lower()}", stored, type.storage),
        _place_scale(graph, name, type, rounded),
    ]
    if rounded.zero_point is not None:
        zero = rounded.zero_point
        inputs.append(new_initializer(graph, f"{name}_zero_point", zero, type.storage))
    attributes = {"axis": 0}
    match type.granularity:
        case PerAxis(axis):
            attributes = {"axis": axis}
        case PerGroup(axis, group_size):
            attributes = {"axis": axis, "block_size": group_size}
    node = ir.node("DequantizeLinear", inputs, attributes, name=f"{name}_dequantize")
    _place(graph, node, f"{name}_dequantized", stored.shape, type.expressed)
    if offset is None:
        return node
    add = ir.node("Add", [node.outputs[0], offset], name=f"{name}_add_offset")
    return _place(graph, add, f"{name}_moved", stored.shape, type.expressed)


def _place_offset(graph: ir.Graph, name: str, type: QuantType, rounded: RoundedWeight) -> ir.Value:
    """The offset of each element, [K, N]: the row of its group; looked up as it is stored."""
    assert rounded.offset is not None and isinstance(type.granularity, PerGroup)
    shape = rounded.stored.shape
    rows = np.arange(shape[0]) // type.granularity.group_size
    offsets, column = rounded.offset, None
    if type.two_level:
        offsets, column = split_scale(offsets, zero=True)
    inputs = [
        new_initializer(graph, f"{name}_offset", offsets),
        new_initializer(graph, f"{name}_group_of_row", rows),
    ]
    node = ir.node("Gather", inputs, {"axis": 0}, name=f"{name}_offset_of_row")
    if column is None:
        return _place(graph, node, f"{name}_offsets", shape, type.expressed).outputs[0]
    _place(graph, node, f"{name}_offsets_int8", shape, ir.DataType.INT8)
    floats = new_initializer(graph, f"{name}_offset_of_column", column)
    widen = ir.node("DequantizeLinear", [node.outputs[0], floats], {"axis": 1},
                    name=f"{name}_offset_dequantize")  # fmt: skip
    return _place(graph, widen, f"{name}_offsets", shape, type.expressed).outputs[0]


def _place_scale(graph: ir.Graph, name: str, type: QuantType, rounded: RoundedWeight) -> ir.Value:
    """The scale that a DequantizeLinear reads: a constant, or another one's result."""
    if not type.two_level:
        return new_initializer(graph, f"{name}_scale", rounded.scale)
    groups, column = split_scale(rounded.scale)
    inputs = [
        new_initializer(graph, f"{name}_scale_int8", groups),
        new_initializer(graph, f"{name}_scale_of_column", column),
    ]
    node = ir.node("DequantizeLinear", inputs, {"axis": 1}, name=f"{name}_scale_dequantize")
    return _place(graph, node, f"{name}_scale", groups.shape, type.expressed).outputs[0]


def _place(
    graph: ir.Graph, node: ir.Node, name: str, shape: tuple[int, ...], dtype: ir.DataType
) -> ir.Node:
    """Put a node behind the others of constants, at the front of the graph."""
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, dtype, ir.Shape(shape)
    makers = [maker for value in node.inputs if value and (maker := value.producer())]
    if makers:
        graph.insert_after(makers[-1], node)
    else:
        graph.insert_before(graph[0], node)
    return node

"""Bring DQ next to the ops that read it, past ops that only move data.

    Move(DQ(q, s, z))      =>   DQ(Move(q), s, z)
    Q(DQ(q, s, z), s, z)   =>   q

Part of `normalize_qdq`; `pull_quantize` is its counterpart.  All of it is exact: what moves data
commutes with rounding, and a maximum with everything that keeps the order.  One scale for all goes
everywhere, scales along an axis where that axis survives (`moved_axis`).  A constant is moved here,
not when the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with, replace_nodes_and_values

from qcompiler.ir.decisions import decide, inherit
from qcompiler.ir.graph import constant, dequantize_of, new_initializer
from qcompiler.passes.moved_axis import moved_axis
from qcompiler.passes.qdq_parameters import (
    is_pair,
    is_per_tensor,
    is_read_as_weight,
    same_parameters,
    zero_of,
)

__all__ = [
    "MOVES",
    "data_of",
    "interpolates",
    "move_constant",
    "no_integer_form",
    "on_integers",
    "push_dequantize",
    "try_cancel",
]

MOVES = frozenset({
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad",
    "Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
})  # fmt: skip
"""Ops that only move data."""
_BYTES_ONLY = frozenset({"DepthToSpace", "Expand", "MaxPool", "Pad", "Resize", "SpaceToDepth"})
"""What ONNX Runtime moves as bytes, but not as 16-bit integers."""
_BYTES = frozenset({ir.DataType.INT8, ir.DataType.UINT8})
_WIDER = frozenset({ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT32})
_OF_CONSTANTS = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def push_dequantize(graph: ir.Graph, node: ir.Node) -> bool:
    """Move(DQ(q)) => DQ(Move(q)); False, with the reason on the node, if it has to stay."""
    if node.domain == "" and node.op_type in ("Shape", "Size"):
        widened = dequantize_of(node.inputs[0])
        if widened is not None:
            node.replace_input_with(0, widened.inputs[0])
        return widened is not None
    if node.domain != "" or node.op_type not in MOVES:
        return False
    found = [dequantize_of(value) for value in data_of(node)]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < len(found):
        return False
    parameters = _carried(graph, node, pairs)
    if isinstance(parameters, str):
        decide(node, "float", f"not moved in front of its dequantization: {parameters}")
        return False
    _push(graph, node, pairs, *parameters)
    return True


def data_of(move: ir.Node) -> Sequence[ir.Value | None]:
    """What an op moves: its first input, or all of them."""
    return move.inputs if move.op_type == "Concat" else move.inputs[:1]


def _carried(
    graph: ir.Graph, move: ir.Node, pairs: Sequence[ir.Node]
) -> tuple[list[ir.Value | None], dict[str, int]] | str:
    """Scale, zero point and attributes of a DQ after `move`, or why there is none."""
    first = pairs[0]
    if any(not same_parameters(first, pair) for pair in pairs[1:]):
        return "its operands have different scales"
    if (why := no_integer_form(move, first.inputs[0], first.inputs[1])) is not None:
        return why
    parameters = list(first.inputs[1:])
    if is_per_tensor(first):
        return parameters, {}
    rank = len(first.inputs[0].shape or ()) if first.inputs[0] is not None else 0
    axis = first.attributes.get_int("axis", 1)
    block = first.attributes.get_int("block_size", 0)
    moved = moved_axis(move, axis + rank * (axis < 0))
    if moved is None or (block and move.op_type != "Transpose"):
        return "the axis of its scales does not survive"
    if not block:
        return parameters, {"axis": moved}
    if move.graph is not graph:
        # Making MatMulNBits of it, ORT 1.31 looks for the weight inside the branch and fails.
        return "ORT does not find weights in blocks from inside a branch"
    arrays = [constant(value) for value in parameters]
    if any(array is None for array in arrays):
        return "the scales of its blocks are computed"
    order = move.attributes.get_ints("perm", list(reversed(range(rank))))
    turned = [
        new_initializer(graph, f"{move.name}_scale", np.ascontiguousarray(array.transpose(order)))
        for array in arrays
        if array is not None
    ]
    return [*turned], {"axis": moved, "block_size": block}


def interpolates(move: ir.Node) -> bool:
    """Whether a Resize does more than to repeat or drop elements."""
    mode = move.attributes.get_string("mode", "nearest")
    crops = "crop" in move.attributes.get_string("coordinate_transformation_mode", "")
    return move.op_type == "Resize" and (mode != "nearest" or crops)


def no_integer_form(move: ir.Node, stored: ir.Value | None, scale: ir.Value | None) -> str | None:
    """Why an op cannot move integers that are stored with `scale` in place of floats."""
    kind = None if stored is None else stored.dtype
    if constant(stored) is not None and move.op_type in _OF_CONSTANTS:
        return None if _is_static(move.outputs[0]) else "the shape of a weight is unknown"
    if kind not in _BYTES and (kind not in _WIDER or move.op_type in _BYTES_ONLY):
        return f"ONNX Runtime does not move {'unknown types' if kind is None else kind.name} there"
    attributes = move.attributes
    if move.op_type == "MaxPool" and any(v.uses() or v.is_graph_output() for v in move.outputs[1:]):
        return "the indices of its maxima are read"
    if move.op_type == "MaxPool" and not _keeps_order(scale):
        return "its scale may be negative, and the largest then is the smallest stored"
    if interpolates(move):
        return "it interpolates"
    if move.op_type == "Pad" and attributes.get_string("mode", "constant") == "constant":
        value = move.inputs[2] if len(move.inputs) > 2 else None
        fill = np.zeros(1) if value is None else constant(value)
        if fill is None or fill.any():
            return "it pads with another value than 0"
    return None


def _keeps_order(scale: ir.Value | None) -> bool:
    array, maker = constant(scale), scale.producer() if scale is not None else None
    if array is None:
        return maker is not None and maker.op_type == "DynamicQuantizeLinear"
    return bool((array >= 0).all())


def _push(
    graph: ir.Graph,
    move: ir.Node,
    pairs: Sequence[ir.Node],
    parameters: Sequence[ir.Value | None],
    attributes: dict[str, int],
) -> None:
    stored = [pair.inputs[0] for pair in pairs]
    array = constant(stored[0]) if move.op_type in _OF_CONSTANTS else None
    if array is not None:
        results, new = [_moved_constant(graph, move, array)], []
    else:
        moved = on_integers(move, stored, zero_of(pairs[0]))
        results, new = list(moved.outputs), [moved]
    widened = [
        ir.node("DequantizeLinear", [result, *parameters], attributes, name=f"{move.name}_widen")
        for result in results
    ]
    for node in widened:
        node.metadata_props.update(pairs[0].metadata_props)
    outputs = [node.outputs[0] for node in widened]
    assert move.graph is not None
    replace_nodes_and_values(
        move.graph, move, [move], [*new, *widened], list(move.outputs)[: len(outputs)], outputs
    )


def _moved_constant(graph: ir.Graph, move: ir.Node, array: np.ndarray) -> ir.Value:
    shape = move.outputs[0].shape
    assert shape is not None and move.inputs[0] is not None
    if move.op_type == "Transpose":
        order = move.attributes.get_ints("perm", list(reversed(range(array.ndim))))
        array = np.ascontiguousarray(array.transpose(order))
    else:
        array = array.reshape(shape.numpy())
    return new_initializer(graph, f"{move.name}_stored", array, ir.DataType.from_numpy(array.dtype))


def on_integers(move: ir.Node, data: Sequence[ir.Value | None], zero: ir.Value | None) -> ir.Node:
    """The same move of stored values, not yet in a graph.

    Args:
        move: Of floats.
        data: What it is to move.
        zero: What it pads with instead of 0.0.
    """
    inputs = [*data, *move.inputs[len(data) :]]
    constant_pad = move.attributes.get_string("mode", "constant") == "constant"
    if move.op_type == "Pad" and constant_pad:
        inputs = [*inputs[:2], zero, *inputs[3:]]
    # A second output of MaxPool, which nothing reads, is left out.
    count = 1 if move.op_type == "MaxPool" else len(move.outputs)
    new = ir.node(move.op_type, inputs, move.attributes, num_outputs=count)
    inherit(new, move)
    for value, old in zip(new.outputs, move.outputs, strict=False):
        value.type = data[0].type if data[0] is not None else None
        value.shape, value.name = old.shape, f"{old.name}_stored"
    decide(new, "qdq", "moves stored integers")
    return new


def move_constant(graph: ir.Graph, move: ir.Node) -> bool:
    """DQ(Move(W)) => DQ(W'): a weight that an embedding shares is turned once, not in every run.

    Its integers are then in the model twice, which is half of what one float copy would take.
    """
    if move.domain != "" or move.op_type not in _OF_CONSTANTS or move.graph is None:
        return False
    array, result = constant(move.inputs[0]), move.outputs[0]
    readers = [use.node for use in result.uses()]
    if array is None or result.is_graph_output() or not _is_static(result) or not readers:
        return False
    if not all(
        is_pair(reader, "DequantizeLinear") and is_read_as_weight(reader) for reader in readers
    ):
        return False
    replace_all_uses_with(result, _moved_constant(graph, move, array))
    move.graph.remove(move, safe=True)
    return True


def try_cancel(quantize: ir.Node) -> bool:
    """Q(DQ(q)) => q where both have the same parameters; else it is a requantization."""
    if not is_pair(quantize, "QuantizeLinear"):
        return False
    widened = dequantize_of(quantize.inputs[0])
    stored = widened.inputs[0] if widened is not None else None
    if widened is None or stored is None:
        return False
    if not same_parameters(widened, quantize):
        decide(quantize, "qdq", "requantize: the values before it have another scale or zero point")
        return False
    if quantize.outputs[0].is_graph_output() or quantize.graph is None:
        return False
    replace_all_uses_with(quantize.outputs[0], stored)
    quantize.graph.remove(quantize, safe=True)
    return True


def _is_static(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.is_static()

"""Store activations as uint8, the form that integer kernels multiply.

    Q(x, s, z_i8) ... DQ(q, s, z_i8)   =>   Q(x, s, z_i8 + 128) ... DQ(q, s, z_i8 + 128)

Part of `normalize_qdq`.  The numbers are the same: every stored value lies 128 higher.  Changed are
whole sets of values that ops which only move data connect, and only if none of them is seen from
outside: as an input or output of the graph, or as a weight.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import constant, drop_if_unread, every_node, new_initializer
from qcompiler.passes.move_pairs import MOVES, data_of, interpolates
from qcompiler.passes.qdq_parameters import is_pair, is_per_tensor, is_weight, shifted, zero_of

__all__ = ["make_unsigned"]


@dataclasses.dataclass
class _Connected:
    """Stored values that must have one type, and the nodes that say which.

    As keys, in the order in which they were found: the same model gives the same bytes.
    """

    values: dict[ir.Value, None] = dataclasses.field(default_factory=dict)
    constants: list[ir.Value] = dataclasses.field(default_factory=list)
    pairs: dict[ir.Node, None] = dataclasses.field(default_factory=dict)
    pads: dict[ir.Node, None] = dataclasses.field(default_factory=dict)


def make_unsigned(graph: ir.Graph) -> int:
    """Store all activations that allow it as uint8; how many Q and DQ changed."""
    seen: set[ir.Value] = set()
    zeros: dict[int, ir.Value] = {}
    changed = 0
    for node in list(every_node(graph)):
        stored = _stored(node)
        if stored is None or stored in seen or stored.dtype is not ir.DataType.INT8:
            continue
        connected = _Connected()
        movable = _connect(stored, connected)
        seen.update(connected.values)
        if movable:
            _shift(graph, connected, zeros)
            changed += len(connected.pairs)
    return changed


def _stored(node: ir.Node) -> ir.Value | None:
    if is_pair(node, "QuantizeLinear"):
        return node.outputs[0]
    return node.inputs[0] if is_pair(node, "DequantizeLinear") else None


def _connect(start: ir.Value, found: _Connected) -> bool:
    """Collect what is connected with `start`; False if some of it has to stay int8."""
    todo = [start]
    while todo:
        value = todo.pop()
        if value in found.values:
            continue
        found.values[value] = None
        more = _neighbours(value, found)
        if more is None:
            return False
        todo += more
    return True


def _neighbours(value: ir.Value, found: _Connected) -> list[ir.Value] | None:
    """The stored values before and after those that move `value`; None if it has to stay int8."""
    maker = value.producer()
    nodes = [use.node for use in value.uses()]
    if value.is_graph_output() or value.is_graph_input():
        return None
    more: list[ir.Value] = []
    if maker is not None:
        nodes.append(maker)
    elif constant(value) is None:
        return None
    else:
        found.constants.append(value)
    for node in nodes:
        if node.op_type in ("Shape", "Size"):
            continue
        if _stored(node) is value and _may_shift(node):
            found.pairs[node] = None
        elif node.domain == "" and node.op_type in MOVES and _moves(node, value):
            more += [v for v in [*data_of(node), *node.outputs] if v is not None]
            if node.op_type == "Pad":
                found.pads[node] = None
        else:
            return None
    return more


def _moves(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node moves `value`, and makes no numbers of its own that would have to shift."""
    fill = node.inputs[2] if node.op_type == "Pad" and len(node.inputs) > 2 else None
    if interpolates(node) or (fill is not None and constant(fill) is None):
        return False
    return value in node.outputs or value in data_of(node)


def _may_shift(pair: ir.Node) -> bool:
    zero = constant(zero_of(pair))
    if zero is None or not is_per_tensor(pair):
        return False
    return pair.op_type == "QuantizeLinear" or not is_weight(pair)


def _shift(graph: ir.Graph, found: _Connected, zeros: dict[int, ir.Value]) -> None:
    for pair in found.pairs:
        old = zero_of(pair)
        pair.replace_input_with(2, _shifted_zero(graph, old, zeros))
        assert old is not None
        drop_if_unread(old)
    for pad in found.pads:
        if pad.attributes.get_string("mode", "constant") == "constant":
            old = pad.inputs[2] if len(pad.inputs) > 2 else None
            pad.resize_inputs(max(len(pad.inputs), 3))
            pad.replace_input_with(2, _shifted_zero(graph, old, zeros))
    for value in found.values:
        value.dtype = ir.DataType.UINT8
    for value in found.constants:
        array = constant(value)
        assert array is not None
        new = new_initializer(graph, f"{value.name}_uint8", shifted(array))
        ir.convenience.replace_all_uses_with(value, new)
        drop_if_unread(value)


def _shifted_zero(graph: ir.Graph, zero: ir.Value | None, known: dict[int, ir.Value]) -> ir.Value:
    array = constant(zero)
    point = 0 if array is None else int(array.item())
    if point not in known:
        number = shifted(np.asarray(point, np.int8))
        known[point] = new_initializer(graph, "zero_point", np.asarray(number))
    return known[point]

"""One spelling for the scales and zero points of Q and DQ.

    activations   DQ(q, s)          =>   DQ(q, s, 0)           a zero of the stored type
                  DQ(q, [s], [z])   =>   DQ(q, s, z)           scalars where one is for all
                  Q(x, s)           =>   Q(x, s, 0)            output_dtype goes into the zero
    weights       DQ(Q(W, s), s)    =>   DQ(W_q, s)            over a float constant
                  DQ(W, s, 0)       =>   DQ(W, s)              and the int32 of a bias
                  DQ(W_u8, s, z)    =>   DQ(W_u8 - 128, s, z - 128)

Part of `normalize_qdq`.  All of it is exact.  Blocks and floats of 8 bits are left as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir import arithmetic
from qcompiler.ir.graph import constant, drop_if_unread, new_initializer
from qcompiler.ir.params import quant_params

__all__ = [
    "MIDDLE",
    "is_pair",
    "is_per_tensor",
    "is_read_as_weight",
    "is_weight",
    "same_parameters",
    "shifted",
    "spell_out",
    "store_constant",
    "zero_of",
]

MIDDLE = 128
"""How far the int8 and the uint8 of the same number lie apart."""

_WEIGHTS = frozenset({
    ("Conv", 1), ("ConvTranspose", 1), ("MatMul", 1), ("Gemm", 1), ("LayerNormalization", 1),
    ("LSTM", 1), ("LSTM", 2), ("GRU", 1), ("GRU", 2), ("RNN", 1), ("RNN", 2),
})  # fmt: skip
"""Where a constant is a weight; elsewhere it is an operand like any activation."""


def is_pair(node: ir.Node | None, op_type: str) -> bool:
    """Whether a node is a Q or a DQ of the standard domain."""
    return node is not None and node.domain == "" and node.op_type == op_type


def is_weight(dequantize: ir.Node) -> bool:
    """Whether a DQ widens a constant that a reader takes for weights."""
    return constant(dequantize.inputs[0]) is not None and is_read_as_weight(dequantize)


def is_read_as_weight(dequantize: ir.Node) -> bool:
    """Whether a reader of a DQ takes it for weights."""
    uses = [(use.node.op_type, use.idx) for use in dequantize.outputs[0].uses()]
    return any(use in _WEIGHTS for use in uses)


def is_per_tensor(node: ir.Node) -> bool:
    """Whether a Q or DQ has one scale for all elements; only a known shape proves it."""
    scale = node.inputs[1]
    if scale is None or node.attributes.get_int("block_size", 0) > 0:
        return False
    maker = scale.producer()
    if maker is not None and maker.op_type == "DynamicQuantizeLinear":
        return True
    return scale.shape is not None and all(size == 1 for size in scale.shape)


def zero_of(node: ir.Node) -> ir.Value | None:
    """The zero point of a Q or DQ, None where it is left out."""
    return node.inputs[2] if len(node.inputs) > 2 else None


def same_parameters(a: ir.Node, b: ir.Node) -> bool:
    """Whether two of Q and DQ have the same scales, zero points, axis and blocks."""
    if not (is_per_tensor(a) and is_per_tensor(b)):
        for name, default in (("axis", 1), ("block_size", 0)):
            if a.attributes.get_int(name, default) != b.attributes.get_int(name, default):
                return False
    return _same(a.inputs[1], b.inputs[1]) and _same_zeros(a, b)


def _same(a: ir.Value | None, b: ir.Value | None) -> bool:
    x, y = constant(a), constant(b)
    if a is b or x is None or y is None:
        return a is b
    return x.dtype == y.dtype and x.size == y.size and bool((x.reshape(-1) == y.reshape(-1)).all())


def _same_zeros(a: ir.Node, b: ir.Node) -> bool:
    if zero_of(a) is not None and zero_of(b) is not None:
        return _same(zero_of(a), zero_of(b))
    zeros = [constant(zero) for zero in (zero_of(a), zero_of(b)) if zero is not None]
    absent = all(zero is not None and not zero.any() for zero in zeros)
    return absent and _stored_type(a) is _stored_type(b)


def _stored_type(node: ir.Node) -> ir.DataType | None:
    stored = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    return None if stored is None else stored.dtype


def store_constant(graph: ir.Graph, quantize: ir.Node) -> bool:
    """Q over a float constant: its integers are known before the model runs."""
    params, source, stored = quant_params(quantize), quantize.inputs[0], quantize.outputs[0]
    floats = constant(source)
    if params is None or source is None or floats is None or stored.is_graph_output():
        return False
    scales, zeros, type = params.scales, params.zeros, params.type
    saturates = quantize.attributes.get_int("saturate", 1) != 0
    if scales is None or zeros is None or not saturates:
        return False
    # ONNX Runtime divides halves as float32 too.
    array = arithmetic.quantize(floats.astype(np.float32), scales.astype(np.float32), type, zeros)
    assert quantize.graph is not None
    value = new_initializer(graph, f"{source.name}_stored", array, type.storage)
    ir.convenience.replace_all_uses_with(stored, value)
    quantize.graph.remove(quantize, safe=True)
    drop_if_unread(source)
    return True


def spell_out(graph: ir.Graph, node: ir.Node) -> bool:
    """Bring one Q or DQ into the form above; False if it has it already."""
    kind = _stored_type(node)
    if kind is None or not kind.is_integer() or node.attributes.get_int("block_size", 0) > 0:
        return False
    weight = is_pair(node, "DequantizeLinear") and is_weight(node)
    changed = weight and kind is ir.DataType.UINT8 and _shift_weight(graph, node)
    changed |= _make_scalar(graph, node, weight) or _count_axis_from_front(node)
    if weight or kind is ir.DataType.INT32:
        return _drop_zero(node) or changed
    return _add_zero(graph, node, kind) or changed


def shifted(array: NDArray[Any]) -> NDArray[Any]:
    """The uint8 of int8 numbers, or the reverse: 128 away."""
    other = np.uint8 if array.dtype == np.int8 else np.int8
    return (array.view(np.uint8) ^ np.uint8(MIDDLE)).view(other)


def _shift_weight(graph: ir.Graph, dequantize: ir.Node) -> bool:
    stored, scale = dequantize.inputs[0], dequantize.inputs[1]
    zero = zero_of(dequantize)
    points = np.zeros((), np.uint8) if zero is None else constant(zero)
    array = constant(stored)
    if array is None or points is None or stored is None or scale is None or scale.shape is None:
        return False
    points = np.array(np.broadcast_to(points, scale.shape.numpy()))
    dequantize.resize_inputs(3)
    dequantize.replace_input_with(0, new_initializer(graph, f"{stored.name}_int8", shifted(array)))
    dequantize.replace_input_with(
        2, new_initializer(graph, f"{stored.name}_zero_point", shifted(points))
    )
    for value in (stored, zero):
        if value is not None:
            drop_if_unread(value)
    return True


def _make_scalar(graph: ir.Graph, node: ir.Node, weight: bool) -> bool:
    """[s] and [z] as s and z; a weight with one channel keeps its vector of one."""
    stored, axis = node.inputs[0], node.attributes.get_int("axis", 1)
    if not is_per_tensor(node):
        return False
    shape = None if stored is None or stored.shape is None else stored.shape
    if weight and shape is not None and -len(shape) <= axis < len(shape) and shape[axis] == 1:
        return False
    changed = node.attributes.pop("axis", None) is not None
    for index, value in enumerate(node.inputs[1:3], start=1):
        array = constant(value)
        if value is not None and array is not None and array.ndim:
            stem = f"{node.name}_{'scale' if index == 1 else 'zero_point'}"
            scalar = new_initializer(graph, stem, array.reshape(()), value.dtype)
            node.replace_input_with(index, scalar)
            drop_if_unread(value)
            changed = True
    return changed


def _count_axis_from_front(node: ir.Node) -> bool:
    axis, data = node.attributes.get_int("axis", 1), node.inputs[0]
    if axis >= 0 or data is None or data.shape is None:
        return False
    node.attributes["axis"] = ir.AttrInt64("axis", axis + len(data.shape))
    return True


def _drop_zero(node: ir.Node) -> bool:
    zero = zero_of(node)
    array = constant(zero)
    if zero is None or array is None or array.any():
        return False
    node.resize_inputs(2)
    drop_if_unread(zero)
    return True


def _add_zero(graph: ir.Graph, node: ir.Node, kind: ir.DataType) -> bool:
    changed = node.attributes.pop("output_dtype", None) is not None
    scale = node.inputs[1]
    if zero_of(node) is not None or scale is None or scale.shape is None:
        return changed
    if not scale.shape.is_static():
        return changed
    zeros = np.zeros(scale.shape.numpy(), kind.numpy())
    node.resize_inputs(3)
    node.replace_input_with(2, new_initializer(graph, f"{node.name}_zero_point", zeros, kind))
    return True

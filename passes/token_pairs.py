"""Per-token pairs, and what computes their stored values and scales for integer products.

1. Q(x, s) to int8, s = Div(Max(Slice(ReduceMax(Abs(x))), tiny), 127)    =>  q, s = Quantize(x)
   the same to fp8, 448 in place of 127                                  =>  QuantizeFp8
2. Q(x, s) to int8, s any other scale of each token                      =>  q = Q(x, s, 128), s

2 is what others compute: torchao's scale is absmax / 127.5.  The integers are the same, as uint8,
and ONNX Runtime rounds them; the product is one of ours.  Part of `fold_qdq`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decide
from qcompiler.ir.graph import constant, dequantize_of

__all__ = ["has_token_scale", "insert_quantize", "token_pair"]

_TOP = {ir.DataType.INT8: 127.0, ir.DataType.FLOAT8E4M3FN: 448.0}
"""The stored value that a token's largest magnitude is mapped to."""


def token_pair(value: ir.Value | None) -> ir.Node | None:
    """The QuantizeLinear of a per-token pair that makes `value`, if one does."""
    widened = dequantize_of(value)
    stored = widened.inputs[0] if widened is not None else None
    quantize = stored.producer() if stored is not None else None
    if widened is None or quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    if len(quantize.inputs) != 2 or len(widened.inputs) != 2:
        return None
    axes = {node.attributes.get_int("axis", 1) for node in (quantize, widened)}
    blocks = {node.attributes.get_int("block_size", 0) for node in (quantize, widened)}
    if widened.inputs[1] is not quantize.inputs[1] or axes != {-1} or len(blocks) != 1:
        return None
    return quantize if has_token_scale(quantize) or _is_of_tokens(quantize) else None


def insert_quantize(pair: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The (q, s) that equal a pair of `token_pair`, computed before its Q."""
    return _insert_op(pair) if has_token_scale(pair) else _insert_unsigned(pair)


def _insert_op(pair: ir.Node) -> tuple[ir.Value, ir.Value]:
    data, scale = pair.inputs
    depth = pair.attributes.get_int("block_size")
    assert data is not None and scale is not None and pair.graph is not None
    fp8 = pair.outputs[0].dtype is ir.DataType.FLOAT8E4M3FN
    new = ir.node(
        "QuantizeFp8" if fp8 else "Quantize",
        [data],
        {"block_size": depth},
        num_outputs=2,
        domain=dialect.DOMAIN,
        version=dialect.VERSION,
        name=pair.name,
    )
    q, s = new.outputs
    q.name, q.shape = f"{data.name}_q", data.shape
    q.dtype = ir.DataType.FLOAT8E4M3FN if fp8 else ir.DataType.UINT8
    s.name, s.dtype, s.shape = f"{data.name}_s", ir.DataType.FLOAT, scale.shape
    decide(new, "body", "folded, no kernel bound yet")
    pair.graph.insert_before(pair, new)
    return q, s


def _insert_unsigned(pair: ir.Node) -> tuple[ir.Value, ir.Value]:
    data, scale = pair.inputs
    assert data is not None and scale is not None and pair.graph is not None
    middle = ir.tensor(np.asarray([128], np.uint8))
    shape = ir.node("Shape", [scale], name=f"{pair.name}_tokens")
    zeros = ir.node("ConstantOfShape", shape.outputs, {"value": middle}, name=f"{pair.name}_zeros")
    along = {"axis": -1, "block_size": pair.attributes.get_int("block_size")}
    new = ir.node("QuantizeLinear", [data, scale, *zeros.outputs], along, name=f"{pair.name}_u8")
    for node in (zeros, new):
        node.outputs[0].dtype = ir.DataType.UINT8
    shape.outputs[0].dtype = ir.DataType.INT64
    if scale.shape is not None:
        shape.outputs[0].shape = ir.Shape([len(scale.shape)])
    zeros.outputs[0].shape, new.outputs[0].shape = scale.shape, data.shape
    for node in (shape, zeros, new):
        node.outputs[0].name = f"{node.name}_value"
    for node in (shape, zeros):
        decide(node, "qdq", "the zero point of each token")
    why = (
        "rounds tokens by a scale that Quantize does not compute: the integers stay what they were"
    )
    decide(new, "qdq", why)
    pair.graph.insert_before(pair, [shape, zeros, new])
    return new.outputs[0], scale


def _is_of_tokens(quantize: ir.Node) -> bool:
    """Whether a QuantizeLinear without zero points has one float scale for each int8 token."""
    data, scale = quantize.inputs
    if data is None or data.shape is None or scale is None or scale.shape is None:
        return False
    floats = data.dtype is scale.dtype is ir.DataType.FLOAT
    depth = quantize.attributes.get_int("block_size", 0)
    return (
        floats
        and quantize.outputs[0].dtype is ir.DataType.INT8
        and len(data.shape) == len(scale.shape) > 1
        and (data.shape[-1], scale.shape[-1]) == (depth, 1)
    )


def has_token_scale(quantize: ir.Node) -> bool:
    """Whether the scale is Div(Max(Slice(ReduceMax(Abs(x))), tiny), top) over the last axis."""
    data, value = quantize.inputs
    chain = []
    for op in ("Div", "Max", "Slice", "ReduceMax", "Abs"):
        node = value.producer() if value is not None else None
        if node is None or node.op_type != op:
            return False
        chain.append(node)
        value = node.inputs[0]
    stored, depth = quantize.outputs[0].dtype, quantize.attributes.get_int("block_size", 0)
    top = _TOP.get(stored) if stored is not None else None
    last = data.shape[-1] if data is not None and data.shape is not None else None
    division, bounded, column, reduced, _ = chain
    return (
        value is data
        and depth > 0
        and (last == depth or not isinstance(last, int))
        and top is not None
        and _holds(division.inputs[1], top)
        and _holds(bounded.inputs[1], dialect.SMALLEST_MAGNITUDE)
        and [constant(v) for v in column.inputs[1:4]] == [[0], [1], [-1]]
        and _holds(reduced.inputs[1], -1)
        and reduced.attributes.get_int("keepdims", 1) == 1
    )


def _holds(value: ir.Value | None, number: float) -> bool:
    array = constant(value)
    return (
        array is not None
        and array.size == 1
        and bool(np.float32(array.item()) == np.float32(number))
    )

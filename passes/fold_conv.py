"""Fold a static convolution into one integer op.

    Q(Conv(DQ(x), DQ(W), DQ(b)), ys, yz)         =>  QConv(x, xs, xz, W, ws, 0, ys, yz, b)
    Q(Relu(Conv(DQ(x), DQ(W), DQ(b))), ys, 0)    =>  the same: saturation at 0 is the Relu

Part of `fold_qdq`.  QConv's body is QLinearConv, which ORT runs with its own integer kernels.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decide, inherit
from qcompiler.ir.graph import (
    constant,
    dequantize_of,
    new_initializer,
    only_consumer,
    replace_nodes,
)

__all__ = ["try_fold_conv"]


def try_fold_conv(graph: ir.Graph, conv: ir.Node) -> bool:
    """Fold one Conv; False, and nothing changed, if its surroundings do not fit."""
    parts = [dequantize_of(value) for value in conv.inputs]
    if len(parts) != 3 or any(part is None for part in parts):
        return False
    x, w, b = (part for part in parts if part is not None)
    if not (_is_per_tensor_uint8(x) and _is_channel_int8(w) and _is_accumulator(b, x, w)):
        return False
    if conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return False
    covered = [conv]
    result = only_consumer(conv.outputs[0])
    if result is not None and result.op_type == "Relu":
        covered.append(result)
        result = only_consumer(result.outputs[0])
    if result is None or result.op_type != "QuantizeLinear" or not _is_per_tensor_uint8(result):
        return False
    zero = constant(result.inputs[2])
    covered.append(result)
    if len(covered) > 2 and (zero is None or zero.any()):
        # Saturation at 0 does a Relu's work only if 0 stands for zero.
        return False
    rank = np.ndim(constant(w.inputs[0])) - 2  # type: ignore[arg-type]
    channels = np.atleast_1d(np.asarray(constant(w.inputs[1])))
    zeros = np.zeros(channels.shape, np.int8)
    weight_zero = new_initializer(graph, f"{conv.name}_weight_zero_point", zeros)
    new = ir.node(
        "QConv",
        [*x.inputs, *w.inputs[:2], weight_zero, *result.inputs[1:], b.inputs[0]],
        {
            "dilations": conv.attributes.get_ints("dilations", [1] * rank),
            "group": conv.attributes.get_int("group", 1),
            "pads": conv.attributes.get_ints("pads", [0] * rank * 2),
            "strides": conv.attributes.get_ints("strides", [1] * rank),
        },
        domain=dialect.DOMAIN,
        version=dialect.VERSION,
    )
    inherit(new, conv)
    replace_nodes(covered, [new])
    dialect.type_results(new, "QConv")
    decide(new, "qdq", "ORT's own QLinearConv")
    return True


def _is_per_tensor_uint8(pair: ir.Node) -> bool:
    """A Q or DQ with one constant scale and one constant uint8 zero point."""
    if len(pair.inputs) != 3 or pair.attributes.get_int("block_size", 0) > 0:
        return False
    scale, zero = constant(pair.inputs[1]), constant(pair.inputs[2])
    return scale is not None and zero is not None and scale.size == 1 and zero.dtype == np.uint8


def _is_channel_int8(dequantize: ir.Node) -> bool:
    """Constant int8 weights, symmetric, one scale per output channel."""
    stored, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    zero = constant(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else np.int8(0)
    if stored is None or scale is None or zero is None or np.any(zero):
        return False
    axis = dequantize.attributes.get_int("axis", 1)
    channels = scale.shape == stored.shape[:1] and axis % stored.ndim == 0
    blocked = dequantize.attributes.get_int("block_size", 0) > 0
    return stored.dtype == np.int8 and channels and not blocked


def _is_accumulator(bias: ir.Node, x: ir.Node, w: ir.Node) -> bool:
    """A constant int32 bias at the scale of the products, without a zero point."""
    stored, scale = constant(bias.inputs[0]), constant(bias.inputs[1])
    zero = constant(bias.inputs[2]) if len(bias.inputs) > 2 else np.int32(0)
    if stored is None or scale is None or zero is None or np.any(zero):
        return False
    products = np.asarray(constant(w.inputs[1])) * np.asarray(constant(x.inputs[1]))
    return (
        stored.dtype == np.int32
        and scale.shape == products.shape
        and np.allclose(scale, products, rtol=1e-5, atol=0)
    )

"""Fold a convolution of activations whose scale is computed into ONNX Runtime's integer sums.

1. Conv(DQ(q, s, z), DQ(W, ws), b)   =>   Cast(ConvInteger(q, W + 128, z, 128)) * (s * ws) + b
2. Conv(DQ(q, s, z), DQ(W, ws)) + DQ(b, s * ws)
       =>   Cast(ConvInteger(q, W + 128, z, 128) + b) * (s * ws)

b of 2 is int32.  It is added to integers because that is what such a model meant: rounded apart,
the last bits differ, and with them on which side of a step the next layers' values fall (37 dB at
the end of a network of 21).

The sums are exact.  W is int8 or uint8 and becomes uint8: by int8 weights ConvInteger takes 3.6
times as long in ORT 1.31 (ResNet50, one thread), and floats between these pairs 1.2 times.  Part of
`fold_qdq`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import decide, inherit
from qcompiler.ir.graph import (
    constant,
    dequantize_of,
    new_initializer,
    only_consumer,
    replace_nodes,
)
from qcompiler.ir.params import QuantParams
from qcompiler.passes.widen_constants import dequantized_constant

__all__ = ["try_fold_conv_integer"]


def try_fold_conv_integer(
    graph: ir.Graph,
    conv: ir.Node,
    x: QuantParams,
    stored: NDArray[np.int8],
    scales: NDArray[np.float32],
    zero: int,
) -> str | None:
    """Fold one Conv; the reason, and nothing changed, if it cannot be.

    Args:
        graph: Gets the constants.
        conv: Its data is dequantized by `x`.
        x: With one scale.
        stored: Weights [M, C / group, ...].
        scales: One, or M of them.
        zero: The zero point of all weights.
    """
    value = conv.inputs[2] if len(conv.inputs) > 2 else None
    bias = dequantized_constant(value)
    if value is not None and (bias is None or bias.dtype != np.float32):
        return "its bias is computed, or not FLOAT"
    by_channel = (1, -1, *[1] * (stored.ndim - 2))
    weight_scale = new_initializer(graph, f"{conv.name}_weight_scale", scales.reshape(by_channel))
    made = [_sums(graph, conv, x, stored, zero)]
    add, integers = (None, None) if value is not None else _integers_added(conv, x, scales)
    if integers is not None:
        made.append(ir.node("Add", [made[-1].outputs[0], integers]))
    for node in made:
        node.outputs[0].dtype = ir.DataType.INT32
    real = ir.node("Cast", [made[-1].outputs[0]], {"to": int(ir.DataType.FLOAT)})
    scale = ir.node("Mul", [x.scale, weight_scale])
    floats = [real, scale, ir.node("Mul", [real.outputs[0], scale.outputs[0]])]
    if bias is not None:
        added = new_initializer(graph, f"{conv.name}_bias", bias.reshape(by_channel))
        floats.append(ir.node("Add", [floats[-1].outputs[0], added]))
    for node in floats:
        node.outputs[0].dtype = ir.DataType.FLOAT
    for node in [*made[1:], *floats]:
        node.name = f"{conv.name}_{node.op_type}"
    for node in [*made, *floats]:
        decide(node, "qdq", "ORT's own ConvInteger, its weights as uint8")
    replace_nodes([conv] if add is None else [conv, add], [*made, *floats])
    return None


def _sums(
    graph: ir.Graph, conv: ir.Node, x: QuantParams, stored: NDArray[np.int8], zero: int
) -> ir.Node:
    data = dequantize_of(conv.inputs[0])
    assert data is not None

    def initializer(stem: str, array: NDArray[np.generic]) -> ir.Value:
        return new_initializer(graph, f"{conv.name}_{stem}", array)

    weight = initializer("weight", (stored.astype(np.int16) + 128).astype(np.uint8))
    weight_zero = initializer("weight_zero_point", np.asarray(zero + 128, np.uint8))
    zero_point = x.zero_point or initializer("zero_point", np.zeros((), np.uint8))
    sums = ir.node("ConvInteger", [data.inputs[0], weight, zero_point, weight_zero])
    inherit(sums, conv)
    sums.attributes.update(conv.attributes)
    return sums


def _integers_added(
    conv: ir.Node, x: QuantParams, scales: NDArray[np.float32]
) -> tuple[ir.Node, ir.Value] | tuple[None, None]:
    """The Add that alone reads a convolution, of integers at the scale of its sums, and those."""
    add = only_consumer(conv.outputs[0])
    if add is None or add.domain or add.op_type != "Add":
        return None, None
    pair = dequantize_of(add.inputs[add.inputs[0] is conv.outputs[0]])
    if pair is None or len(pair.inputs) > 2:
        return None, None
    integers, scale = pair.inputs
    if integers is None or scale is None or integers.dtype is not ir.DataType.INT32:
        return None, None
    factor = scale.producer()
    if factor is None or factor.op_type != "Mul" or x.scale not in factor.inputs:
        return None, None
    other = constant(factor.inputs[factor.inputs[0] is x.scale])
    same = other is not None and other.size == scales.size == 1 and other.item() == scales.item()
    return (add, integers) if same else (None, None)

"""Fold a convolution of activations whose scale is computed into ONNX Runtime's integer sums.

    Conv(DQ(q, s, z), DQ(W, ws), b)   =>   Cast(ConvInteger(q, W + 128, z, 128)) * (s * ws) + b

The sums are exact.  W is int8 or uint8 and becomes uint8: by int8 weights ConvInteger takes 3.6
times as long in ORT 1.31 (ResNet50, one thread), and floats between these pairs 1.2 times.  Part of
`fold_qdq`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import decide, inherit
from qcompiler.ir.graph import dequantize_of, new_initializer, replace_nodes
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
    data, value = dequantize_of(conv.inputs[0]), conv.inputs[2] if len(conv.inputs) > 2 else None
    bias = dequantized_constant(value)
    if value is not None and (bias is None or bias.dtype != np.float32):
        return "its bias is computed, or not FLOAT"
    assert data is not None

    def initializer(stem: str, array: NDArray[np.generic]) -> ir.Value:
        return new_initializer(graph, f"{conv.name}_{stem}", array)

    by_channel = (1, -1, *[1] * (stored.ndim - 2))
    weight = initializer("weight", (stored.astype(np.int16) + 128).astype(np.uint8))
    weight_zero = initializer("weight_zero_point", np.asarray(zero + 128, np.uint8))
    weight_scale = initializer("weight_scale", scales.reshape(by_channel))
    zero_point = x.zero_point or initializer("zero_point", np.zeros((), np.uint8))
    sums = ir.node("ConvInteger", [data.inputs[0], weight, zero_point, weight_zero])
    inherit(sums, conv)
    sums.attributes.update(conv.attributes)
    sums.outputs[0].dtype = ir.DataType.INT32
    real = ir.node("Cast", [sums.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    scale = ir.node("Mul", [x.scale, weight_scale])
    new = [sums, real, scale, ir.node("Mul", [real.outputs[0], scale.outputs[0]])]
    if bias is not None:
        added = initializer("bias", bias.reshape(by_channel))
        new.append(ir.node("Add", [new[-1].outputs[0], added]))
    for node in new[1:]:
        node.name, node.outputs[0].dtype = f"{conv.name}_{node.op_type}", ir.DataType.FLOAT
    for node in new:
        decide(node, "qdq", "ORT's own ConvInteger, its weights as uint8")
    replace_nodes([conv], new)
    return None

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
    if w.inputs[0] is None or w.inputs[0].dtype is not ir.DataType.INT8 or len(x.inputs) != 3:
        return False
    covered = [conv]
    result = only_consumer(conv.outputs[0])
    if result is not None and result.op_type == "Relu":
        covered.append(result)
        result = only_consumer(result.outputs[0])
    if result is None or result.op_type != "QuantizeLinear" or len(result.inputs) != 3:
        return False
    zero = constant(result.inputs[2])
    covered.append(result)
    if len(covered) > 2 and (zero is None or zero.any()):
        # Saturation at 0 does a Relu's work only if 0 stands for zero.
        return False
    rank = len(w.inputs[0].shape or ()) - 2
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
    decide(new, "qdq", "ORT's own QLinearConv")
    return True

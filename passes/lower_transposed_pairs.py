"""Lower transposed convolutions that others quantized: ONNX Runtime has no integer form of them.

    Q(ConvTranspose(DQ(x), DQ(W, ws), b))   =>   Q(DepthToSpace(Conv(DQ(x), DQ(W', ws'), b')))

The integers are the same, in another order (`sub_pixel`); each scale, zero point and bias of a
channel is that of all its phases.  What remains of the pairs moves next to the convolution, which
then is one that `fold_conv` knows.  Part of `normalize_qdq`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import add_note
from qcompiler.ir.graph import (
    constant,
    dequantize_of,
    every_node,
    new_initializer,
    rectified,
    replace_nodes,
)
from qcompiler.ir.params import QuantParams, quant_params
from qcompiler.ir.types import PerAxis, PerTensor
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.passes.sub_pixel import convolution_of, no_convolution_of, phases, phases_of
from qcompiler.passes.widen_constants import dequantized_constant

__all__ = ["lower_transposed_pairs"]


def lower_transposed_pairs(model: ir.Model) -> int:
    """Lower every ConvTranspose between pairs that can be; the others say why not."""
    count = 0
    for node in list(every_node(model.graph)):
        if node.op_type == "ConvTranspose" and node.domain == "" and _is_between_pairs(node):
            why = _try_lower(model.graph, node)
            count += why is None
            if why is not None:
                add_note(node, why)
    if count:
        FixNames()(model)  # inference goes by names
        InferShapes()(model)
    return count


def _is_between_pairs(node: ir.Node) -> bool:
    readers = [use.node for use in rectified(node.outputs[0]).uses()]
    quantized = bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)
    return quantized and all(dequantize_of(value) is not None for value in node.inputs[:2])


def _try_lower(graph: ir.Graph, node: ir.Node) -> str | None:
    """Lower one; the reason, and nothing changed, if it cannot be."""
    dequantize = dequantize_of(node.inputs[1])
    params = quant_params(dequantize)
    stored = None if dequantize is None else constant(dequantize.inputs[0])
    if params is None or stored is None or params.scales is None or params.zeros is None:
        return "its weight is computed"
    if (why := no_convolution_of(node, stored.shape)) is not None:
        return why
    if params.type.granularity not in (PerTensor(), PerAxis(1), PerAxis(-3)):
        return f"its weight has a scale per {params.type.granularity}, not per output channel"
    biases = [dequantized_constant(value) for value in node.inputs[2:] if value is not None]
    if any(bias is None for bias in biases):
        return "its bias is computed"
    constants = {
        "kernel": phases_of(node, stored, params.zeros),
        **_parameters(node, params, stored),
    }
    values = [new_initializer(graph, f"{node.name}_{stem}", constants[stem]) for stem in constants]
    widen = ir.node("DequantizeLinear", values, {} if params.is_per_tensor else {"axis": 0})
    widen.name = f"{node.name}_kernel_dequantize"
    floats = widen.outputs[0]
    floats.name, floats.type = f"{node.name}_kernel_float", node.outputs[0].type
    operands = [floats]
    for bias in biases:
        assert bias is not None
        operands.append(new_initializer(graph, f"{node.name}_bias", np.repeat(bias, phases(node))))
    replace_nodes([node], [widen, *convolution_of(graph, node, operands, stored.shape)])
    return None


def _parameters(
    node: ir.Node, params: QuantParams, stored: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """Scales and zero points of the channels of the convolution, or one of each."""
    given = {"scale": np.asarray(params.scales), "zero_point": np.asarray(params.zeros)}
    if params.is_per_tensor:
        return {stem: array.reshape(()) for stem, array in given.items()}
    group, width = node.attributes.get_int("group", 1), stored.shape[1]
    return {
        stem: np.repeat(np.tile(np.broadcast_to(array, width), group), phases(node))
        for stem, array in given.items()
    }

"""Zero points that torch keeps as floats, such as those of its quantized embeddings.

1. DQ(q, s) - z s, z whole numbers of the stored type    =>   DQ(q, s, z)
2. Gather(DQ(q, s) - z s, i)                             =>   Gather(DQ(q, s), i) - Gather(z s, i)

`translate` writes the difference, because no DequantizeLinear has zero points between integers, and
rounding them would cost as much as rounding the weights did.  By 2 only the rows that are looked up
become floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.graph import (
    constant,
    dequantize_of,
    drop_if_unread,
    every_node,
    new_initializer,
    replace_nodes,
)
from qcompiler.ir.params import quant_params
from qcompiler.ir.types import Granularity, PerAxis, PerTensor, QuantType

__all__ = ["float_zero_points"]


def float_zero_points(model: ir.Model) -> None:
    """Rewrite each difference that has one of these forms, in place."""
    for node in list(every_node(model.graph)):
        dequantize = dequantize_of(node.inputs[0]) if node.op_type == "Sub" else None
        offsets = None if dequantize is None else constant(node.inputs[1])
        if dequantize is None or offsets is None or len(dequantize.inputs) > 2:
            continue
        if not _try_store(model.graph, node, dequantize, offsets):
            _look_up_rows(node, dequantize, offsets)


def _try_store(graph: ir.Graph, node: ir.Node, dequantize: ir.Node, offsets: NDArray[Any]) -> bool:
    scales, stored = constant(dequantize.inputs[1]), dequantize.inputs[0]
    params = quant_params(dequantize)
    if scales is None or params is None or stored is None or stored.dtype is None:
        return False
    if not _is_spread(offsets, scales, stored, params.type.granularity):
        return False
    flat = offsets.reshape(scales.shape)
    zeros = np.rint(flat / scales)
    low, high = QuantType(stored.dtype).range
    if zeros.min() < low or zeros.max() > high or np.any(zeros * scales != flat):
        return False
    integers = zeros.astype(stored.dtype.numpy())
    zero = new_initializer(graph, f"{node.outputs[0].name}_zero_point", integers, stored.dtype)
    new = ir.node("DequantizeLinear", [*dequantize.inputs, zero], dequantize.attributes)
    new.metadata_props.update(dequantize.metadata_props)
    offset = node.inputs[1]
    replace_nodes([node], [new])
    if dequantize.graph is not None and not dequantize.outputs[0].uses():
        dequantize.graph.remove(dequantize, safe=True)
    if offset is not None:
        drop_if_unread(offset)
    return True


def _is_spread(
    offsets: NDArray[Any], scales: NDArray[Any], stored: ir.Value, granularity: Granularity
) -> bool:
    """Whether there are as many offsets as scales, and they are broadcast along the same axis."""
    if isinstance(granularity, PerTensor):
        return offsets.size == scales.size == 1
    if not isinstance(granularity, PerAxis) or stored.shape is None:
        return False
    shape = [1] * len(stored.shape)
    shape[granularity.axis] = scales.size
    return offsets.shape == tuple(shape)


def _look_up_rows(node: ir.Node, dequantize: ir.Node, offsets: NDArray[Any]) -> None:
    rows = dequantize.inputs[0].shape if dequantize.inputs[0] is not None else None
    if rows is None or offsets.shape != (rows[0], *[1] * (len(rows) - 1)):
        return
    for gather in [use.node for use in node.outputs[0].uses()]:
        if gather.op_type != "Gather" or gather.attributes.get_int("axis", 0) != 0:
            continue
        looked_up = [ir.node("Gather", [table, gather.inputs[1]]) for table in node.inputs]
        for part, stem in zip(looked_up, ("rows", "offsets"), strict=True):
            part.outputs[0].name = f"{gather.outputs[0].name}_{stem}"
            part.outputs[0].type = gather.outputs[0].type
        difference = ir.node("Sub", [part.outputs[0] for part in looked_up], name=gather.name)
        replace_nodes([gather], [*looked_up, difference])
    if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
        assert node.graph is not None
        node.graph.remove(node, safe=True)

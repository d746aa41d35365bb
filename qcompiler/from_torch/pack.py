"""Constants of Q and DQ, of which torch's exporter leaves some as a Cast of what torch stored.

1. Cast(initializer)           =>  an initializer: weights of 4 bits take 4, however large
2. A blocked zero point of 0   =>  none: ORT takes a blocked pair without one as what it is
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.ir.graph import constant, every_node, new_initializer

__all__ = ["pack_constants"]


def pack_constants(model: ir.Model) -> None:
    """Bring the constants of every Q and DQ into their own types, in place."""
    for node in every_node(model.graph):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for index in range(len(node.inputs)):
                _try_pack(model.graph, node, index)
            _try_drop_zeros(node)
    common.RemoveUnusedNodesPass()(model)


def _try_pack(graph: ir.Graph, node: ir.Node, index: int) -> bool:
    value = node.inputs[index]
    cast = value.producer() if value is not None else None
    array = constant(cast.inputs[0]) if cast is not None and cast.op_type == "Cast" else None
    if cast is None or array is None:
        return False
    dtype = ir.DataType(cast.attributes.get_int("to"))
    stem = f"{cast.inputs[0].name}_{dtype.name.lower()}"  # type: ignore[union-attr]
    packed = new_initializer(graph, stem, array.astype(dtype.numpy()), dtype)
    cast.outputs[0].replace_all_uses_with(packed)
    return True


def _try_drop_zeros(node: ir.Node) -> bool:
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if not node.attributes.get_int("block_size", 0) or zero is None or zero.any():
        return False
    if node.op_type == "QuantizeLinear":
        dtype = node.outputs[0].dtype
        assert dtype is not None
        node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(dtype))
    node.resize_inputs(2)
    return True

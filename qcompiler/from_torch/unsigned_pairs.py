"""int8 activations as uint8, where nobody sees the difference.

    DequantizeLinear(QuantizeLinear(x, s, z), s, z), z int8
        =>  DequantizeLinear(QuantizeLinear(x, s, z + 128), s, z + 128), z + 128 uint8

ORT 1.31 does the same on x86 when it opens a model, but mistakes pairs that it has inserted itself
behind a Transpose or Reshape of a dequantized value: their `output_dtype` stays INT8, and the model
does not open.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.from_torch.translate import RANGE
from qcompiler.ir.graph import constant, drop_if_unread, every_node, new_initializer

__all__ = ["unsigned_pairs"]


def unsigned_pairs(model: ir.Model) -> None:
    """Shift every static pair of int8 whose integers only its DequantizeLinear reads, in place."""
    for node in list(every_node(model.graph)):
        if node.op_type == "QuantizeLinear":
            _try_shift(model.graph, node)


def _try_shift(graph: ir.Graph, quantize: ir.Node) -> bool:
    stored, zero = quantize.outputs[0], _zero_point(quantize)
    readers = [use.node for use in stored.uses()]
    if zero is None or not readers or stored.is_graph_output():
        return False
    if any(node.op_type != "DequantizeLinear" or _zero_point(node) != zero for node in readers):
        return False
    shifted = new_initializer(graph, f"{stored.name}_zero_point", np.asarray(zero + 128, np.uint8))
    for node in (quantize, *readers):
        signed = node.inputs[2]
        node.replace_input_with(2, shifted)
        if signed is not None:
            drop_if_unread(signed)
        if RANGE in node.metadata_props:
            ends = node.metadata_props[RANGE].split("..")
            node.metadata_props[RANGE] = "..".join(str(int(end) + 128) for end in ends)
    stored.dtype = ir.DataType.UINT8
    quantize.attributes.pop("output_dtype", None)
    return True


def _zero_point(node: ir.Node) -> int | None:
    """The zero point of a static Q or DQ of a whole int8 tensor, None for any other."""
    array: NDArray[np.int8] | None = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    whole = array is not None and array.dtype == np.int8 and array.size == 1
    return int(array.item()) if array is not None and whole else None

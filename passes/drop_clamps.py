"""Drop a Relu or Clip whose work saturation does.

    Q(Relu(x), s, z)     =>   Q(x, s, z)      where z is the lowest stored value
    Q(Clip(x), s, z)     =>   the same        where the bounds are stored as the ends of the range
    Relu(DQ(q, s, z))    =>   DQ(q, s, z)     where no stored value stands for less than 0

Part of `normalize_qdq`.  All of it is exact.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with

from qcompiler.ir.graph import constant, dequantize_of
from qcompiler.passes.qdq_parameters import is_pair, is_per_tensor, zero_of

__all__ = ["try_drop_clamp"]


def try_drop_clamp(node: ir.Node) -> bool:
    """Drop one Relu or Clip; False if it does what saturation does not, or leaves the graph."""
    if node.domain != "" or node.op_type not in ("Clip", "Relu") or node.graph is None:
        return False
    bounds, source, result = _bounds(node), node.inputs[0], node.outputs[0]
    if bounds is None or source is None or result.is_graph_output():
        return False
    readers = [use.node for use in result.uses()]
    widened = dequantize_of(source)
    if widened is not None:
        ends = _represented(widened)
        redundant = ends is not None and bool(bounds[0] <= ends[0] and ends[1] <= bounds[1])
    else:
        redundant = bool(readers) and all(_saturates(reader, bounds) for reader in readers)
    if redundant:
        replace_all_uses_with(result, source)
        node.graph.remove(node, safe=True)
    return redundant


def _bounds(node: ir.Node) -> tuple[np.float32, np.float32] | None:
    """What a Relu or Clip limits its input to."""
    low, high = np.float32(-np.inf), np.float32(np.inf)
    if node.op_type == "Relu":
        return np.float32(0), high
    limits = [low, high]
    for index, value in enumerate(node.inputs[1:3]):
        array = constant(value)
        if value is not None and (array is None or array.size != 1):
            return None
        if array is not None:
            limits[index] = np.float32(array.item())
    return limits[0], limits[1]


def _scale_and_zero(node: ir.Node) -> tuple[np.float32, int, np.iinfo] | None:
    stored = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    scale, zero = constant(node.inputs[1]), constant(zero_of(node))
    if stored is None or stored.dtype is None or scale is None or not is_per_tensor(node):
        return None
    if (zero is None and zero_of(node) is not None) or not _has_limits(stored.dtype):
        return None
    kind = np.iinfo(stored.dtype.numpy())
    return np.float32(scale.item()), 0 if zero is None else int(zero.item()), kind


def _has_limits(kind: ir.DataType) -> bool:
    return kind.is_integer() and kind.bitwidth >= 8  # numpy knows no smaller ones


def _represented(dequantize: ir.Node) -> tuple[np.float32, np.float32] | None:
    """The least and the largest number that a stored value stands for."""
    parameters = _scale_and_zero(dequantize)
    if parameters is None:
        return None
    scale, zero, kind = parameters
    ends = [np.float32(end - zero) * scale for end in (kind.min, kind.max)]
    return min(ends), max(ends)  # in this order for a negative scale too


def _saturates(reader: ir.Node, bounds: tuple[np.float32, np.float32]) -> bool:
    """Whether a Q stores both bounds, and so all beyond them, as the ends of its range."""
    parameters = _scale_and_zero(reader) if is_pair(reader, "QuantizeLinear") else None
    if parameters is None:
        return False
    scale, zero, kind = parameters
    low, high = (np.rint(bound / scale) + zero for bound in bounds)
    return bool(low <= kind.min and high >= kind.max)

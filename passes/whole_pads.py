"""Give a Pad of some axes the numbers of all, in their order.

    Pad(x, [b, e], v, axes = [-1])   =>   Pad(x, [0, 0, b, 0, 0, e], v)

ONNX Runtime 1.32 moves a Transpose across a Pad as if that were of all axes: between two of them it
reads numbers that are not there.  So whoever puts Transposes into a graph calls this.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import constant, drop_if_unread, new_initializer

__all__ = ["name_all_axes"]


def name_all_axes(graph: ir.Graph) -> None:
    """Do so for the Pads of a graph whose numbers, axes and ranks are known."""
    for node in graph:
        if node.op_type == "Pad" and not node.domain and len(node.inputs) > 3:
            _try_name(graph, node)


def _try_name(graph: ir.Graph, pad: ir.Node) -> None:
    data, pads, value, axes = pad.inputs[:4]
    counts, named = constant(pads), constant(axes)
    if counts is None or named is None or data is None or data.shape is None:
        return
    rank = len(data.shape)
    where = [int(axis) % rank for axis in named.reshape(-1)] if rank else []
    if counts.size != 2 * len(where):
        return
    whole = np.zeros((2, rank), np.int64)
    whole[:, where] = counts.reshape(2, -1)
    name = new_initializer(graph, f"{pad.name}_of_all_axes", whole.reshape(-1))
    pad.resize_inputs(3 if value is not None else 2)
    pad.replace_input_with(1, name)
    for number in (pads, axes):
        if number is not None:
            drop_if_unread(number)

"""Fold factors and offsets of channels into the convolution before them.

    Add(Mul(Conv(x, W, b), f), c)   =>   Conv(x, f W, f b + c)

f and c are constants, one number for each output channel or one for all; Sub and Div likewise.
ConvTranspose too, but for one of several groups, whose weights have their channels on two axes.
Left alone, each would be an op of its own between two integer convolutions.
Part of `fuse_batchnorm`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.graph import (
    constant,
    drop_if_unread,
    new_initializer,
    only_consumer,
    replace_nodes,
)

Numbers = NDArray[np.float64]

__all__ = ["channel_axis", "try_fold_affine"]

_OPS: dict[str, Callable[[Numbers, Numbers], Numbers]] = {
    "Mul": np.multiply, "Div": np.divide, "Add": np.add, "Sub": np.subtract,
}  # fmt: skip


def channel_axis(conv: ir.Node) -> int | None:
    """The axis of a weight that counts output channels; None if `node` is no such convolution."""
    if conv.domain:
        return None
    if conv.op_type == "ConvTranspose" and conv.attributes.get_int("group", 1) == 1:
        return 1
    return 0 if conv.op_type == "Conv" else None


def try_fold_affine(graph: ir.Graph, conv: ir.Node) -> bool:
    """Fold all that follow one convolution which nothing else reads; False if there are none."""
    axis = channel_axis(conv)
    if axis is None:
        return False
    weight = constant(conv.inputs[1])
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    offset = np.zeros((), np.float32) if bias is None else constant(bias)
    if weight is None or offset is None or weight.dtype != np.float32:
        return False
    factors = np.ones(weight.shape[axis])
    offsets = np.zeros(weight.shape[axis]) + offset
    covered = [conv]
    while (step := _next(conv, covered[-1], weight.ndim)) is not None:
        node, numbers = step
        # A division by 0 shows in what comes of it.
        with np.errstate(divide="ignore", invalid="ignore"):
            if node.op_type in ("Mul", "Div"):
                factors = _OPS[node.op_type](factors, numbers)
            offsets = _OPS[node.op_type](offsets, numbers)
        covered.append(node)
    with np.errstate(invalid="ignore"):
        scaled = weight * np.expand_dims(factors, tuple(i for i in range(weight.ndim) if i != axis))
    if len(covered) == 1 or not (np.isfinite(scaled).all() and np.isfinite(offsets).all()):
        return False
    old = list(conv.inputs[1:])
    operands = [
        conv.inputs[0],
        new_initializer(graph, f"{conv.name}_weight", scaled.astype(np.float32)),
        new_initializer(graph, f"{conv.name}_bias", offsets.astype(np.float32)),
    ]
    new = ir.node(conv.op_type, operands, conv.attributes, name=conv.name)
    new.metadata_props.update(conv.metadata_props)
    replace_nodes(covered, [new])
    for value in old:
        if value is not None:
            drop_if_unread(value)
    return True


def _next(conv: ir.Node, last: ir.Node, rank: int) -> tuple[ir.Node, Numbers] | None:
    """The op that reads `last` alone, if it is one of channels, and its numbers."""
    node, value = only_consumer(last.outputs[0]), last.outputs[0]
    if node is None or node.op_type not in _OPS or node.domain or node.graph is not conv.graph:
        return None
    at = node.inputs.index(value)
    if node.inputs[1 - at] is value or (at == 1 and node.op_type in ("Sub", "Div")):
        return None
    array = constant(node.inputs[1 - at])
    if array is None or array.ndim > rank:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if array.size > 1 and any(size != 1 for axis, size in enumerate(shape) if axis != 1):
        return None
    return node, np.asarray(array, np.float64).reshape(-1)

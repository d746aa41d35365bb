"""Where the axis of scales lies after an op that only moves data.

Part of `normalize_qdq`.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from qcompiler.ir.graph import constant

__all__ = ["moved_axis"]


def moved_axis(move: ir.Node, axis: int) -> int | None:
    """The axis of the result along which slices are those of `axis` of the data; None if none is.

    Args:
        move: An op whose first input is the data.
        axis: Counted from the front.
    """
    data, result = move.inputs[0], move.outputs[0]
    if data is None or data.shape is None:
        return None
    rank = len(data.shape)
    match move.op_type:
        case "Identity":
            return axis
        case "Transpose":
            order = move.attributes.get_ints("perm", list(reversed(range(rank))))
            return list(order).index(axis)
        case "Flatten" | "Reshape" | "Squeeze" | "Unsqueeze":
            return _reshaped_axis(data.shape, result.shape, axis)
        case "Concat" | "Split":
            same = move.attributes.get_int("axis", 0) % rank == axis
            return None if same else axis
        case "Slice":
            return None if axis in _sliced(move, rank) else axis
        case "Gather":
            return _gathered_axis(move, rank, axis)
    return None


def _reshaped_axis(before: ir.Shape, after: ir.Shape | None, axis: int) -> int | None:
    """The axis of equal length with as many elements before it."""
    if after is None or not before.is_static() or not after.is_static():
        return None
    old, new = before.numpy(), after.numpy()
    found = (
        index
        for index, length in enumerate(new)
        if length == old[axis] and math.prod(new[:index]) == math.prod(old[:axis])
    )
    return next(found, None)


def _sliced(move: ir.Node, rank: int) -> set[int]:
    axes = constant(move.inputs[3]) if len(move.inputs) > 3 and move.inputs[3] else None
    if axes is None:
        return set(range(rank))
    return {int(axis) % rank for axis in axes.reshape(-1)}


def _gathered_axis(move: ir.Node, rank: int, axis: int) -> int | None:
    indices = move.inputs[1]
    gathered = move.attributes.get_int("axis", 0) % rank
    if gathered == axis or indices is None or indices.shape is None:
        return None
    return axis if axis < gathered else axis + len(indices.shape) - 1

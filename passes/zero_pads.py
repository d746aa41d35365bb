"""What a Pad adds, where that is zeros at both ends of one axis."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.graph import constant, drop_if_unread

__all__ = ["drop_unread_pad", "zero_pads"]


def zero_pads(pad: ir.Node, axis: int) -> tuple[int, int] | None:
    """How many zeros a node puts before and behind the elements of one axis.

    Args:
        pad: Any node.
        axis: Counted from the last, -1.

    Returns:
        Two numbers; None if it does something else, also something more, or if that is not known.
    """
    if (
        pad.op_type != "Pad"
        or pad.domain
        or pad.attributes.get_string("mode", "constant") != "constant"
    ):
        return None
    _, pads, value, axes = [*pad.inputs, None, None, None][:4]
    counts, named, number = constant(pads), constant(axes), constant(value)
    if counts is None or counts.ndim != 1 or (axes is not None and named is None):
        return None
    if value is not None and (number is None or number.size != 1 or number.item() != 0):
        return None
    rank = _rank(pad, counts.size // 2, has_axes=axes is not None)
    if rank is None or rank + axis < 0:
        return None
    where = [int(i) % rank for i in named.reshape(-1)] if named is not None else list(range(rank))
    if counts.size != 2 * len(where) or len(set(where)) < len(where):
        return None
    ends = counts.reshape(2, -1).T.tolist()
    found = {place: (int(begin), int(end)) for place, (begin, end) in zip(where, ends, strict=True)}
    wanted = found.pop(rank + axis, (0, 0))
    return wanted if min(wanted) >= 0 and not any(map(any, found.values())) else None


def _rank(pad: ir.Node, counts: int, *, has_axes: bool) -> int | None:
    """Of the data; that of `axes` says nothing of it."""
    if not has_axes:
        return counts
    data = pad.inputs[0]
    return len(data.shape) if data is not None and data.shape is not None else None


def drop_unread_pad(value: ir.Value | None) -> None:
    """Remove the Pad that makes a value, and its numbers, if no one reads it any more."""
    pad = value.producer() if value is not None else None
    if value is None or pad is None or pad.op_type != "Pad":
        return
    if value.uses() or value.is_graph_output():
        return
    assert pad.graph is not None
    numbers = [number for number in pad.inputs[1:] if number is not None]
    pad.graph.remove(pad, safe=True)
    for number in numbers:
        drop_if_unread(number)

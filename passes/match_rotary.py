"""Find rotary embeddings: halves of each head turned by an angle of their position.

    x cos + Concat(-x[D/2:], x[:D/2]) sin

Cosines and sines must be the same for both halves, as those of Concat(angles, angles) are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import constant, same_dimension

__all__ = ["Rotary", "match_rotary"]

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""What ONNX Runtime's op on a CPU takes."""
_ELEMENTWISE = {"Cos", "Sin", "Cast", "Neg", "Identity"}
_MOVING = {"Unsqueeze", "Squeeze", "Reshape", "Expand", "Slice", "Gather", "Transpose"}
"""Ops that move rows, where these are as long before as after."""


@dataclasses.dataclass(frozen=True)
class Rotary:
    """What was found.

    Attributes:
        x: What is turned, [batch, heads, tokens, D].
        cos: The cosines, [1 or batch, 1, tokens, D].
        sin: The sines, of that shape.
        depth: D, which is even.
    """

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    depth: int


def match_rotary(add: ir.Node) -> Rotary | None:
    """The rotary embedding that ends in this Add, if one does."""
    for straight, crossed in _either_way(add, "Add"):
        for x, cos in _either_way(straight.producer(), "Mul"):
            for turned, sin in _either_way(crossed.producer(), "Mul"):
                depth = _depth(x)
                if depth and _is_rotated(turned, x, depth) and _are_angles(x, cos, sin):
                    return Rotary(x, cos, sin, depth)
    return None


def _either_way(node: ir.Node | None, op: str) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The operands of a node of this op, in both orders."""
    if node is None or node.op_type != op or node.domain != "":
        return
    one, other = node.inputs
    if one is not None and other is not None:
        yield one, other
        yield other, one


def _depth(x: ir.Value) -> int | None:
    """The size of a head, if x has a type of the op, four dimensions and heads of an even size."""
    if x.dtype not in _TYPES or x.shape is None or len(x.shape) != 4:
        return None
    size = x.shape[3]
    return size if isinstance(size, int) and size > 0 and size % 2 == 0 else None


def _is_rotated(value: ir.Value, x: ir.Value, depth: int) -> bool:
    """Whether `value` is Concat(-x[D/2:], x[:D/2])."""
    join = value.producer()
    if join is None or (join.op_type, join.domain) != ("Concat", "") or len(join.inputs) != 2:
        return False
    first, axis = join.inputs[0], join.attributes.get_int("axis", 0)
    negation = first.producer() if first is not None else None
    if axis not in (3, -1) or negation is None or negation.op_type != "Neg":
        return False
    return _half(negation.inputs[0], x, depth) == 1 and _half(join.inputs[1], x, depth) == 0


def _half(value: ir.Value | None, x: ir.Value, depth: int) -> int | None:
    """Which half of each head of x `value` is: 0, 1, or None for neither."""
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or node.inputs[0] is not x:
        return None
    if node.op_type == "Split":
        sizes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        is_even = sizes is None or sizes.tolist() == [depth // 2] * 2
        is_last = node.attributes.get_int("axis", 0) in (3, -1)
        return node.outputs.index(value) if is_last and is_even and len(node.outputs) == 2 else None
    return _sliced_half(node, depth) if node.op_type == "Slice" else None


def _sliced_half(node: ir.Node, depth: int) -> int | None:
    """Which half of rows of `depth` a Slice takes."""
    numbers = [constant(operand) for operand in node.inputs[1:]]
    if not 3 <= len(numbers) <= 4 or any(n is None or n.size != 1 for n in numbers):
        return None
    start, end, axis, *step = (int(number.item()) for number in numbers if number is not None)
    if axis not in (3, -1) or step not in ([], [1]):
        return None
    bounds = slice(start, end).indices(depth)[:2]
    return {(0, depth // 2): 0, (depth // 2, depth): 1}.get(bounds)


def _are_angles(x: ir.Value, cos: ir.Value, sin: ir.Value) -> bool:
    """Whether both have a number for each token and element, the same for all heads and halves."""
    assert x.shape is not None
    for value in (cos, sin):
        if value.shape is None or len(value.shape) != 4 or value.dtype != x.dtype:
            return False
        batch, heads, tokens, depth = value.shape
        fits = batch == 1 or same_dimension(batch, x.shape[0])
        fits = fits and heads == 1 and same_dimension(tokens, x.shape[2])
        if not fits or depth != x.shape[3] or not _has_equal_halves(value):
            return False
    return cos.shape == sin.shape


def _has_equal_halves(value: ir.Value | None) -> bool:
    """Whether both halves of the last dimension are provably the same."""
    while value is not None:
        if (array := constant(value)) is not None:
            half = array.shape[-1] // 2 if array.ndim else 0
            return half > 0 and np.array_equal(array[..., :half], array[..., half:])
        node = value.producer()
        if node is None or node.domain != "":
            return False
        last = len(value.shape) - 1 if value.shape is not None else -1
        if node.op_type == "Concat" and node.attributes.get_int("axis", 0) in (-1, last):
            return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        value = _source(node, value)
    return False


def _source(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """What `node` makes `value` of without mixing up rows, if it does."""
    data = node.inputs[0]
    if node.op_type in ("Mul", "Div"):
        numbers = [constant(operand) for operand in node.inputs]
        places = [i for i, number in enumerate(numbers) if number is not None and number.size == 1]
        if len(places) != 1 or (node.op_type == "Div" and places != [1]):
            return None
        return node.inputs[1 - places[0]]
    if node.op_type in _ELEMENTWISE:
        return data
    if node.op_type not in _MOVING or data is None or data.shape is None or value.shape is None:
        return None
    last = len(data.shape) - 1
    if node.op_type == "Transpose" and node.attributes.get_ints("perm", [0])[-1] != last:
        return None
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) in (-1, last):
        return None
    is_same = last >= 0 and len(value.shape) > 0 and isinstance(data.shape[last], int)
    return data if is_same and data.shape[last] == value.shape[-1] else None

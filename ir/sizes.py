"""What is known of tensors of sizes: of each element a number, or whose dimension it is.

Exporters compute the sizes of a Reshape or an Expand from shapes, by way of ops that shape
inference gives up on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import constant, same_dimension

__all__ = ["is_size_of", "sizes_of"]

Size = int | ir.SymbolicDim | None
"""A number, a dimension by its name, or something unknown."""

_MOST = 64
"""Longer tensors are no sizes."""

_DEEPEST = 24


def sizes_of(value: ir.Value | None) -> list[Size] | None:
    """The elements of an integer tensor of rank 0 or 1, or None where not even their number is."""
    return _Follow().elements(value, 0)


class _Follow:
    """Goes from a tensor to what it is computed from, once to each."""

    def __init__(self) -> None:
        self._found = dict[ir.Value, list[Size] | None]()

    def elements(self, value: ir.Value | None, deep: int) -> list[Size] | None:
        if value is None or deep > _DEEPEST:
            return None
        if value not in self._found:
            self._found[value] = self._elements(value, deep)
        return self._found[value]

    def _elements(self, value: ir.Value, deep: int) -> list[Size] | None:
        if (array := constant(value)) is not None:
            is_short = array.size <= _MOST and array.ndim <= 1 and array.dtype.kind in "iub"
            return [int(number) for number in array.reshape(-1)] if is_short else None
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type == "Shape":
            return _shape(node)
        if node.op_type not in _RULES or not _is_flat(node, value):
            return None
        operands = [self.elements(operand, deep + 1) for operand in node.inputs]
        known = [operand for operand in operands if operand is not None]
        return _RULES[node.op_type](node, *known) if len(known) == len(operands) else None


def is_size_of(size: Size, dimension: int | ir.SymbolicDim) -> bool:
    """Whether a size is provably that dimension."""
    return size is not None and same_dimension(size, dimension)


def _is_flat(node: ir.Node, value: ir.Value) -> bool:
    """Whether the result is of rank 0 or 1, if its operands are; the rules are for no other."""
    if node.op_type not in ("Unsqueeze", "Reshape"):
        return True
    return value.shape is not None and len(value.shape) <= 1


def _shape(node: ir.Node) -> list[Size] | None:
    data = node.inputs[0]
    if data is None or data.shape is None:
        return None
    end = node.attributes.get_int("end", len(data.shape))
    return [*data.shape][node.attributes.get_int("start", 0) : end]


def _gather(node: ir.Node, data: list[Size], places: list[Size]) -> list[Size] | None:
    found = [i for i in places if isinstance(i, int) and -len(data) <= i < len(data)]
    return [data[i] for i in found] if len(found) == len(places) else None


def _concat(node: ir.Node, *operands: list[Size]) -> list[Size]:
    return [size for operand in operands for size in operand]


def _slice(node: ir.Node, data: list[Size], *bounds: list[Size]) -> list[Size] | None:
    numbers = [number for bound in bounds for number in bound if isinstance(number, int)]
    if len(bounds) < 2 or len(numbers) != len(bounds):
        return None
    start, end, *axis_and_step = numbers
    return data[start : end : axis_and_step[1] if len(axis_and_step) > 1 else 1]


def _unchanged(node: ir.Node, data: list[Size], *others: list[Size]) -> list[Size]:
    return data


def _cast(node: ir.Node, data: list[Size]) -> list[Size] | None:
    """The same numbers, where the type has all of them."""
    has_all = node.attributes.get_int("to") in (ir.DataType.INT32, ir.DataType.INT64)
    return data if has_all else None


def _filled(node: ir.Node, shape: list[Size]) -> list[Size] | None:
    value = node.attributes.get_tensor("value", None)
    count = shape[0] if len(shape) == 1 else None
    if not isinstance(count, int) or not 0 <= count <= _MOST:
        return None
    # Without a value they are zeros.
    array = np.zeros(1, np.int64) if value is None else value.numpy()
    return [int(array.item())] * count if array.dtype.kind in "iub" else None


def _by_element(rule: Callable[..., Size]) -> Callable[..., list[Size] | None]:
    """The rule for each element of operands that are equally long, or one long."""

    def apply(node: ir.Node, *operands: list[Size]) -> list[Size] | None:
        length = max(map(len, operands))
        if any(len(operand) not in (1, length) for operand in operands):
            return None
        columns = [operand * (length if len(operand) == 1 else 1) for operand in operands]
        return [rule(*elements) for elements in zip(*columns, strict=True)]

    return apply


def _times(one: Size, other: Size) -> Size:
    if isinstance(one, int) and isinstance(other, int):
        return one * other
    return other if one == 1 else one if other == 1 else None


def _equal(one: Size, other: Size) -> Size:
    """1, 0 or unknown; no dimension is negative."""
    if isinstance(one, int) and isinstance(other, int):
        return int(one == other)
    number = one if isinstance(one, int) else other
    is_dimension = one is not None and other is not None
    return 0 if is_dimension and isinstance(number, int) and number < 0 else None


def _where(condition: Size, chosen: Size, otherwise: Size) -> Size:
    if isinstance(condition, int):
        return chosen if condition else otherwise
    return None


_RULES: dict[str, Callable[..., list[Size] | None]] = {
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "Cast": _cast,
    "Identity": _unchanged,
    "Unsqueeze": _unchanged,
    "Squeeze": _unchanged,
    "Reshape": _unchanged,
    "ConstantOfShape": _filled,
    "Mul": _by_element(_times),
    "Equal": _by_element(_equal),
    "Where": _by_element(_where),
}

"""Find a GELU written with tanh, in whatever order its terms and factors come.

    x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

Every exporter spells it differently, so that not its form is compared but its numbers: what a few
elementwise ops with scalars make of some `x`, against the equation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.graph import constant, only_consumer

__all__ = ["match_tanh_gelu"]

_Numbers = NDArray[np.float64]

_DEPTH = 6
"""Ops from x to the tanh, at most: x * x, * x, * 0.044715, + x, * sqrt(2 / pi)."""
_AFTER = 3
"""Ops after it: + 1, * x, / 2."""
_ROUNDED = 2e-4
"""So far from their numbers the constants of a model in float16 are."""

_X: _Numbers = np.linspace(-3.9, 4.1, 33)
_INNER = math.sqrt(2 / math.pi) * (_X + 0.044715 * _X**3)

_OPS = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Pow": np.power,
}  # fmt: skip


def match_tanh_gelu(tanh: ir.Node) -> tuple[ir.Value, list[ir.Node]] | None:
    """What the GELU around a Tanh is of, and the nodes from the Tanh to its result.

    Returns:
        None where there is no GELU, or where others read what lies within.
    """
    inner = tanh.inputs[0]
    for x in _above(inner, _DEPTH):
        numbers = {x: _X}
        if _same(_evaluate(inner, numbers, _DEPTH), _INNER):
            covered = _until_result(tanh, numbers | {tanh.outputs[0]: np.tanh(_INNER)})
            return None if covered is None else (x, covered)
    return None


def _until_result(tanh: ir.Node, numbers: dict[ir.Value, _Numbers]) -> list[ir.Node] | None:
    result, covered = _X / 2 * (1 + np.tanh(_INNER)), [tanh]
    for _ in range(_AFTER):
        value = covered[-1].outputs[0]
        following = None if value.is_graph_output() else only_consumer(value)
        if following is None:
            return None
        covered.append(following)
        found = _evaluate(following.outputs[0], numbers, 2)
        if found is None:
            return None
        if _same(found, result):
            return covered
        numbers[following.outputs[0]] = found
    return None


def _above(value: ir.Value | None, depth: int) -> Iterator[ir.Value]:
    """The values that elementwise ops make another of, nearest first."""
    node = value.producer() if value is not None else None
    if node is None or node.domain or node.op_type not in _OPS or not depth:
        return
    read = [v for v in dict.fromkeys(node.inputs) if v is not None and constant(v) is None]
    yield from read
    for operand in read:
        yield from _above(operand, depth - 1)


def _evaluate(
    value: ir.Value | None, numbers: dict[ir.Value, _Numbers], depth: int
) -> _Numbers | None:
    """The numbers of a value that is made of those known and of scalars by elementwise ops."""
    if value is None:
        return None
    if value in numbers:
        return numbers[value]
    array = constant(value)
    if array is not None:
        return np.asarray(array, np.float64) if array.ndim == 0 else None
    node = value.producer()
    if node is None or node.domain or node.op_type not in _OPS or not depth:
        return None
    operands = [_evaluate(operand, numbers, depth - 1) for operand in node.inputs]
    left, right = operands
    if left is None or right is None:
        return None
    with np.errstate(all="ignore"):
        return np.asarray(_OPS[node.op_type](left, right), np.float64)


def _same(found: _Numbers | None, expected: _Numbers) -> bool:
    return found is not None and np.allclose(found, expected, rtol=_ROUNDED, atol=1e-12)

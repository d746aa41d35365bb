"""Recognise a norm over the last axis, as one op or as the pieces that exporters write.

1. LayerNormalization(x, gamma, beta?)
2. RMSNormalization(x, gamma)
3. Mul(Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2), -1), epsilon)))), gamma)

in any operand order; `Pow(x, 2)` may be `Mul(x, x)`, and `Mul(x, Reciprocal(r))` may be `Div(x, r)`
or `Mul(x, Div(1, r))`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import constant, only_consumer

__all__ = ["Norm", "is_mean_over_last_axis", "match_norm"]


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm found in a graph.

    Attributes:
        op: "LayerNorm" or "RMSNorm".
        x: What is normalized.
        gamma: Constant scale, [K].
        beta: Constant bias, [K]; None stands for zeros.
        epsilon: Added to the variance or mean square.
        nodes: What it is made of, in order; the last makes the result.
    """

    op: str
    x: ir.Value
    gamma: ir.Value
    beta: ir.Value | None
    epsilon: float
    nodes: list[ir.Node]

    @property
    def result(self) -> ir.Value:
        """The normalized value."""
        return self.nodes[-1].outputs[0]

    @property
    def depth(self) -> int:
        """K."""
        assert self.gamma.shape is not None
        return int(self.gamma.shape.numpy()[0])


def match_norm(node: ir.Node) -> Norm | str | None:
    """The norm that ends in `node`, why it cannot be computed as one, or None if it is none."""
    if node.domain != "":
        return None
    if node.op_type in ("LayerNormalization", "RMSNormalization"):
        return _match_op(node)
    return _match_pieces(node) if node.op_type == "Mul" else None


def _match_op(node: ir.Node) -> Norm | str:
    x, gamma, beta = (*node.inputs, None)[:3]
    assert x is not None and gamma is not None
    if node.attributes.get_int("stash_type", 1) != 1:
        return "its statistics are not float32"
    rank = len(x.shape) if x.shape is not None else None
    if node.attributes.get_int("axis", -1) not in (-1, rank and rank - 1):
        return "normalizes more than the last axis"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its mean or deviation is read"
    if reason := _unfit(x, gamma, beta, types=(ir.DataType.FLOAT, ir.DataType.FLOAT16)):
        return reason
    op = "LayerNorm" if node.op_type == "LayerNormalization" else "RMSNorm"
    epsilon = float(np.float32(node.attributes.get_float("epsilon", 1e-5)))
    return Norm(op, x, gamma, beta, epsilon, [node])


def _unfit(
    x: ir.Value, *parameters: ir.Value | None, types: Sequence[ir.DataType] = (ir.DataType.FLOAT,)
) -> str:
    """Why there is no kernel for these operands, or "" if there may be one."""
    depth = x.shape[-1] if x.shape is not None and len(x.shape) else None
    if x.dtype not in types:
        return f"{x.dtype} is normalized in float"
    if not isinstance(depth, int):
        return "the length of its last axis is not known"
    for parameter in parameters:
        if parameter is None:
            continue
        array = constant(parameter)
        if array is None:
            return f"{parameter.name} is no constant"
        if array.shape != (depth,) or parameter.dtype is not x.dtype:
            return f"{parameter.name} is not one {x.dtype} per channel"
    return ""


def _match_pieces(last: ir.Node) -> Norm | str | None:
    """Case 3, from its last Mul."""
    gamma = next((value for value in last.inputs if constant(value) is not None), None)
    unit = _inner(next((value for value in last.inputs if value is not gamma), None), "Mul", "Div")
    if gamma is None or unit is None:
        return None
    pieces = _root_of(unit)
    if pieces is None:
        return None
    x, root, inverse = pieces
    mean_square = _mean_square(root, x)
    if mean_square is None:
        return None
    if reason := _unfit(x, gamma):
        return reason
    epsilon, nodes = mean_square
    return Norm("RMSNorm", x, gamma, None, epsilon, [*nodes, root, *inverse, unit, last])


def _mean_square(root: ir.Node, x: ir.Value) -> tuple[float, list[ir.Node]] | None:
    """Epsilon, and the nodes that make mean(x^2) + epsilon, if `root` is the root of that."""
    added = _inner(root.inputs[0], "Add")
    if added is None:
        return None
    first, second = added.inputs
    mean = _inner(first, "ReduceMean") or _inner(second, "ReduceMean")
    epsilon = _scalar(second) if _scalar(first) is None else _scalar(first)
    square = _inner(mean.inputs[0], "Pow", "Mul") if mean is not None else None
    if mean is None or square is None or epsilon is None:
        return None
    if not _is_square_of(square, x) or not is_mean_over_last_axis(mean, x):
        return None
    return epsilon, [square, mean, added]


def _root_of(unit: ir.Node) -> tuple[ir.Value, ir.Node, list[ir.Node]] | None:
    """X, the Sqrt and what inverts it, where `unit` divides x by a square root."""
    first, second = unit.inputs
    if unit.op_type == "Div":
        root = _inner(second, "Sqrt")
        return (first, root, []) if root and first is not None else None
    for inverted, x in ((first, second), (second, first)):
        inverse = _inner(inverted, "Reciprocal", "Div")
        if inverse is None or x is None:
            continue
        if inverse.op_type == "Div" and _scalar(inverse.inputs[0]) != 1.0:
            continue
        if root := _inner(inverse.inputs[-1], "Sqrt"):
            return x, root, [inverse]
    return None


def _inner(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that makes `value`, if it is one of these ops and nothing else reads the value."""
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or node.op_type not in ops:
        return None
    return node if value is not None and only_consumer(value) is not None else None


def _is_square_of(node: ir.Node, x: ir.Value) -> bool:
    if node.op_type == "Pow":
        return node.inputs[0] is x and _scalar(node.inputs[1]) == 2.0
    return node.inputs[0] is x and node.inputs[1] is x


def is_mean_over_last_axis(mean: ir.Node, x: ir.Value) -> bool:
    """Whether a ReduceMean is over the last axis of `x`, and keeps it."""
    if len(mean.inputs) > 1:
        array = constant(mean.inputs[1])
        axes = array.tolist() if array is not None else None
    else:
        axes = list(mean.attributes.get_ints("axes", ()))
    last = len(x.shape) - 1 if x.shape is not None else -1
    return axes in ([-1], [last]) and mean.attributes.get_int("keepdims", 1) == 1


def _scalar(value: ir.Value | None) -> float | None:
    """The number of a constant that adds no dimension to what it meets."""
    array = constant(value)
    if array is None or array.size != 1 or array.ndim > 1:
        return None
    return float(array.reshape(-1)[0])

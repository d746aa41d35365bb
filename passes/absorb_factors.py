"""Find the constants that can take a factor per channel, so that a value comes out divided by it.

    v / t, t per channel along the last axis, where v is

1. Norm(x)              gamma and beta are divided
2. Mul(a, b), Div(a, c) one of a and b is, or a
3. Add(a, b), Sub       both are
4. MatMul(x, B)         the columns of B are: a constant's (a Linear before this one), or in turn
                        those of what makes B (the values that attention weighs)
5. Relu(a), Neg, ...    a is, because t > 0
6. what moves data      what it moves is; where Expand repeats channels, as for the heads of grouped
                        queries, their factors must be equal: they are tied

None of these may have another reader, or it would see the divided value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.graph import constant, drop_if_unread, label, new_initializer, unique_name
from qcompiler.ir.on_disk import let_go
from qcompiler.passes.channel_maps import Channels, regrouped, trimmed
from qcompiler.passes.match_norms import Norm, match_norm

__all__ = ["Absorber", "absorber_of", "scale_constant"]


@dataclasses.dataclass(frozen=True)
class _Edit:
    """An operand that is to be divided."""

    node: ir.Node
    index: int
    channels: Channels


@dataclasses.dataclass(frozen=True)
class _Tie:
    """Each row of `channels` must have one factor."""

    channels: Channels


@dataclasses.dataclass(frozen=True)
class _Divided:
    """A tensor that will hold other numbers than before, and so may not keep its name."""

    value: ir.Value


_Found: TypeAlias = "list[_Edit | _Tie | _Divided]"


@dataclasses.dataclass(frozen=True)
class Absorber:
    """The constants that take the factors of one value.

    Attributes:
        parts: What is to be divided, and which factors must be equal.
    """

    parts: Sequence[_Edit | _Tie | _Divided]

    def tie(self, factors: NDArray[np.float32]) -> NDArray[np.float32]:
        """`factors`, [K], with the largest of each tied group for all of it."""
        tied, before = factors.copy(), None
        while before is None or not np.array_equal(tied, before):
            before = tied.copy()
            for part in self.parts:
                if isinstance(part, _Tie):
                    largest = tied[part.channels].max(axis=1, keepdims=True)
                    # One member may be in several rows.
                    np.maximum.at(
                        tied, part.channels, np.broadcast_to(largest, part.channels.shape)
                    )
        return tied

    def divide(self, graph: ir.Graph, factors: NDArray[np.float32]) -> None:
        """Divide the constants by `factors`, [K], for these readers alone."""
        inverse = np.append(np.reciprocal(factors), np.float32(1))  # channel -1 is the last
        for part in self.parts:
            if isinstance(part, _Edit):
                scale_constant(graph, [part.node], part.index, inverse[part.channels])
            elif isinstance(part, _Divided):
                part.value.name = unique_name(graph, f"{part.value.name}_smoothed")


def scale_constant(
    graph: ir.Graph, readers: Sequence[ir.Node], index: int, factors: NDArray[np.float32]
) -> None:
    """Let these readers of a constant operand read its product with `factors`; others keep it."""
    operand = readers[0].inputs[index]
    array = constant(operand)
    assert operand is not None and array is not None
    scaled = new_initializer(
        graph, f"{operand.name}_smoothed", (array * factors).astype(array.dtype)
    )
    let_go(operand)
    for node in readers:
        node.replace_input_with(index, scaled)
    drop_if_unread(operand)


def absorber_of(value: ir.Value) -> Absorber | str:
    """What can take a factor per channel of `value`, or why nothing can.

    Args:
        value: Of known rank and last size; who else reads it is the caller's question.
    """
    shape = value.shape
    if shape is None or not len(shape) or not isinstance(shape[-1], int):
        return f"the shape of {value.name} is not known"
    channels = np.arange(shape[-1], dtype=np.intp)
    found = _divide(value, channels.reshape([1] * (len(shape) - 1) + [-1]))
    return found if isinstance(found, str) else Absorber(found)


def _divide(value: ir.Value, channels: Channels) -> _Found | str:
    """What to divide so that `value` is."""
    node = value.producer()
    if node is None:
        return f"{value.name} is an input of the model"
    norm = match_norm(node)
    if isinstance(norm, Norm):
        last = norm.nodes[-1]
        edits = [
            _Edit(last, list(last.inputs).index(parameter), trimmed(channels))
            for parameter in (norm.gamma, norm.beta)
            if parameter is not None
        ]
        return [_Divided(value), *edits]
    rule = _RULES.get(node.op_type) if node.domain == "" else None
    if rule is None:
        return f"no factor passes {label(node)} ({node.op_type})"
    found = rule(node, value, channels)
    return found if isinstance(found, str) else [_Divided(value), *found]


def _operand(node: ir.Node, index: int, channels: Channels) -> _Found | str:
    """What to divide so that an operand of `node` is; `channels` broadcast against the result."""
    operand = node.inputs[index]
    assert operand is not None
    if constant(operand) is not None:
        return [_Edit(node, index, trimmed(channels))]
    if operand.is_graph_output():
        return f"{operand.name} leaves the graph"
    if len(operand.uses()) > 1:
        return f"{operand.name} is read elsewhere too"
    fitted = _fit(channels, operand)
    if isinstance(fitted, str):
        return fitted
    channels, ties = fitted
    found = _divide(operand, channels)
    return found if isinstance(found, str) else [*ties, *found]


def _fit(channels: Channels, operand: ir.Value) -> tuple[Channels, list[_Tie]] | str:
    """Channels of an operand that is broadcast to a result; what one element serves is tied."""
    if operand.shape is None:
        return f"the shape of {operand.name} is not known"
    extra, ties = channels.ndim - len(operand.shape), list[_Tie]()
    for axis in range(channels.ndim):
        size = channels.shape[axis]
        found = operand.shape[axis - extra] if axis >= extra else 1
        if size == 1 or found == size:
            continue
        if found != 1:
            return f"the shape of {operand.name} is not known"
        rows = np.moveaxis(channels, axis, -1).reshape(-1, size)
        if (rows < 0).any():
            return f"{operand.name} serves channels that stay as they are"
        ties.append(_Tie(rows))
        channels = channels.take([0], axis)
    return channels.reshape(channels.shape[max(extra, 0) :]), ties


def _first(node: ir.Node, value: ir.Value, channels: Channels) -> _Found | str:
    return _operand(node, 0, channels)


def _product(node: ir.Node, value: ir.Value, channels: Channels) -> _Found | str:
    reasons = []
    for index in sorted((0, 1), key=lambda i: constant(node.inputs[i]) is None):
        found = _operand(node, index, channels)
        if not isinstance(found, str):
            return found
        reasons.append(found)
    return " and ".join(dict.fromkeys(reasons))


def _sum(node: ir.Node, value: ir.Value, channels: Channels) -> _Found | str:
    parts = [_operand(node, index, channels) for index in (0, 1)]
    reasons = [part for part in parts if isinstance(part, str)]
    return reasons[0] if reasons else [item for part in parts for item in part]  # type: ignore[misc]


def _matmul(node: ir.Node, value: ir.Value, channels: Channels) -> _Found | str:
    right = node.inputs[1]
    assert right is not None
    if channels.ndim < 2 or channels.shape[-2] != 1:
        return f"the rows of {label(node)} have factors of their own"
    fitted = _fit(channels, right)
    if isinstance(fitted, str):
        return fitted
    found = _operand(node, 1, fitted[0])
    return found if isinstance(found, str) else [*fitted[1], *found]


def _transpose(node: ir.Node, value: ir.Value, channels: Channels) -> _Found | str:
    order = node.attributes.get_ints("perm", range(channels.ndim)[::-1])
    return _operand(node, 0, channels.transpose(np.argsort(order)))


def _reshape(node: ir.Node, value: ir.Value, channels: Channels) -> _Found | str:
    data = node.inputs[0]
    assert data is not None
    grouped = None
    if data.shape is not None and value.shape is not None:
        grouped = regrouped(channels, list(data.shape), list(value.shape))
    if grouped is None:
        return f"how {label(node)} ({node.op_type}) moves the channels is not known"
    return _operand(node, 0, grouped)


def _squeezed(node: ir.Node, value: ir.Value, channels: Channels) -> _Found | str:
    data, axes = node.inputs[0], constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if data is None or data.shape is None or axes is None:
        return f"the shape of {label(node)} is not known"
    if node.op_type == "Unsqueeze":
        return _operand(node, 0, np.squeeze(channels, tuple(axes.tolist())))
    rank = len(data.shape)
    return _operand(node, 0, np.expand_dims(channels, sorted(int(axis) % rank for axis in axes)))


def _split(node: ir.Node, value: ir.Value, channels: Channels) -> _Found | str:
    axis = node.attributes.get_int("axis", 0) % channels.ndim
    sizes = [part.shape[axis] if part.shape is not None else None for part in node.outputs]
    if not all(isinstance(size, int) for size in sizes):
        return f"the sizes of the results of {label(node)} are not known"
    counts = [size for size in sizes if isinstance(size, int)]
    whole = np.full([*channels.shape[:axis], sum(counts), *channels.shape[axis + 1 :]], -1, np.intp)
    index = list(node.outputs).index(value)
    start = sum(counts[:index])
    part = (slice(None),) * axis + (slice(start, start + counts[index]),)
    whole[part] = channels
    return _operand(node, 0, whole)


_RULES: dict[str, Callable[[ir.Node, ir.Value, Channels], _Found | str]] = {
    "Mul": _product,
    "Div": _first,
    "Add": _sum,
    "Sub": _sum,
    "MatMul": _matmul,
    **dict.fromkeys(("Relu", "LeakyRelu", "Neg", "Abs", "Identity", "Expand"), _first),
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeezed,
    "Unsqueeze": _squeezed,
    "Split": _split,
}

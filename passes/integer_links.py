"""Links: ops without weights that can hand on integers between those that multiply them.

What ONNX Runtime 1.32 makes of an op between pairs, and what it costs, was measured op by op:

computes    Add, Mul, Concat, GlobalAveragePool, LeakyRelu, Sigmoid: integer kernels that take
            about as long as those of floats, so that the conversions around them are won
expands     Relu that something else reads beside => LeakyRelu of slope 0;  Sub(x, c) => Add(x, -c)
            HardSigmoid => Add, whose result saturates at 0 and 1;  HardSwish => that and a Mul
moves       MaxPool, Reshape, Transpose, Slice, Split, Pad, Resize to the nearest, ...: the scale of
            their result is that of their data
scales      Mul, Div by a number above 0: the same integers, with another scale

Left float, since their integer forms lose: AveragePool (7 times as long), Resize that interpolates
(6 times, and its results are cut off, not rounded), and all ops without one.
"""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from qcompiler.ir.decisions import is_kept_float
from qcompiler.ir.graph import constant, only_consumer, rectified
from qcompiler.passes.move_pairs import interpolates

__all__ = ["Link", "link_of"]

_MOVES = frozenset({
    "DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Pad", "Reshape", "Resize", "Slice",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
_ONE_OPERAND = frozenset({
    "GlobalAveragePool", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid",
})  # fmt: skip
_TWO_OPERANDS = frozenset({"Add", "Div", "Mul", "Sub"})


@dataclasses.dataclass(frozen=True)
class Link:
    """A node that can hand on integers.

    Attributes:
        node: The node.
        operands: What it reads as integers; constants are not among them.
        results: What it makes, after clamps that quantizing absorbs.
        moves: Whether its results have the scale of its operand,
        factor: times this.
    """

    node: ir.Node
    operands: tuple[ir.Value, ...]
    results: tuple[ir.Value, ...]
    moves: bool = False
    factor: float = 1.0


def link_of(node: ir.Node) -> Link | None:
    """How a node could hand on integers; None if it cannot, or is kept float."""
    if node.domain != "" or is_kept_float(node):
        return None
    values = [value for value in node.inputs if value is not None]
    if node.op_type in _MOVES:
        return _checked(Link(node, tuple(values[:1]), tuple(node.outputs), True)) if _moves(node) \
            else None  # fmt: skip
    result = (rectified(node.outputs[0]),)
    if node.op_type == "Concat" and not any(constant(value) is not None for value in values):
        return _checked(Link(node, tuple(dict.fromkeys(values)), result))
    if node.op_type in _ONE_OPERAND and _expands(node):
        return _checked(Link(node, tuple(values[:1]), result))
    return _two_operands(node, result) if node.op_type in _TWO_OPERANDS else None


def _moves(node: ir.Node) -> bool:
    if node.op_type == "MaxPool" and any(value.uses() for value in node.outputs[1:]):
        return False  # the indices of its maxima are read
    if node.op_type == "Pad":
        # ORT drops no pair around a Pad: what it pads with has to be known.
        fill = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
        return len(node.inputs) < 3 or node.inputs[2] is None or (fill is not None and not fill)
    return not interpolates(node)


def _expands(node: ir.Node) -> bool:
    if node.op_type == "Relu":
        data = node.inputs[0]
        maker = data.producer() if data is not None else None
        if data is None or maker is None or only_consumer(data) is not node:
            return True
        # Alone it is absorbed by what computes its input, but not by what moves it.
        made = link_of(maker)
        return made is not None and made.moves
    return node.op_type != "HardSigmoid" or node.attributes.get_float("alpha", 0.2) > 0


def _two_operands(node: ir.Node, result: tuple[ir.Value, ...]) -> Link | None:
    left, right = node.inputs
    if left is None or right is None or constant(left) is not None:
        left, right = right, left
    assert left is not None and right is not None
    number = constant(right)
    if number is None:
        operands = tuple(dict.fromkeys((left, right)))
        return _checked(Link(node, operands, result)) if node.op_type in ("Add", "Mul") else None
    if constant(left) is not None or (node.op_type in ("Sub", "Div") and right is node.inputs[0]):
        return None
    if node.op_type in ("Mul", "Div") and number.size == 1 and _keeps_rank(left, right):
        factor = float(number.item())
        if factor > 0 and node.op_type == "Div":
            factor = 1 / factor
        if factor > 0 and math.isfinite(factor):
            return _checked(Link(node, (left,), tuple(node.outputs), True, factor))
    return None if node.op_type == "Div" else _checked(Link(node, (left,), result))


def _keeps_rank(data: ir.Value, number: ir.Value) -> bool:
    rank = 0 if number.shape is None else len(number.shape)
    return rank == 0 or (data.shape is not None and rank <= len(data.shape))


def _checked(link: Link) -> Link | None:
    """The link, if all it reads and makes are floats that other nodes make or read."""
    kinds = {value.dtype for value in (*link.operands, link.node.outputs[0])}
    inner = not any(value.is_graph_output() for value in (*link.results, *link.node.outputs))
    constants = any(constant(value) is not None for value in link.operands)
    fits = kinds == {ir.DataType.FLOAT} and inner and not constants
    return link if fits and all(v.name for v in link.results) else None

"""Find attention: what a Softmax is the middle of, and where its operands come from.

    MatMul(guard(Softmax(MatMul(Q, K^T) * scale + mask)), V)

Nodes up to the two products must be read by nothing else; transposes and scales of the operands may
be, since they are only looked through.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompiler.ir.attention import ZERO
from qcompiler.ir.graph import constant, only_consumer, same_dimension, same_shape

__all__ = ["Attention", "Mismatch", "match_attention"]

_SWAP = [0, 2, 1, 3]


class Mismatch(Exception):  # noqa: N818 - no error: it says why a Softmax is not attention
    """Why a Softmax is not the middle of an attention that can be one kernel."""


@dataclasses.dataclass
class Operand:
    """A tensor of rank 4 behind transposes and scales.

    `turned` means that its last two dimensions are exchanged, `tokens_first` that it is
    [batch, tokens, heads, D]; the value used is `scale` times `value`.
    """

    value: ir.Value
    scale: float = 1.0
    turned: bool = False
    tokens_first: bool = False


@dataclasses.dataclass(frozen=True)
class Attention:
    """What was found.

    Attributes:
        operands: q, k and v.
        mask: What is added to the scores, if anything.
        scale: What they are multiplied by.
        guarded: Whether undefined rows become zeros.
        result: The result of the last node covered.
        tokens_first: Whether that is [batch, tokens, heads, D].
        depth: D.
    """

    operands: tuple[Operand, Operand, Operand]
    mask: ir.Value | None
    scale: float
    guarded: bool
    result: ir.Value
    tokens_first: bool
    depth: int

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of the region, see `ir/attention.py`."""
        order = [operand.tokens_first for operand in self.operands] + [self.tokens_first]
        layout = "".join("s" if tokens_first else "h" for tokens_first in order)
        return (layout, ZERO) if self.guarded else (layout,)


def match_attention(softmax: ir.Node) -> Attention:
    """The attention around `softmax`.

    Raises:
        Mismatch: There is none, or not one that is provably what a kernel computes.
    """
    scores, result = _require(softmax.inputs[0]), softmax.outputs[0]
    rank = len(scores.shape) if scores.shape is not None else None
    if softmax.attributes.get_int("axis", -1) not in (-1, 3) or rank != 4:
        raise Mismatch("not a softmax over the last of four dimensions")
    weights, guarded = _guarded(result)
    context = _only_reader(weights, "MatMul")
    if context.inputs[0] is not weights or context.inputs[1] is weights:
        raise Mismatch("its result is not the left operand of a product")
    product, mask, scale = _product(scores)
    query = _look_through(_require(product.inputs[0]))
    key = _look_through(_require(product.inputs[1]), turned=True)
    value = _look_through(_require(context.inputs[1]), scaled=False)
    if not key.turned:
        raise Mismatch("the scores are not a product with transposed keys")
    output, tokens_first = _by_tokens(context.outputs[0])
    last = output.producer()
    if last is None or last.graph is not softmax.graph:
        raise Mismatch("a part of it is in a branch")
    return Attention(
        operands=(query, key, value),
        mask=mask,
        scale=scale * query.scale * key.scale,
        guarded=guarded,
        result=output,
        tokens_first=tokens_first,
        depth=_depth(query, key, value),
    )


def _require(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise Mismatch("an operand is missing")
    if value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise Mismatch(f"{value.name} is {value.dtype}, not FLOAT or FLOAT16")
    return value


def _only_reader(value: ir.Value, op: str) -> ir.Node:
    reader = only_consumer(value)
    if reader is None:
        raise Mismatch(f"{value.name} is read elsewhere")
    if reader.op_type != op or reader.domain != "":
        raise Mismatch(f"{value.name} is read by {reader.op_type}, not {op}")
    return reader


def _guarded(soft: ir.Value) -> tuple[ir.Value, bool]:
    """Where(IsNaN(soft), 0, soft) if that is what reads `soft`."""
    readers = {use.node for use in soft.uses()}
    tests = [node for node in readers if node.op_type == "IsNaN" and node.domain == ""]
    if len(readers) != 2 or len(tests) != 1 or soft.is_graph_output():
        return soft, False
    choice = _only_reader(tests[0].outputs[0], "Where")
    zero = constant(choice.inputs[1])
    is_zero = zero is not None and zero.size == 1 and zero.ndim <= 4 and not zero.any()
    chosen = (choice.inputs[0], choice.inputs[2])
    if choice not in readers or chosen != (tests[0].outputs[0], soft) or not is_zero:
        raise Mismatch(f"{soft.name} is read elsewhere")
    return choice.outputs[0], True


def _product(scores: ir.Value) -> tuple[ir.Node, ir.Value | None, float]:
    """The MatMul behind scores, its mask and its scale."""
    node = scores.producer()
    if node is not None and node.op_type == "Add" and node.domain == "":
        _only_reader(scores, "Softmax")
        for value, mask in (node.inputs, reversed(node.inputs)):
            found = _scaled_product(value)
            if found is not None:
                return found[0], _usable_mask(mask), found[1]
        raise Mismatch("neither operand of its Add is a scaled product read only there")
    found = _scaled_product(scores)
    if found is None:
        raise Mismatch("its operand is not a scaled product read only there")
    return found[0], None, found[1]


def _scaled_product(value: ir.Value | None) -> tuple[ir.Node, float] | None:
    scale = 1.0
    while value is not None and only_consumer(value) is not None:
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type == "MatMul":
            return node, scale
        factor = _factor(node)
        if factor is None:
            return None
        value, scale = factor[0], scale * factor[1]
    return None


def _usable_mask(mask: ir.Value | None) -> ir.Value:
    mask = _require(mask)
    if mask.shape is None or not 1 <= len(mask.shape) <= 4:
        raise Mismatch(f"the mask {mask.name} has no known rank from 1 to 4")
    return mask


def _factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    """The operand and number of a Mul or Div by a constant scalar."""
    if node.op_type not in ("Mul", "Div") or node.domain != "":
        return None
    for value, other in (node.inputs, reversed(node.inputs)):
        array = constant(other)
        if value is None or array is None or array.size != 1 or array.ndim > 4:
            continue
        number = float(array.astype(np.float64).item())
        if node.op_type == "Mul" and np.isfinite(number):
            return value, number
        if node.op_type == "Div" and value is node.inputs[0] and np.isfinite(number) and number:
            return value, 1.0 / number
    return None


def _look_through(value: ir.Value, *, turned: bool = False, scaled: bool = True) -> Operand:
    """The tensor behind transposes and scales; `turned` if it is to be found transposed."""
    operand = Operand(value)
    while (node := operand.value.producer()) is not None and node.domain == "":
        order = _order(node)
        may_turn = turned and not operand.turned and not operand.tokens_first
        if scaled and (factor := _factor(node)) is not None:
            operand.value, operand.scale = factor[0], operand.scale * factor[1]
        elif may_turn and (source := _turn_of(node)) is not None:
            operand.value, operand.turned = source, True
        elif may_turn and order == [0, 2, 3, 1]:
            operand.value, operand.turned = _require(node.inputs[0]), True
            operand.tokens_first = True
        elif order == _SWAP and not operand.tokens_first and operand.turned == turned:
            operand.value, operand.tokens_first = _require(node.inputs[0]), True
        else:
            break
    return operand


def _turn_of(node: ir.Node) -> ir.Value | None:
    """What `node` exchanges the last two dimensions of, by one Transpose or between Reshapes."""
    if _order(node) == [0, 1, 3, 2]:
        return node.inputs[0]
    turn = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] else None
    if turn is None or _order(turn) != [0, 2, 1] or turn.inputs[0] is None:
        return None
    merge = turn.inputs[0].producer()
    source = merge.inputs[0] if merge is not None and merge.op_type == "Reshape" else None
    found = source is not None and _is_turned(source, turn.inputs[0], node.outputs[0])
    return source if found else None


def _order(node: ir.Node) -> list[int] | None:
    """The perm of a Transpose."""
    if node.op_type != "Transpose" or node.domain != "":
        return None
    return list(node.attributes.get_ints("perm", []))


def _is_turned(source: ir.Value, merged: ir.Value, result: ir.Value) -> bool:
    """Whether the shapes are [a, b, c, d], [?, c, d] and [a, b, d, c]: then no row is mixed up."""
    shapes = [tuple(value.shape or ()) for value in (source, merged, result)]
    if [len(shape) for shape in shapes] != [4, 3, 4]:
        return False
    (a, b, c, d), middle, last = shapes
    pairs = zip((c, d, a, b, d, c), (*middle[1:], *last), strict=True)
    return all(same_dimension(one, other) for one, other in pairs)


def _by_tokens(context: ir.Value) -> tuple[ir.Value, bool]:
    """The context after the transpose that puts tokens first, if that is all that reads it."""
    result, reader = context, only_consumer(context)
    if reader is not None and reader.op_type == "Reshape" and same_shape(reader.outputs[0], result):
        result = reader.outputs[0]
        reader = only_consumer(result)
    if reader is None or _order(reader) != _SWAP:
        return context, False
    return reader.outputs[0], True


def _depth(query: Operand, key: Operand, value: Operand) -> int:
    depths = set()
    for operand in (query, key, value):
        shape = _require(operand.value).shape
        if shape is None or len(shape) != 4:
            raise Mismatch(f"{operand.value.name} has no known rank of 4")
        depths.add(shape[3])
    depth = depths.pop()
    if depths or not isinstance(depth, int) or depth < 1:
        raise Mismatch("q, k and v do not have heads of one known size")
    return depth

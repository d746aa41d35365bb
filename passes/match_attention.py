"""Find attention: what a Softmax is the middle of, and where its operands come from.

    MatMul(guard(Softmax(MatMul(Q, K^T) * scale + mask)), V)

Nodes up to the two products must be read by nothing else; transposes and scales of the operands may
be, since they are only looked through.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompiler.ir.attention import ZERO, grouped
from qcompiler.ir.graph import constant, only_consumer, same_shape
from qcompiler.passes.attention_operand import (
    SWAP,
    Mismatch,
    Operand,
    factor_of,
    look_through,
    order_of,
    require,
)

__all__ = ["Attention", "match_attention"]


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
        return (layout, *grouped(self.group), *((ZERO,) if self.guarded else ()))

    @property
    def group(self) -> int:
        """How many heads of q read one of k and v."""
        return self.operands[1].copies


def match_attention(softmax: ir.Node, *, may_group: bool = True) -> Attention:
    """The attention around `softmax`.

    Args:
        softmax: Its middle.
        may_group: Whether several heads of q may read one of k and v; else the copies are read.

    Raises:
        Mismatch: There is none, or not one that is provably what a kernel computes.
    """
    scores, result = require(softmax.inputs[0]), softmax.outputs[0]
    rank = len(scores.shape) if scores.shape is not None else None
    if softmax.attributes.get_int("axis", -1) not in (-1, 3) or rank != 4:
        raise Mismatch("not a softmax over the last of four dimensions")
    weights, guarded = _guarded(result)
    context = _only_reader(weights, "MatMul")
    if context.inputs[0] is not weights or context.inputs[1] is weights:
        raise Mismatch("its result is not the left operand of a product")
    product, mask, scale = _product(scores)
    query = look_through(require(product.inputs[0]))
    keys, values = require(product.inputs[1]), require(context.inputs[1])
    key = look_through(keys, turned=True, grouped=may_group)
    value = look_through(values, scaled=False, grouped=may_group)
    if key.copies != value.copies:
        key = look_through(keys, turned=True)
        value = look_through(values, scaled=False)
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
        factor = factor_of(node)
        if factor is None:
            return None
        value, scale = factor[0], scale * factor[1]
    return None


def _usable_mask(mask: ir.Value | None) -> ir.Value:
    mask = require(mask)
    if mask.shape is None or not 1 <= len(mask.shape) <= 4:
        raise Mismatch(f"the mask {mask.name} has no known rank from 1 to 4")
    return mask


def _by_tokens(context: ir.Value) -> tuple[ir.Value, bool]:
    """The context after the transpose that puts tokens first, if that is all that reads it."""
    result, reader = context, only_consumer(context)
    if reader is not None and reader.op_type == "Reshape" and same_shape(reader.outputs[0], result):
        result = reader.outputs[0]
        reader = only_consumer(result)
    if reader is None or order_of(reader) != SWAP:
        return context, False
    return reader.outputs[0], True


def _depth(query: Operand, key: Operand, value: Operand) -> int:
    depths = set()
    for operand in (query, key, value):
        shape = require(operand.value).shape
        if shape is None or len(shape) != 4:
            raise Mismatch(f"{operand.value.name} has no known rank of 4")
        depths.add(shape[3])
    depth = depths.pop()
    if depths or not isinstance(depth, int) or depth < 1:
        raise Mismatch("q, k and v do not have heads of one known size")
    return depth

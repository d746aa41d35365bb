"""An operand of attention: the tensor behind transposes, scales and copies of its heads."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import constant, same_dimension
from qcompiler.ir.sizes import is_size_of, sizes_of

__all__ = ["SWAP", "Mismatch", "Operand", "factor_of", "look_through", "order_of", "require"]

SWAP = [0, 2, 1, 3]
"""Of a Transpose between heads first and tokens first."""


class Mismatch(Exception):  # noqa: N818 - no error: it says why a Softmax is not attention
    """Why a Softmax is not the middle of an attention that can be one kernel."""


@dataclasses.dataclass
class Operand:
    """A tensor of rank 4 behind transposes and scales.

    `turned` means that its last two dimensions are exchanged, `tokens_first` that it is
    [batch, tokens, heads, D], `copies` how often each of its heads is used, one after the other;
    the value used is `scale` times `value`.
    """

    value: ir.Value
    scale: float = 1.0
    turned: bool = False
    tokens_first: bool = False
    copies: int = 1


def require(value: ir.Value | None) -> ir.Value:
    """`value`, if it is of float32 or float16.

    Raises:
        Mismatch: It is not.
    """
    if value is None:
        raise Mismatch("an operand is missing")
    if value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise Mismatch(f"{value.name} is {value.dtype}, not FLOAT or FLOAT16")
    return value


def factor_of(node: ir.Node) -> tuple[ir.Value, float] | None:
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


def look_through(
    value: ir.Value, *, turned: bool = False, scaled: bool = True, grouped: bool = False
) -> Operand:
    """The tensor behind transposes, scales and copies of heads, if it is `grouped`.

    `turned` if it is to be found transposed.
    """
    operand = Operand(value)
    while (node := operand.value.producer()) is not None and node.domain == "":
        order = order_of(node)
        may_turn = turned and not operand.turned and not operand.tokens_first
        if scaled and (factor := factor_of(node)) is not None:
            operand.value, operand.scale = factor[0], operand.scale * factor[1]
        elif may_turn and (source := _turn_of(node)) is not None:
            operand.value, operand.turned = source, True
        elif may_turn and order == [0, 2, 3, 1]:
            operand.value, operand.turned = require(node.inputs[0]), True
            operand.tokens_first = True
        elif order == SWAP and not operand.tokens_first and operand.turned == turned:
            operand.value, operand.tokens_first = require(node.inputs[0]), True
        elif (
            grouped
            and operand.turned == turned
            and (found := _repeated(node, 2 if operand.tokens_first else 1)) is not None
        ):
            operand.value, operand.copies = found[0], operand.copies * found[1]
        else:
            break
    return operand


def _repeated(merge: ir.Node, heads: int) -> tuple[ir.Value, int] | None:
    """What `merge` has several copies of each head of, side by side on that axis, and how many.

    Reshape(Expand(Unsqueeze(x, [heads + 1]), sizes)), as in grouped-query attention.
    """
    expand = _made_by(merge.inputs[0], "Expand") if merge.op_type == "Reshape" else None
    apart = _made_by(expand.inputs[0], "Unsqueeze") if expand is not None else None
    source = apart.inputs[0] if apart is not None else None
    if expand is None or apart is None or source is None:
        return None
    values = (source, apart.outputs[0], expand.outputs[0], merge.outputs[0])
    before, separate, repeated, after = (tuple(value.shape or ()) for value in values)
    if [len(before), len(separate), len(repeated), len(after)] != [4, 5, 5, 4]:
        return None
    sizes, count = sizes_of(expand.inputs[1]), before[heads]
    copies = sizes[heads + 1] if sizes is not None and len(sizes) == 5 else repeated[heads + 1]
    if not isinstance(count, int) or not isinstance(copies, int) or copies < 1:
        return None
    if separate[heads + 1] != 1:
        return None
    is_expanded = all(
        _keeps(expand, axis, separate[axis], ones=True) for axis in range(5) if axis != heads + 1
    )
    # Of the two other dimensions of a row-major tensor one says what the other is.
    is_merged = (after[heads], after[3]) == (count * copies, before[3]) and any(
        _keeps(merge, axis, before[axis]) for axis in {0, 1, 2} - {heads}
    )
    return (source, copies) if is_expanded and is_merged else None


def _made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op and node.domain == "" else None


def _keeps(
    node: ir.Node, axis: int, dimension: int | ir.SymbolicDim, *, ones: bool = False
) -> bool:
    """Whether a dimension of an Expand or Reshape is provably this one; a size of 1 may keep it."""
    shape, sizes = node.outputs[0].shape, sizes_of(node.inputs[1])
    if shape is not None and same_dimension(shape[axis], dimension):
        return True
    # The sizes of an Expand may be those of its last dimensions alone.
    if shape is None or sizes is None or len(sizes) != len(shape):
        return False
    return is_size_of(sizes[axis], dimension) or (ones and sizes[axis] == 1)


def _turn_of(node: ir.Node) -> ir.Value | None:
    """What `node` exchanges the last two dimensions of, by one Transpose or between Reshapes."""
    if order_of(node) == [0, 1, 3, 2]:
        return node.inputs[0]
    turn = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] else None
    if turn is None or order_of(turn) != [0, 2, 1] or turn.inputs[0] is None:
        return None
    merge = turn.inputs[0].producer()
    source = merge.inputs[0] if merge is not None and merge.op_type == "Reshape" else None
    found = source is not None and _is_turned(source, turn.inputs[0], node.outputs[0])
    return source if found else None


def order_of(node: ir.Node) -> list[int] | None:
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

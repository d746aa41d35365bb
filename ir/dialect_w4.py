"""The products by weights of 4 bits: one op for each way to store a group of them.

    name               weight of a group     stored beside the int4 w
    QMatMulW4A8        w ws                  ws float [K/G, N]
    QMatMulW4Z4A8      (w - wz) ws           wz int4 [K/G, N]
    QMatMulW4S8A8      w gs cs               gs int8 [K/G, N], cs float [N]

A8 multiplies int8 activations with a scale per token, A16 floats; two of the former have kernels
that quantize their result as well, `Requantized`.  Groups with offsets o, a weight
being w ws + o, take one of these, and what all the weights of a group have in common once:

    x W = QMatMulW4…(x, w, ws) + GroupSums(x) o

The sums of int8 activations are integers, which floats hold exactly.  With zero points they would
do as well; there ORT reads a DequantizeLinear instead, of which it makes MatMulNBits.

Two more forms that ORT needs: A8 widens its activations with Cast/Sub/Mul, because a
DequantizeLinear there stops ORT from turning the weight's into MatMulNBits (weights would be
dequantized at every run).  Scales of two levels are multiplied by Cast/Mul, too, which ORT folds
when a session is made: a DequantizeLinear it would not, and then makes no MatMulNBits.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.dialect_op import DialectOp
from qcompiler.ir.dialect_quantize import requantized

__all__ = ["W4_OPS"]

_CENTRED = """
    real = Cast <to = 1> (q)
    middle = Constant <value_float = 128.0> ()
    centred = Sub (real, middle)
"""

_TOKENS = _CENTRED + "    x = Mul (centred, s)\n"

_TWO_LEVELS = """
    groups = Cast <to = 1> (gs)
    ws = Mul (groups, cs)
"""

_SUMS = """
    one = Constant <value_ints = [1]> ()
    number = Constant <value_int {=block_size}> ()
    size = Reshape (number, one)
    tokens = Shape <end = -1> ({x})
    depth = Shape <start = -1> ({x})
    above = Add (depth, size)
    most = Sub (above, one)
    count = Div (most, size)
    whole = Mul (count, size)
    missing = Sub (whole, depth)
    none = Constant <value_ints = [0]> ()
    pads = Concat <axis = 0> (none, missing)
    zero = Constant <value_float = 0.0> ()
    nothing = CastLike (zero, {x})
    last = Constant <value_ints = [-1]> ()
    padded = Pad ({x}, pads, nothing, last)
    shape = Concat <axis = 0> (tokens, count, size)
    blocks = Reshape (padded, shape)
    {y} = ReduceSum <keepdims = 0> (blocks, last)
"""

_SCALES = {
    "": ("", (("ws", "K/block_size N"),), ()),
    "S8": (_TWO_LEVELS, (("gs", "K/block_size N"), ("cs", "N")), (("gs", ir.DataType.INT8),)),
    "Z4": ("", (("ws", "K/block_size N"), ("wz", "K/block_size N")), (("wz", ir.DataType.INT4),)),
}
"""By the part of the name that says so: lines of the body, inputs beside w, and their types."""


def _product(scale: str, activation: str) -> DialectOp:
    lines, scales, types = _SCALES[scale]
    by_token = activation == "A8"
    data = (("q", "* K"), ("s", "* 1")) if by_token else (("x", "* K"),)
    operands = "w, ws, wz" if scale == "Z4" else "w, ws"
    shapes = (*data, ("w", "K N"), *scales, ("y", "* N"))
    return DialectOp(
        name=f"QMatMulW4{scale}{activation}",
        inputs=tuple(name for name, _ in shapes[:-1]),
        outputs=("y",),
        attributes=("block_size",),
        types=(
            *((("q", ir.DataType.UINT8),) if by_token else ()),
            ("w", ir.DataType.INT4),
            *types,
        ),
        shapes=shapes,
        wide=("s", "ws") if by_token and scale != "S8" else (),
        follows=not by_token and scale != "S8",
        body=lines
        + (_TOKENS if by_token else "\n")
        + f"    wide = DequantizeLinear <axis = 0, {{block_size}}> ({operands})\n"
        + "    y = MatMul (x, wide)\n",
    )


def _lines(x: str, y: str) -> str:
    return _SUMS.replace("{x}", x).replace("{y}", y)


_SUMS_A8 = DialectOp(
    name="GroupSumsA8",
    inputs=("q", "s"),
    outputs=("y",),
    attributes=("block_size",),
    types=(("q", ir.DataType.UINT8),),
    shapes=(("q", "* K"), ("s", "* 1"), ("y", "* K/block_size")),
    wide=("s",),
    body=_CENTRED + _lines("centred", "integers") + "    y = Mul (integers, s)\n",
)

_SUMS_A16 = DialectOp(
    name="GroupSumsA16",
    inputs=("x",),
    outputs=("y",),
    attributes=("block_size",),
    shapes=(("x", "* K"), ("y", "* K/block_size")),
    follows=True,
    body=_lines("x", "y"),
)

W4_OPS = (
    *(_product(scale, activation) for scale in _SCALES for activation in ("A8", "A16")),
    *(requantized(_product(scale, "A8")) for scale in ("", "S8")),
    _SUMS_A8,
    _SUMS_A16,
)
"""In the order of the table."""

"""The products by weights of 4 bits: one op for each way to store a group of them.

    name               weight of a group                 stored beside the int4 w
    QMatMulW4A8        w ws                              ws float [K/G, N]
    QMatMulW4Z4A8      (w - wz) ws                       wz int4 [K/G, N]
    QMatMulW4O32A8     w ws + wo                         wo float [K/G, N]
    QMatMulW4S8A8      w gs cs                           gs int8 [K/G, N], cs float [N]
    QMatMulW4S8O8A8    w gs cs + go co                   go int8 [K/G, N], co float [N]

A8 multiplies int8 activations with a scale per token, A16 floats.  An offset is multiplied by the
sum of its group's activations, once for all the weights of the group:

    x W = sum over groups g of  (sum of x w) ws[g] + (sum of x) wo[g]

of int8 activations by the sum of their integers, which a float holds exactly.  With zero points
that sum would do as well; there ORT reads a DequantizeLinear instead, of which it makes
MatMulNBits.

Two more forms that ORT needs: A8 widens its activations with Cast/Sub/Mul, because a
DequantizeLinear there stops ORT from turning the weight's into MatMulNBits (weights would be
dequantized at every run).  Scales of two levels are multiplied by Cast/Mul, too, which ORT folds
when a session is made: a DequantizeLinear it would not, and then makes no MatMulNBits.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.dialect_op import DialectOp

__all__ = ["W4_OPS"]

_CENTRED = """
    real = Cast <to = 1> (q)
    middle = Constant <value_float = 128.0> ()
    centred = Sub (real, middle)
    x = Mul (centred, s)
"""

_TWO_LEVELS = """
    groups = Cast <to = 1> (gs)
    ws = Mul (groups, cs)
"""

_TWO_LEVELS_OF_OFFSETS = """
    offsets = Cast <to = 1> (go)
    wo = Mul (offsets, co)
"""

_SUMS = """
    size = Constant <value_int {=block_size}> ()
    one = Constant <value_ints = [1]> ()
    length = Reshape (size, one)
    tokens = Shape <end = -1> ({x})
    depth = Shape <start = -1> ({x})
    count = Shape <end = 1> (wo)
    whole = Mul (count, length)
    missing = Sub (whole, depth)
    none = Constant <value_ints = [0]> ()
    pads = Concat <axis = 0> (none, missing)
    nothing = Constant <value_float = 0.0> ()
    last = Constant <value_ints = [-1]> ()
    padded = Pad ({x}, pads, nothing, last)
    shape = Concat <axis = 0> (tokens, count, length)
    blocks = Reshape (padded, shape)
    {sums} = ReduceSum <keepdims = 0> (blocks, last)
"""
"""Of each group of the last axis; the last group may be shorter, and ends in zeros."""

_SCALES = {
    "": ("", (("ws", "K/block_size N"),), ()),
    "S8": (_TWO_LEVELS, (("gs", "K/block_size N"), ("cs", "N")), (("gs", ir.DataType.INT8),)),
}

_ZEROS = {
    "": ("", (), ()),
    "Z4": ("", (("wz", "K/block_size N"),), (("wz", ir.DataType.INT4),)),
    "O32": ("", (("wo", "K/block_size N"),), ()),
    "O8": (
        _TWO_LEVELS_OF_OFFSETS,
        (("go", "K/block_size N"), ("co", "N")),
        (("go", ir.DataType.INT8),),
    ),
}
"""By the part of the name that says so: lines of the body, further inputs and their types."""


def _product(scale: str, zero: str, activation: str) -> DialectOp:
    scale_lines, scales, scale_types = _SCALES[scale]
    zero_lines, zeros, zero_types = _ZEROS[zero]
    by_token = activation == "A8"
    data = (("q", "* K"), ("s", "* 1")) if by_token else (("x", "* K"),)
    operands = ("w", "ws", "wz") if zero == "Z4" else ("w", "ws")
    wide = f"    wide = DequantizeLinear <axis = 0, {{block_size}}> ({', '.join(operands)})\n"
    body = scale_lines + zero_lines + (_CENTRED if by_token else "\n") + wide
    if "O" in zero:
        body += "    scaled = MatMul (x, wide)\n"
        body += _SUMS.format(**_SUMMED[by_token])
        body += "    sums = Mul (integers, s)\n" if by_token else ""
        body += "    moved = MatMul (sums, wo)\n    y = Add (scaled, moved)\n"
    else:
        body += "    y = MatMul (x, wide)\n"
    shapes = (*data, ("w", "K N"), *scales, *zeros, ("y", "* N"))
    return DialectOp(
        name=f"QMatMulW4{scale}{zero}{activation}",
        inputs=tuple(name for name, _ in shapes[:-1]),
        outputs=("y",),
        attributes=("block_size",),
        types=(
            *((("q", ir.DataType.UINT8),) if by_token else ()),
            ("w", ir.DataType.INT4),
            *scale_types,
            *zero_types,
        ),
        shapes=shapes,
        # Only of kernels: what is computed beside one is in float32.
        wide=("s", "ws") if by_token and not scale + zero else (),
        follows=activation == "A16" and not scale and "O" not in zero,
        body=body,
    )


_SUMMED = {
    True: {"x": "centred", "sums": "integers", "=block_size": "{=block_size}"},
    False: {"x": "x", "sums": "sums", "=block_size": "{=block_size}"},
}

W4_OPS = tuple(
    _product(scale, zero, activation)
    for scale, zero in (("", ""), ("", "Z4"), ("", "O32"), ("S8", ""), ("S8", "O8"))
    for activation in ("A8", "A16")
)
"""In the order of the table."""

"""The table of the ops of the `qcompiler` domain, each with its body in standard ONNX ops.

Bodies are written in the forms ORT fuses and avoid the ones it gets wrong:

* uint8 activations with zero point 128: s8 x s8 MatMulInteger is 23-100 times slower in ORT;
* weights as uint8, too, 128 above what is stored (Cast wraps, BitwiseXor flips the top bit): sums
  of u8 x s8 saturate in ORT on x86 without VNNI.  ORT folds both ops when a session is made, and
  fuses the product as it would without them;
* scales multiply one after the other: ORT fuses `Mul(a_scale, b_scale)` only for a scalar a_scale,
  and of that, after DynamicQuantizeLinear, it makes one DynamicQuantizeMatMul (QMatMulU8S8);
* a Slice after ReduceMax: ORT returns an empty batch unreduced, [0, K] instead of [0, 1];
* Sum, not Add, before a LayerNormalization: ORT makes SkipLayerNormalization of that pair, which is
  8 times slower;
* zeros joined by Concat, where a Pad would be of some axes: ORT moves Transposes across it as if it
  were of all, and fails;
* RMSNorm in the one spelling that ORT makes SimplifiedLayerNormalization of.

Here are products by weights of 8 bits; those by 4 are in `dialect_w4.py`, what quantizes tokens in
`dialect_quantize.py`, norms and attention in `dialect_rows.py`, convolutions of GPUs in
`dialect_image.py`.

Regions also come in float16, by the flag `HALF`: the floats that a kernel would read and write in
bulk are float16 then, and widened, so that all in between is computed as ever; scales that are
computed or multiplied last stay float32.

The same text gives the generic op (`{block_size}` becomes a reference to the attribute) and the
body of one region (it becomes that region's number); `{=epsilon}` where the body's op calls the
attribute something else.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.dialect_image import IMAGE_OPS
from qcompiler.ir.dialect_op import DialectOp
from qcompiler.ir.dialect_quantize import QUANTIZE_OPS, TOKEN_TO_INT8, requantized
from qcompiler.ir.dialect_rows import ATTENTION_OPS, NORM_OPS
from qcompiler.ir.dialect_w4 import W4_OPS

__all__ = ["OPS", "WINDOWS", "DialectOp"]

WINDOWS = """
    windows = Identity (x)
"""
"""Of one tap; a region's sizes say of how many, R, and how many rows there are to the next, S.

Its attribute `pads`, if there is one, says how many rows of zeros are before and behind x, and
`dilations` how many rows further the next of a window is."""

_SHIFTED = """
    middle = Constant <value = uint8 {128}> ()
    bytes = Cast <to = 2> (w)
    shifted = BitwiseXor (bytes, middle)
"""

_ROWS = (("q", "* K"), ("s", "* 1"))
_MATRIX = (("w", "K N"), ("ws", "N"), ("y", "* N"))
_ONE_ROW = (("q", "* K"), ("s", "1?"), ("z", "1?"))

_W8A8 = DialectOp(
    name="QMatMulW8A8",
    inputs=("q", "s", "w", "ws"),
    outputs=("y",),
    types=(("q", ir.DataType.UINT8), ("w", ir.DataType.INT8)),
    shapes=(*_ROWS, *_MATRIX),
    wide=("s", "ws"),
    body=_SHIFTED
    + """
    sum = MatMulInteger (q, shifted, middle, middle)
    real = Cast <to = 1> (sum)
    by_token = Mul (real, s)
    y = Mul (by_token, ws)
""",
)


_SUMS_OF_ONE_SCALE = """
    sum = MatMulInteger (q, {weight})
    real = Cast <to = 1> (sum)
    scale = Mul (s, ws)
    y = Mul (real, scale)
"""

_U8S8 = DialectOp(
    name="QMatMulU8S8",
    inputs=("q", "s", "z", "w", "ws"),
    outputs=("y",),
    types=(("q", ir.DataType.UINT8), ("z", ir.DataType.UINT8), ("w", ir.DataType.INT8)),
    shapes=(*_ONE_ROW, *_MATRIX),
    wide=("s", "ws"),
    body=_SHIFTED + _SUMS_OF_ONE_SCALE.replace("{weight}", "shifted, z, middle"),
)

_U8U8 = DialectOp(
    name="QMatMulU8U8",
    inputs=("q", "s", "z", "w", "ws", "wz"),
    outputs=("y",),
    types=tuple((name, ir.DataType.UINT8) for name in ("q", "z", "w", "wz")),
    shapes=(*_ONE_ROW, *_MATRIX, ("wz", "N")),
    wide=("s", "ws"),
    body=_SUMS_OF_ONE_SCALE.replace("{weight}", "w, z, wz"),
)

_W8A8_DYNAMIC = DialectOp(
    name="DynamicQMatMulW8A8",
    inputs=("x", "w", "ws"),
    outputs=("y",),
    attributes=("block_size",),
    types=(("w", ir.DataType.INT8),),
    shapes=(("x", "* block_size"), ("w", "block_size N"), *_MATRIX[1:]),
    wide=("ws",),
    stage="kernel",
    body=TOKEN_TO_INT8.replace("{x}", "x") + _W8A8.body.replace("middle", "zero_point"),
)

_W8A8_WINDOWED = DialectOp(
    name="WindowedQMatMulW8A8",
    inputs=("x", "w", "ws"),
    outputs=("y",),
    attributes=("block_size",),
    types=(("w", ir.DataType.INT8),),
    shapes=(("w", "block_size N"), *_MATRIX[1:]),
    wide=("ws",),
    stage="kernel",
    body=WINDOWS
    + TOKEN_TO_INT8.replace("{x}", "windows")
    + _W8A8.body.replace("middle", "zero_point"),
)

_FP8 = DialectOp(
    name="QMatMulFp8",
    inputs=("q", "s", "w", "ws"),
    outputs=("y",),
    types=(("q", ir.DataType.FLOAT8E4M3FN), ("w", ir.DataType.FLOAT8E4M3FN)),
    shapes=(*_ROWS, *_MATRIX),
    wide=("s", "ws"),
    body="""
    x = Cast <to = 1> (q)
    wide = Cast <to = 1> (w)
    sum = MatMul (x, wide)
    by_token = Mul (sum, s)
    y = Mul (by_token, ws)
""",
)

_CONV = DialectOp(
    name="QConv",
    inputs=("x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"),
    outputs=("y",),
    attributes=("dilations", "group", "pads", "strides"),
    types=(
        ("x", ir.DataType.UINT8),
        ("xz", ir.DataType.UINT8),
        ("w", ir.DataType.INT8),
        ("wz", ir.DataType.INT8),
        ("yz", ir.DataType.UINT8),
        ("b", ir.DataType.INT32),
        ("y", ir.DataType.UINT8),
    ),
    shapes=(
        ("x", "B C *"),
        ("w", "M C/group *"),
        *((name, "1?") for name in ("xs", "xz", "ys", "yz")),
        *((name, "M?") for name in ("ws", "wz")),
        ("b", "M"),
        ("y", "B M *"),
    ),
    body="""
    y = QLinearConv <{dilations}, {group}, {pads}, {strides}> (x, xs, xz, w, ws, wz, ys, yz, b)
""",
)

_MATMULS = (_W8A8, _U8S8, _U8U8, _W8A8_DYNAMIC, _W8A8_WINDOWED, requantized(_W8A8), *W4_OPS, _FP8)
OPS = {
    op.name: op for op in (*QUANTIZE_OPS, *_MATMULS, _CONV, *IMAGE_OPS, *NORM_OPS, *ATTENTION_OPS)
}

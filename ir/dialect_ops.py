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
* RMSNorm in the one spelling that ORT makes SimplifiedLayerNormalization of.

Those of products by weights of 4 bits are in `dialect_w4.py`, convolutions of GPUs in
`dialect_image.py`.

Regions also come in float16, by the flag `HALF`: the floats that a kernel would read and write in
bulk are float16 then, and widened, so that all in between is computed as ever; scales that are
computed or multiplied last stay float32.

The same text gives the generic op (`{block_size}` becomes a reference to the attribute) and the
body of one region (it becomes that region's number); `{=epsilon}` where the body's op calls the
attribute something else.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from qcompiler.ir.attention import attention_body
from qcompiler.ir.dialect_image import IMAGE_OPS
from qcompiler.ir.dialect_op import DialectOp
from qcompiler.ir.dialect_w4 import W4_OPS

__all__ = ["OPS", "SMALLEST_MAGNITUDE", "WINDOWS", "DialectOp"]

SMALLEST_MAGNITUDE = 1e-20
"""Floor of a token's largest magnitude: an all-zero token still needs a scale to divide by."""


_SCALE_OF_TOKEN = """
    magnitude = Abs ({x})
    last = Constant <value_ints = [-1]> ()
    reduced = ReduceMax <keepdims = 1> (magnitude, last)
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    largest = Slice (reduced, first, second, last)
    floor = Constant <value_float = {floor}> ()
    bounded = Max (largest, floor)
    top = Constant <value_float = {top}> ()
    s = Div (bounded, top)
""".replace("{floor}", str(SMALLEST_MAGNITUDE))

_TOKEN_TO_INT8 = (
    _SCALE_OF_TOKEN.replace("{top}", "127.0")
    + """
    middle = Constant <value = uint8 {128}> ()
    shape = Shape (s)
    zero = Expand (middle, shape)
    q = QuantizeLinear <axis = -1, {block_size}> ({x}, s, zero)
"""
)

_SMOOTHED = "    z = Mul (x, extra0)" + _TOKEN_TO_INT8.replace("{x}", "z")

_TOKEN_TO_FP8 = (
    _SCALE_OF_TOKEN.replace("{top}", "448.0")
    + """
    q = QuantizeLinear <axis = -1, {block_size}, output_dtype = 17> ({x}, s)
"""
)

WINDOWS = """
    windows = Identity (x)
"""
"""Of one tap; a region's sizes say of how many, R, and how many rows there are to the next, S.

Its attribute `pads`, if there is one, says how many rows of zeros are before and behind x."""

_SHIFTED = """
    middle = Constant <value = uint8 {128}> ()
    bytes = Cast <to = 2> (w)
    shifted = BitwiseXor (bytes, middle)
"""

_TOKENS = (("x", "* block_size"), ("q", "* block_size"), ("s", "* 1"))
_ROWS = (("q", "* K"), ("s", "* 1"))
_MATRIX = (("w", "K N"), ("ws", "N"), ("y", "* N"))
_ONE_ROW = (("q", "* K"), ("s", "1?"), ("z", "1?"))

_QUANTIZE = DialectOp(
    name="Quantize",
    inputs=("x",),
    outputs=("q", "s"),
    attributes=("block_size",),
    types=(("q", ir.DataType.UINT8),),
    shapes=_TOKENS,
    wide=("s",),
    body=_TOKEN_TO_INT8.replace("{x}", "x"),
    form=lambda flags: _SMOOTHED if "smoothed" in flags else _TOKEN_TO_INT8.replace("{x}", "x"),
)

_QUANTIZE_FP8 = DialectOp(
    name="QuantizeFp8",
    inputs=("x",),
    outputs=("q", "s"),
    attributes=("block_size",),
    types=(("q", ir.DataType.FLOAT8E4M3FN),),
    shapes=_TOKENS,
    wide=("s",),
    body=_TOKEN_TO_FP8.replace("{x}", "x"),
)

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


def _requantized(x: str) -> str:
    """A `Quantize` of x, `width` wide, as the ending of a body with a q and an s of its own."""
    own = {"x": x, "q": "yq", "s": "ys", "middle": "result_middle"}
    body = _TOKEN_TO_INT8.replace("{block_size}", "block_size {=width}")
    return re.sub(r"\{x\}|\b(q|s|middle)\b", lambda m: own[m[0].strip("{}")], body)


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
    body=_QUANTIZE.body + _W8A8.body.replace("middle", "zero_point"),
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
    + _TOKEN_TO_INT8.replace("{x}", "windows")
    + _W8A8.body.replace("middle", "zero_point"),
)

_W8A8_REQUANTIZED = DialectOp(
    name="RequantizedQMatMulW8A8",
    inputs=_W8A8.inputs,
    outputs=("y", "yq", "ys"),
    attributes=("width",),
    types=(*_W8A8.types, ("yq", ir.DataType.UINT8)),
    shapes=(*_W8A8.shapes, ("yq", "* N"), ("ys", "* 1")),
    wide=(*_W8A8.wide, "ys"),
    stage="kernel",
    body=_W8A8.body,
    ending=_requantized("y"),
    smoothed_ending="    z = Mul (y, smoothing)\n" + _requantized("z"),
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

_LAYER_NORM = """
    y = LayerNormalization <axis = -1, {epsilon}> (x, gamma, beta)
"""

_RMS_NORM = """
    two = Constant <value_float = 2.0> ()
    squares = Pow (x, two)
    axes = Constant <value_ints = [-1]> ()
    mean = ReduceMean <keepdims = 1> (squares, axes)
    epsilon = Constant <value_float {=epsilon}> ()
    above_zero = Add (mean, epsilon)
    root = Sqrt (above_zero)
    unit = Div (x, root)
    y = Mul (unit, gamma)
"""


def _norm(name: str, body: str, parameters: tuple[str, ...]) -> DialectOp:
    """A norm of `x`, or of `x = a + b`, and the `Quantize` of its result.

    With the flag "smoothed" what is quantized is the product with one extra operand per channel.
    """
    residual, is_fp8 = name.startswith("Add"), name.endswith("Fp8")
    quantized = _TOKEN_TO_FP8 if is_fp8 else _TOKEN_TO_INT8
    body = ("    x = Sum (a, b)" if residual else "") + body
    smoothed = f"{body}    z = Mul (y, extra0)\n" + quantized.replace("{x}", "z")
    plain = body + quantized.replace("{x}", "y")
    return DialectOp(
        name=name,
        inputs=(*(("a", "b") if residual else ("x",)), *parameters),
        outputs=(*(("x",) if residual else ()), "y", "q", "s"),
        attributes=("epsilon", "block_size"),
        types=(("q", ir.DataType.FLOAT8E4M3FN if is_fp8 else ir.DataType.UINT8),),
        shapes=(
            *((name, "* block_size") for name in ("x", "y", "q")),
            *((name, "block_size") for name in parameters),
            ("s", "* 1"),
        ),
        stage="kernel",
        wide=("s",),
        body=plain,
        form=lambda flags: smoothed if "smoothed" in flags else plain,
    )


_NORMS = tuple(
    _norm(f"{residual}{name}{kind}", body, parameters)
    for kind in ("", "Fp8")
    for name, body, parameters in (
        ("LayerNorm", _LAYER_NORM, ("gamma", "beta")),
        ("RMSNorm", _RMS_NORM, ("gamma",)),
    )
    for residual in ("", "Add")
)

_ATTENTION = DialectOp(
    name="Attention",
    inputs=("q", "k", "v", "scale"),
    outputs=("y",),
    stage="kernel",
    wide=("scale",),
    body=attention_body((), masked=False),
    form=lambda flags: attention_body(flags, masked=False),
)

_MASKED_ATTENTION = DialectOp(
    name="MaskedAttention",
    inputs=("q", "k", "v", "scale", "mask"),
    outputs=("y",),
    stage="kernel",
    wide=("scale",),
    body=attention_body((), masked=True),
    form=lambda flags: attention_body(flags, masked=True),
)

_MATMULS = (_W8A8, _U8S8, _U8U8, _W8A8_DYNAMIC, _W8A8_WINDOWED, _W8A8_REQUANTIZED, *W4_OPS, _FP8)
_ATTENTIONS = (_ATTENTION, _MASKED_ATTENTION)

OPS = {
    op.name: op
    for op in (_QUANTIZE, _QUANTIZE_FP8, *_MATMULS, _CONV, *IMAGE_OPS, *_NORMS, *_ATTENTIONS)
}

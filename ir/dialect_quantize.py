"""Quantize of the dialect: a scale for each token, and the text that bodies of other ops end in."""

from __future__ import annotations

import dataclasses
import re

import onnx_ir as ir

from qcompiler.ir.dialect_op import DialectOp

__all__ = ["QUANTIZE_OPS", "SMALLEST_MAGNITUDE", "TOKEN_TO_FP8", "TOKEN_TO_INT8", "requantized"]

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

TOKEN_TO_INT8 = (
    _SCALE_OF_TOKEN.replace("{top}", "127.0")
    + """
    middle = Constant <value = uint8 {128}> ()
    shape = Shape (s)
    zero = Expand (middle, shape)
    q = QuantizeLinear <axis = -1, {block_size}> ({x}, s, zero)
"""
)

_SMOOTHED = "    z = Mul (x, extra0)" + TOKEN_TO_INT8.replace("{x}", "z")

TOKEN_TO_FP8 = (
    _SCALE_OF_TOKEN.replace("{top}", "448.0")
    + """
    q = QuantizeLinear <axis = -1, {block_size}, output_dtype = 17> ({x}, s)
"""
)

_TOKENS = (("x", "* block_size"), ("q", "* block_size"), ("s", "* 1"))

_QUANTIZE = DialectOp(
    name="Quantize",
    inputs=("x",),
    outputs=("q", "s"),
    attributes=("block_size",),
    types=(("q", ir.DataType.UINT8),),
    shapes=_TOKENS,
    wide=("s",),
    body=TOKEN_TO_INT8.replace("{x}", "x"),
    form=lambda flags: _SMOOTHED if "smoothed" in flags else TOKEN_TO_INT8.replace("{x}", "x"),
)

_QUANTIZE_FP8 = DialectOp(
    name="QuantizeFp8",
    inputs=("x",),
    outputs=("q", "s"),
    attributes=("block_size",),
    types=(("q", ir.DataType.FLOAT8E4M3FN),),
    shapes=_TOKENS,
    wide=("s",),
    body=TOKEN_TO_FP8.replace("{x}", "x"),
)

QUANTIZE_OPS = (_QUANTIZE, _QUANTIZE_FP8)


def requantized(product: DialectOp) -> DialectOp:
    """The op that quantizes the result y of a product, too; a region may store yq and ys alone."""
    return dataclasses.replace(
        product,
        name=f"Requantized{product.name}",
        outputs=("y", "yq", "ys"),
        attributes=(*product.attributes, "width"),
        types=(*product.types, ("yq", ir.DataType.UINT8)),
        shapes=(*product.shapes, ("yq", "* N"), ("ys", "* 1")),
        wide=(*product.wide, "ys"),
        stage="kernel",
        ending=_quantized_result("y"),
        smoothed_ending="    z = Mul (y, smoothing)\n" + _quantized_result("z"),
    )


def _quantized_result(x: str) -> str:
    """A `Quantize` of x, `width` wide, as the ending of a body with a q and an s of its own."""
    own = {"x": x, "q": "yq", "s": "ys", "middle": "result_middle"}
    body = TOKEN_TO_INT8.replace("{block_size}", "block_size {=width}")
    return re.sub(r"\{x\}|\b(q|s|middle)\b", lambda m: own[m[0].strip("{}")], body)

"""The convolution of images that GPUs have kernels of: whose integers lie channels last.

    q = QuantizeImage(x, s, z)           x [B, C, H, W], q [B, H + pads, W + pads, C + pads]
    y = QConvW8A8(q, s, z, w, ws)        y [B, N, P, Q] = Conv((q - z) s, w ws)
    y, made = QConvImageW8A8(q, s, z, w, ws, t, u)       made = QuantizeImage(y, t, u)

s and z are constants: one scale, and the zero point, which is what an image is padded with.  So the
sum of the weights counts for every pixel alike, and a kernel has no border to look after.  `pads`
are those of ONNX's Pad, of all axes of q; channels are padded to a multiple of 16, the bytes that
kernels load, which the convolution passes over.

With a result that is stored as an image itself, a chain of convolutions stays in 8 bits; such a
region stores what its steps make of y.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompiler.ir.dialect_op import DialectOp

__all__ = [
    "CHANNEL_MULTIPLE",
    "COLUMN_MULTIPLE",
    "IMAGE_OPS",
    "channels_at_once",
    "padded_channels",
]

CHANNEL_MULTIPLE = 16
"""Of the channels of a stored image."""
COLUMN_MULTIPLE = 128
"""Channels of a result that a kernel computes together."""


def padded_channels(channels: int) -> int:
    """How many channels a stored image has."""
    return -(-channels // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


def channels_at_once(channels: int, columns: int, group: int) -> int:
    """How many channels of a stored image meet any 128 columns of the result.

    All of them where there is one group; else the most that the groups of 128 columns span.
    """
    given, made = channels // group, columns // group
    most = 0
    for first in range(0, columns, COLUMN_MULTIPLE):
        last = min(first + COLUMN_MULTIPLE, columns) - 1
        start = first // made * given // CHANNEL_MULTIPLE * CHANNEL_MULTIPLE
        most = max(most, padded_channels((last // made + 1) * given) - start)
    return most


_UINT8, _INT8 = ir.DataType.UINT8, ir.DataType.INT8
_SCALE = (("s", "1?"), ("z", "1?"))

_QUANTIZE = DialectOp(
    name="QuantizeImage",
    inputs=("x", "s", "z"),
    outputs=("q",),
    attributes=("pads",),
    types=(("z", _UINT8), ("q", _UINT8)),
    shapes=(("x", "B K H W"), *_SCALE, ("q", "B HP WP KP")),
    wide=("s",),
    body="""
    stored = QuantizeLinear (x, s, z)
    pixels = Transpose <perm = [0, 2, 3, 1]> (stored)
    widths = Constant <value_ints {=pads}> ()
    q = Pad (pixels, widths, z)
""",
)

# Weights 128 above what is stored, see `dialect_ops.py`.
_CONV = DialectOp(
    name="QConvW8A8",
    inputs=("q", "s", "z", "w", "ws"),
    outputs=("y",),
    attributes=("dilations", "group", "strides"),
    types=(("q", _UINT8), ("z", _UINT8), ("w", _INT8)),
    shapes=(("q", "B HP WP KP"), *_SCALE, ("w", "N KG R S"), ("ws", "N"), ("y", "B N P Q")),
    wide=("s", "ws"),
    body="""
    planes = Transpose <perm = [0, 3, 1, 2]> (q)
    first = Constant <value_ints = [0]> ()
    depth = Shape <start = 1, end = 2> (w)
    groups = Constant <value_int {=group}> ()
    channels = Mul (depth, groups)
    axis = Constant <value_ints = [1]> ()
    image = Slice (planes, first, channels, axis)
    middle = Constant <value = uint8 {128}> ()
    bytes = Cast <to = 2> (w)
    shifted = BitwiseXor (bytes, middle)
    sum = ConvInteger <{dilations}, {group}, {strides}> (image, shifted, z, middle)
    real = Cast <to = 1> (sum)
    planewise = Constant <value_ints = [-1, 1, 1]> ()
    by_channel = Reshape (ws, planewise)
    scale = Mul (s, by_channel)
    y = Mul (real, scale)
""",
)

_CONV_IMAGE = dataclasses.replace(
    _CONV,
    name="QConvImageW8A8",
    inputs=(*_CONV.inputs, "t", "u"),
    outputs=("y", "made"),
    attributes=(*_CONV.attributes, "pads"),
    types=(*_CONV.types, ("u", _UINT8), ("made", _UINT8)),
    shapes=(*_CONV.shapes, ("t", "1?"), ("u", "1?"), ("made", "B PP QP NP")),
    stage="kernel",
    wide=("s", "ws", "t"),
    ending="""
    result = Cast <to = 1> (y)
    stored = QuantizeLinear (result, t, u)
    pixels = Transpose <perm = [0, 2, 3, 1]> (stored)
    widths = Constant <value_ints {=pads}> ()
    made = Pad (pixels, widths, u)
""",
)

IMAGE_OPS = (_QUANTIZE, _CONV, _CONV_IMAGE)
"""In the order of the table."""

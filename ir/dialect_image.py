"""The convolution of images that GPUs have kernels of: whose integers lie channels last.

    q = QuantizeImage(x, s, z)           x [B, C, H, W], q [B, H + pads, W + pads, C + pads]
    y = QConvW8A8(q, s, z, w, ws)        y [B, N, P, Q] = Conv((q - z) s, w ws)

s and z are constants: one scale, and the zero point, which is what an image is padded with.  So the
sum of the weights counts for every pixel alike, and a kernel has no border to look after.  `pads`
are those of ONNX's Pad, of all axes of q; channels are padded to a multiple of 16, the bytes that
kernels load, which the convolution passes over.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.dialect_op import DialectOp

__all__ = ["CHANNEL_MULTIPLE", "IMAGE_OPS", "padded_channels"]

CHANNEL_MULTIPLE = 16
"""Of the channels of a stored image."""


def padded_channels(channels: int) -> int:
    """How many channels a stored image has."""
    return -(-channels // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


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
    attributes=("dilations", "strides"),
    types=(("q", _UINT8), ("z", _UINT8), ("w", _INT8)),
    shapes=(("q", "B HP WP KP"), *_SCALE, ("w", "N K R S"), ("ws", "N"), ("y", "B N P Q")),
    wide=("s", "ws"),
    body="""
    planes = Transpose <perm = [0, 3, 1, 2]> (q)
    first = Constant <value_ints = [0]> ()
    depth = Shape <start = 1, end = 2> (w)
    axis = Constant <value_ints = [1]> ()
    image = Slice (planes, first, depth, axis)
    middle = Constant <value = uint8 {128}> ()
    bytes = Cast <to = 2> (w)
    shifted = BitwiseXor (bytes, middle)
    sum = ConvInteger <{dilations}, {strides}> (image, shifted, z, middle)
    real = Cast <to = 1> (sum)
    planewise = Constant <value_ints = [-1, 1, 1]> ()
    by_channel = Reshape (ws, planewise)
    scale = Mul (s, by_channel)
    y = Mul (real, scale)
""",
)

IMAGE_OPS = (_QUANTIZE, _CONV)
"""In the order of the table."""

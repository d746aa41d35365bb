"""How weights lie in device memory: one layout for all architectures and any number of rows.

A *tile* is 512 bytes, 16 for each lane of a warp: what the lanes of one `mma.sync` with weights as
its 16-row operand hold, so one 128-bit load per lane fetches it and no shuffle follows.  It covers
16 columns of w [K, N] and `tile_depth` rows: 64 of int4, 32 of 8 bits.  N is padded to a multiple
of 128 and K to one of 64 (int4) or 128 (8 bits), with zeros.  Tiles of the same columns are
contiguous.  With all divisions rounded down:

    tile = (n / 16) * (padded_depth / tile_depth) + k / tile_depth
    c = n % 16;   d = k % tile_depth

    int4   w[k, n] + 8 is in the little-endian uint32 at
               tile * 512 + lane * 16 + (d / 16) * 4,      lane = (c % 8) * 4 + d % 8 / 2,
           in the 4 bits from bit 4 * (c / 8 + 2 * (d % 16 / 8)) + 16 * (d % 2)
    8 bit  w[k, n] is the byte at
               tile * 512 + lane * 16 + (c / 8 + 2 * (d / 16)) * 4 + d % 4,
                                                           lane = (c % 8) * 4 + d % 16 / 4

Scales of W4A16, ws [ceil(K / G), N], are float16 pairs of the two columns that a lane holds.  A
record of 32 bytes has those of a tile's columns, and there are `groups` records per 16 columns,
ceil(padded_depth / G), or 1 where G >= K:

    float16 (n % 8) * 2 + n % 16 / 8 of record (n / 16) * groups + g   is  ws[g, n]

Zero points of W4Z4A16 lie behind the scales, so that its records have 48 bytes.  Of a pair the
second is shifted to where its codes will be:

    byte 32 + (n % 8) * 2 + n % 16 / 8 of the record   is  (wz[g, n] + 8) * 16 ** (n % 16 / 8)

Scales of W8A8 and Fp8, ws [N], are float32 in order.  Behind those of W8A8 is, as int32, 128 times
the sum of each column of w.  Padding is zero (4 bits: w = 0, code 8).

The weights of a convolution [N, C, R, S] are the matrix of `conv_matrix`, their scales ws times the
scale of the image, and the sums are times its zero point.  Behind these are, where it stores its
result as an image, the scale (float32) and zero point (uint32) of that, and 8 bytes of nothing.
Of depthwise ones the byte of tap k of column n is

    w[k, n]   at  (k / 4 * columns + n) * 4 + k % 4,      K padded to a multiple of 4
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.ir.dialect_image import (
    CHANNEL_MULTIPLE,
    COLUMN_MULTIPLE,
    channels_at_once,
    padded_channels,
)
from qcompiler.ir.region import Region

__all__ = [
    "COLUMN_MULTIPLE",
    "CONV",
    "CONVS",
    "CONV_IMAGE",
    "FOUR_BITS",
    "IMAGE",
    "INTEGERS",
    "Packing",
    "conv_matrix",
    "depth_of",
    "first_channel",
    "image_columns",
    "is_depthwise",
    "pack",
    "pack_scales",
    "packing",
]

Array = NDArray[Any]

FOUR_BITS = frozenset({"QMatMulW4A16", "QMatMulW4Z4A16"})
"""Products of float16 with weights of 4 bits in groups."""

CONV, CONV_IMAGE, IMAGE = "QConvW8A8", "QConvImageW8A8", "QuantizeImage"
CONVS = frozenset({CONV, CONV_IMAGE})
INTEGERS = CONVS | {"QMatMulW8A8"}
"""Products whose sums are int32."""

_TAPS_OF_WORD = 4
"""Of a depthwise convolution: what one dp4a multiplies."""
_STEPS_BYTES = 16
"""Of the scale and zero point of a result."""
TILE_COLUMNS = 16
TILE_BYTES = 512
SCALES_BYTES = 32
"""Of a record, before zero points."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """The sizes of a region's packed weights.

    Attributes:
        bits: Of a weight, 4 or 8.
        tile_depth: Rows of w in a tile.
        columns: N, padded.
        depth: K, padded.
        groups: Scales per column, of padded depth.
        record_bytes: Of a group's scales of 16 columns, with zero points if there are any.
        weight_bytes: Size of "w".
        scale_bytes: Size of "ws".
    """

    bits: int
    tile_depth: int
    columns: int
    depth: int
    groups: int
    record_bytes: int
    weight_bytes: int
    scale_bytes: int


def is_depthwise(region: Region) -> bool:
    """Whether each channel of a convolution's result is made of its own alone."""
    if region.anchor not in CONVS:
        return False
    return region.number("group") == region.size("K") == region.size("N") > 1


def image_columns(region: Region) -> int:
    """Channels of a convolution's result as it is stored."""
    n = region.size("N")
    return padded_channels(n) if region.anchor == CONV_IMAGE else n


def _at_once(region: Region) -> int:
    """Channels that a tile of columns of a convolution meets."""
    return channels_at_once(region.size("K"), region.size("N"), int(region.number("group")))


def first_channel(region: Region, tile: Any, least: Callable[[Any, Any], Any] = min) -> Any:
    """The first of those, a multiple of 16; of a kernel's expression `tile` with its `least`."""
    group, channels = int(region.number("group")), region.size("K")
    if group == 1:
        return 0
    given, made = channels // group, region.size("N") // group
    natural = tile * COLUMN_MULTIPLE // made * given // CHANNEL_MULTIPLE * CHANNEL_MULTIPLE
    return least(natural, padded_channels(channels) - _at_once(region))


def depth_of(region: Region) -> int:
    """How long the sums of a product are."""
    if region.anchor not in CONVS:
        return region.size("K")
    taps = region.size("R") * region.size("S")
    return taps if is_depthwise(region) else taps * _at_once(region)


def conv_matrix(w: Array, region: Region) -> Array:
    """The weights [N, C, R, S] of a convolution as a matrix of K rows and N columns.

    K is [R, S, channels that a tile meets], with zeros for channels of other groups and padding;
    of a depthwise one it is [R, S].
    """
    n, given, *taps = w.shape
    if is_depthwise(region):
        return np.ascontiguousarray(w.reshape(n, -1).T)
    made = n // int(region.number("group"))
    matrix = np.zeros((*taps, _at_once(region), n), w.dtype)
    for column in range(n):
        first = column // made * given - first_channel(region, column // COLUMN_MULTIPLE)
        matrix[:, :, first : first + given, column] = w[column].transpose(1, 2, 0)
    return matrix.reshape(-1, n)


def packing(region: Region) -> Packing:
    """The packing of the weights of a product."""
    k, n = depth_of(region), region.size("N")
    bits = 4 if region.anchor in FOUR_BITS else 8
    multiple = _TAPS_OF_WORD if is_depthwise(region) else 64 if bits == 4 else 128
    columns, depth = _padded(n, COLUMN_MULTIPLE), _padded(k, multiple)
    groups = -(-depth // region.size("G")) if bits == 4 and region.size("G") < k else 1
    # Of scales, with zero points or sums.
    sizes = {"QMatMulW4A16": 2, "QMatMulW4Z4A16": 3}
    size = 8 if region.anchor in INTEGERS else sizes.get(region.anchor, 4)
    return Packing(
        bits=bits,
        tile_depth=64 if bits == 4 else 32,
        columns=columns,
        depth=depth,
        groups=groups,
        record_bytes=TILE_COLUMNS * size,
        weight_bytes=columns * depth * bits // 8,
        scale_bytes=groups * columns * size + (region.anchor == CONV_IMAGE) * _STEPS_BYTES,
    )


def pack(w: Array, region: Region) -> bytes:
    """The bytes of "w".

    Args:
        w: [K, N], one integer each (int4 unpacked), or the bytes of float8 numbers.
        region: Says the sizes and the kind.
    """
    layout = packing(region)
    padded = np.zeros((layout.depth, layout.columns), np.uint8)
    padded[: w.shape[0], : w.shape[1]] = w.view(np.uint8)
    if is_depthwise(region):
        return padded.reshape(-1, _TAPS_OF_WORD, layout.columns).transpose(0, 2, 1).tobytes()
    if layout.bits == 8:
        # k = step, half, lane in group, byte; n = tile, half, group
        blocks = padded.reshape(-1, 2, 4, 4, layout.columns // 16, 2, 8)
        return blocks.transpose(4, 0, 6, 2, 1, 5, 3).tobytes()
    # k = tile, step, half, lane in group, parity; n = tile, half, group
    codes = (
        ((padded + 8) & 15).astype(np.uint32).reshape(-1, 4, 2, 4, 2, layout.columns // 16, 2, 8)
    )
    shifts = 4 * (np.arange(2)[:, None, None] + 2 * np.arange(2)[:, None]) + 16 * np.arange(2)
    # To n tile, k tile, group, lane in group, step, and the three that make up a word.
    blocks = codes.transpose(5, 0, 7, 3, 1, 6, 2, 4) << shifts.astype(np.uint32)
    return np.asarray(blocks.sum((-3, -2, -1), dtype=np.uint32)).astype("<u4").tobytes()


def pack_scales(
    ws: Array,
    region: Region,
    wz: Array | None = None,
    w: Array | None = None,
    zero: int = 128,
    result: tuple[float, int] | None = None,
) -> bytes:
    """The bytes of "ws".

    Args:
        ws: float16 [ceil(K / G), N], or float32 [N].
        region: Says the sizes and the kind.
        wz: Zero points [ceil(K / G), N] of W4Z4A16.
        w: The weights [K, N] of W8A8.
        zero: The zero point of what they are multiplied by.
        result: The scale and zero point of a result that is stored as an image.
    """
    layout = packing(region)
    if layout.bits == 8:
        parts = [ws.astype("<f4").view(np.uint32)]
        if region.anchor in INTEGERS:
            assert w is not None
            parts.append((zero * w.sum(0, dtype=np.int32)).astype("<i4").view(np.uint32))
        packed = b"".join(np.pad(part, (0, layout.columns - ws.size)).tobytes() for part in parts)
        if result is None:
            return packed
        return packed + np.float32(result[0]).tobytes() + np.uint32(result[1]).tobytes() + bytes(8)
    parts = [_records(ws, layout, "<f2")]
    if wz is not None:
        zeros = _records(wz.view(np.uint8) + 8 & 15, layout, "u1")
        zeros[..., 1::2] *= 16
        parts.append(zeros)
    return np.concatenate(parts, axis=-1).tobytes()


def _records(values: Array, layout: Packing, dtype: str) -> Array:
    """Bytes [tile of columns, group, byte] of one value per group and column, [groups, N]."""
    padded = np.zeros((layout.groups, layout.columns), dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    pairs = padded.reshape(layout.groups, -1, 2, 8).transpose(1, 0, 3, 2)
    return np.ascontiguousarray(pairs).reshape(*pairs.shape[:2], 16).view(np.uint8)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

"""The kernel of QuantizeImage: float16 planes to bytes, channels last, with a border around them.

    q[b, i, j, c] = round(x[b, c, i - top, j - left] / s) + z          z outside of x

A block has 128 pixels of the stored images, in their order, and 64 channels.  A thread has a pixel
first, so that a warp reads along a plane's rows; through shared memory the bytes come to threads
that store 16 channels of a pixel at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.ir.dialect_image import padded_channels
from qcompiler.ir.region import Region
from qcompiler.targets.cuda.device import (
    Expr,
    Place,
    barrier,
    cast,
    ceildiv,
    constant,
    emit,
    extern,
    kernel,
    let,
    loop,
    minimum,
    quotient,
    real,
    registers,
    remainder,
    shared,
    store,
    view,
    when,
    wide,
)
from qcompiler.targets.cuda.image_plan import BLOCK_CHANNELS, BLOCK_PIXELS, IMAGE_PITCH, border

__all__ = ["image_kernel", "stored_byte"]

_WORDS = BLOCK_CHANNELS // 4


def image_kernel(region: Region) -> Any:
    """The kernel of QuantizeImage."""
    pointers = {"x": "float16", "s": "float32", "z": "uint8", "q": "uint8"}
    padded = padded_channels(region.size("K"))

    def body(arrays: Mapping[str, Expr], rows: Expr, place: Place) -> None:
        words = view(shared(BLOCK_PIXELS * IMAGE_PITCH * 4), "uint32", BLOCK_PIXELS * IMAGE_PITCH)
        pixel = _Pixel(region, arrays, rows, place)
        with loop(0, _WORDS) as index:
            first = let(place.x * BLOCK_CHANNELS + index * 4)
            store(words, pixel.word(first), place.thread * IMAGE_PITCH + index)
        barrier()
        parts = BLOCK_CHANNELS // 16
        with loop(0, parts) as turn:
            part = let(turn * BLOCK_PIXELS + place.thread)
            row = let(place.y * BLOCK_PIXELS + part // parts)
            channel = let(place.x * BLOCK_CHANNELS + part % parts * 16)
            with when((row < rows) & (channel < padded)):
                start = part // parts * IMAGE_PITCH + part % parts * 4
                target = arrays["q"].ptr_to([wide(row) * padded + channel])
                emit("st.global.v4.u32", target, *(let(words[start + i]) for i in range(4)))

    grid = -(-padded // BLOCK_CHANNELS)
    return kernel(
        pointers,
        lambda rows: (grid, ceildiv(rows, BLOCK_PIXELS), 1),
        BLOCK_PIXELS,
        body,
        sizes=("height", "width"),
        is_tall=True,
    )


class _Pixel:
    """A thread's pixel of a stored image."""

    def __init__(
        self, region: Region, arrays: Mapping[str, Expr], rows: Expr, place: Place
    ) -> None:
        self._x, self._k = arrays["x"], region.size("K")
        self._scale = let(arrays["s"][0])
        self._zero = let(cast("int32", arrays["z"][0]))
        top, left, bottom, right = border(region)
        height, width = arrays["height"], arrays["width"]
        stored_width, stored_height = let(width + left + right), let(height + top + bottom)
        row = let(minimum(place.y * BLOCK_PIXELS + place.thread, rows - 1))
        line = let(quotient(row, stored_width))
        i = let(remainder(line, stored_height) - top)
        j = let(remainder(row, stored_width) - left)
        self._is_inside = let((i >= 0) & (i < height) & (j >= 0) & (j < width))
        self._plane = let(wide(height) * wide(width))
        image = let(wide(quotient(line, stored_height)) * self._k)
        self._start = let(image * self._plane + wide(i) * wide(width) + wide(j))

    def word(self, first: Expr) -> Expr:
        """The bytes of four channels from `first` on."""
        word = registers("uint32", 1)
        store(word, constant(0, "uint32"), 0)
        for index in range(4):
            byte = registers("int32", 1)
            store(byte, self._zero, 0)
            with when(self._is_inside & (first + index < self._k)):
                store(byte, self._byte(first + index), 0)
            shifted = cast("uint32", byte[0]) << constant(8 * index, "uint32")
            store(word, word[0] | shifted, 0)
        return word[0]

    def _byte(self, channel: Expr) -> Expr:
        value = cast("float32", self._x[self._start + wide(channel) * self._plane])
        return stored_byte(value, self._scale, self._zero)


def stored_byte(value: Expr, scale: Expr, zero: Expr) -> Expr:
    """round(value / scale) + zero, from 0 to 255."""
    # What is far outside, and NaN, comes to an end of the bytes: no int32 is left.
    bounded = extern("float32", "fmaxf", value / scale, real(-512.0))
    bounded = extern("float32", "fminf", bounded, real(512.0))
    number = let(extern("int32", "__float2int_rn", bounded) + zero)
    return minimum(extern("int32", "max", number, constant(0)), constant(255))

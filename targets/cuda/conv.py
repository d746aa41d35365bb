"""A convolution as the product that it is: what differs from a product of tokens.

    y[b, n, p, q] = steps((sum_rsc x[b, p U + r D, q V + s E, c] w[n, c, r, s] - z sum w) scale[n])

A row is a pixel of the result, and its K are the taps of the kernel, one after the other, each with
all channels.  An image is stored with its border and channels last (`image.py`), so that a tap of
16 channels is 16 bytes, as far from the row's first as in any other row: a thread computes where
its rows begin once, and one distance per chunk.  Where there are groups, a block has the channels
that its 128 columns meet, and weights are zero between a channel and the columns of other groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.ir.dialect_image import CHANNEL_MULTIPLE, padded_channels
from qcompiler.ir.region import Region
from qcompiler.targets.cuda.device import (
    Expr,
    cast,
    constant,
    emit,
    let,
    minimum,
    quotient,
    registers,
    remainder,
    store,
    wide,
)
from qcompiler.targets.cuda.image_plan import geometry
from qcompiler.targets.cuda.packing import depth_of, first_channel
from qcompiler.targets.cuda.plan import CHUNK_BYTES, TILE_THREADS
from qcompiler.targets.cuda.stages import PART, Stages

__all__ = ["ConvStages", "Pixels"]


class Pixels:
    """Which pixels of the results the rows are."""

    def __init__(self, region: Region, arrays: Mapping[str, Expr]) -> None:
        self._shape = geometry(region)
        height, width = arrays["height"], arrays["width"]
        spans = self._shape.spans
        down, across = self._shape.strides
        self.height, self.width = height, width
        self.result_width = let(quotient(width - spans[1], constant(across)) + 1)
        self.result_height = let(quotient(height - spans[0], constant(down)) + 1)
        self.plane = let(self.result_height * self.result_width)

    def first_part(self, row: Expr, parts: int) -> Expr:
        """Where a row's first tap is, in 16 bytes; `parts` are those of a pixel."""
        image, pixel = quotient(row, self.plane), let(remainder(row, self.plane))
        down, across = self._shape.strides
        line = image * self.height + quotient(pixel, self.result_width) * down
        return (line * self.width + remainder(pixel, self.result_width) * across) * parts

    def distance(self, tap: Expr, parts: int) -> Expr:
        """From there to another tap."""
        down, across = self._shape.dilations
        taps = constant(self._shape.kernel[1])
        line = quotient(tap, taps) * down * self.width
        return (line + remainder(tap, taps) * across) * parts


class ConvStages(Stages):
    """Stages whose activations are gathered from images."""

    def __init__(self, region: Region, *args: Any) -> None:
        super().__init__(region, *args)
        self._parts = padded_channels(region.size("K")) // CHANNEL_MULTIPLE
        self._depth, self._pixels = depth_of(region), Pixels(region, self._arrays)
        # Of groups a block meets some of the channels.
        self._parts_of_tap = self._depth // (region.size("R") * region.size("S")) // PART
        begin = first_channel(region, self._place.x, minimum) // CHANNEL_MULTIPLE
        turns = self._shape.rows * 8 // TILE_THREADS
        self._firsts = registers("int32", turns)
        for turn in range(turns):
            own = turn * TILE_THREADS // 8 + self._place.thread // 8
            # A row that does not exist is another one: its results are not stored.
            row = let(minimum(self._place.y * self._shape.rows + own, self._rows - 1))
            store(self._firsts, self._pixels.first_part(row, self._parts) + begin, turn)

    def _ask_activations(self, chunk: Expr, start: Expr) -> None:
        part = let(chunk * (CHUNK_BYTES // PART) + self._place.thread % 8)
        per_tap = constant(self._parts_of_tap)
        tap, channels = quotient(part, per_tap), remainder(part, per_tap)
        distance = let(self._pixels.distance(tap, self._parts) + channels)
        whole = self._depth % CHUNK_BYTES == 0
        for turn in range(self._shape.rows * 8 // TILE_THREADS):
            first = wide(self._firsts[turn] + distance)
            source = self._arrays["q"].ptr_to([first * PART])
            target = self._own_part(start, turn)
            if whole:
                emit("cp.async.cg.shared.global", target, source, PART)
                continue
            # Zeros where the kernel has ended: nothing is read there.
            exists = cast("uint32", part * PART < self._depth) * constant(PART, "uint32")
            emit("cp.async.cg.shared.global", target, source, PART, exists)

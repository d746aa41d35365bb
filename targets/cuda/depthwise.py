"""Depthwise convolutions: a thread has four channels, and multiplies four taps of each at a time.

    sums[pixel, c] = sum_k q[pixel + tap k, c] w[k, c]

The four bytes of a tap are of four channels, which `dp4a` cannot add: of four taps they are turned
into the four taps of each channel, 8 `prmt` for 4 `dp4a`.  No tensor core could do better: its
operand would be zeros but for one in 16.  A block has 32 pixels and 128 channels, a warp has the
channels side by side, so that each load is 128 bytes of one pixel.  The end is that of any other
convolution, through shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.ir.dialect_image import CHANNEL_MULTIPLE, padded_channels
from qcompiler.ir.region import Region
from qcompiler.targets.cuda.conv import Pixels
from qcompiler.targets.cuda.conv_finish import conv_finish_of, shuffled
from qcompiler.targets.cuda.device import (
    Expr,
    Place,
    barrier,
    ceildiv,
    constant,
    emit,
    kernel,
    let,
    loop,
    minimum,
    registers,
    reinterpret,
    shared,
    store,
    unrolled,
    view,
    wide,
)
from qcompiler.targets.cuda.finish import pointers_of
from qcompiler.targets.cuda.packing import COLUMN_MULTIPLE, depth_of, packing
from qcompiler.targets.cuda.plan import TILE_THREADS, result_pitch, shared_bytes
from qcompiler.targets.cuda.shapes import Channels

__all__ = ["depthwise_kernel"]

_TAPS = 4
"""Of one dp4a."""
_WARPS = TILE_THREADS // 32


def depthwise_kernel(region: Region, shape: Channels) -> Any:
    """The kernel that computes tiles of `shape.rows` pixels."""
    pointers = {"q": "uint8", "w": "uint8", **pointers_of(region, split=False)}
    pitch = result_pitch(region)

    def body(arrays: Mapping[str, Expr], rows: Expr, place: Place) -> None:
        sums = _Sums(region, shape.rows // _WARPS, arrays, rows, place)
        memory = shared(shared_bytes(region, shape))
        results = view(memory, "int32", shape.rows * pitch)
        with loop(0, packing(region).depth // _TAPS) as word:
            sums.add(word)
        with unrolled(shape.rows // _WARPS) as turn:
            for i in range(4):
                there = (turn * _WARPS + place.warp) * pitch + shuffled(place.lane * 4 + i)
                store(results, sums.totals[turn * 4 + i], there)
        barrier()
        finish = conv_finish_of(region, split=False)(region, arrays, rows)
        finish.tile(results, shape.rows, place, TILE_THREADS)

    blocks = -(-region.size("N") // COLUMN_MULTIPLE)
    return kernel(
        pointers,
        lambda rows: (blocks, ceildiv(rows, shape.rows), 1),
        TILE_THREADS,
        body,
        sizes=("height", "width"),
        is_tall=True,
    )


class _Sums:
    """What a thread adds up: four channels of some pixels of the tile."""

    def __init__(
        self, region: Region, count: int, arrays: Mapping[str, Expr], rows: Expr, place: Place
    ) -> None:
        self._count, self._arrays, self._place = count, arrays, place
        self._pixels, self._taps = Pixels(region, arrays), depth_of(region)
        self._columns, channels = packing(region).columns, padded_channels(region.size("K"))
        self._parts = channels // CHANNEL_MULTIPLE
        # Channels that do not exist are others: their results are not stored.
        own = place.x * COLUMN_MULTIPLE + place.lane * 4
        self._channel = let(minimum(own, channels - 4))
        self._firsts = registers("int32", count)
        self.totals = registers("int32", 4 * count)
        for turn in range(count):
            row = let(minimum((place.y * count + turn) * _WARPS + place.warp, rows - 1))
            store(self._firsts, self._pixels.first_part(row, self._parts), turn)
        with unrolled(4 * count) as i:
            store(self.totals, constant(0), i)

    def add(self, word: Expr) -> None:
        """Add the products of four taps."""
        weights = registers("uint32", 4)
        first = word * self._columns + self._place.x * COLUMN_MULTIPLE + self._place.lane * 4
        source = self._arrays["w"].ptr_to([first * _TAPS])
        emit("ld.global.nc.v4.u32", *(weights[i] for i in range(4)), source)
        # Taps that do not exist are the last: their weights are zero.
        taps = [let(minimum(word * _TAPS + i, self._taps - 1)) for i in range(_TAPS)]
        distances = [let(self._pixels.distance(tap, self._parts)) for tap in taps]
        with unrolled(self._count) as turn:
            given, turned = registers("uint32", _TAPS), registers("uint32", 8)
            for i, distance in enumerate(distances):
                part = wide(self._firsts[turn] + distance) * CHANNEL_MULTIPLE
                source = self._arrays["q"].ptr_to([part + wide(self._channel)])
                emit("ld.global.nc.u32", given[i], source)
            _transpose(turned, given)
            for i in range(4):
                total = self.totals[turn * 4 + i]
                operands = turned[4 + i], reinterpret("int32", weights[i])
                emit("dp4a.u32.s32", total, *operands, total)


def _transpose(turned: Expr, given: Expr) -> None:
    """`turned[4 + c]` becomes byte c of each of the four words of `given`."""

    def permute(result: int, a: Expr, b: Expr, selector: int) -> None:
        emit("prmt.b32", turned[result], a, b, constant(selector, "uint32"))

    for pair in range(2):
        for half, selector in enumerate((0x5140, 0x7362)):
            permute(2 * half + pair, given[2 * pair], given[2 * pair + 1], selector)
    for half in range(2):
        for place, selector in enumerate((0x5410, 0x7632)):
            permute(4 + 2 * half + place, turned[2 * half], turned[2 * half + 1], selector)

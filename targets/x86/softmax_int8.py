"""The running softmax of attention in int8: weights are bytes, from 0 to 255.

    weight = round(255 * 2^t),    t = (score - top) log2(e)

`top` is the largest score of the row in this block of keys, not of all so far: a block without the
row's largest score then keeps its 8 bits.  What a block adds is scaled by e^(top - largest so far).
Sums are of the rounded weights, so that these add up to one.

The exponentials are computed in 16 bits, twice as many to an instruction as in float32: t has 11
bits after the point, of which the whole part is a shift and the fraction the variable of a
polynomial.  Scores more than 16 log2 below the top saturate, where weights are 0 from 9 on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Register
from qcompiler.targets.x86.attention_shape import PANEL, TILE_ROWS, AttentionShape
from qcompiler.targets.x86.avx512 import Avx512
from qcompiler.targets.x86.running_softmax import RunningSoftmax, all_rows
from qcompiler.targets.x86.vector import fma, load_lanes

__all__ = ["EXP2_TERMS", "POINT", "SoftmaxInt8"]

POINT = 11
"""Bits of t after the point."""

# 2^f on [0, 1], relative error 1.7e-3: a third of the rounding of the largest weight.
_EXP2 = (1.00172475, 0.65763628, 0.33718942)

EXP2_TERMS = tuple(round(c * 255 / 2 * 2**7) for c in _EXP2)
"""255 * 2^(f - 1) with 7 bits after the point, for f in units of 2^-16."""

_BYTES = 4 * LANES
"""Weights that are made at a time."""


class SoftmaxInt8(RunningSoftmax):
    """Its weights are uint8, four keys to a lane.

    `block_factors` is what each row of the tile at hand multiplies the sums of this block by.
    """

    def __init__(self, shape: AttentionShape, unit: Avx512) -> None:
        super().__init__(shape, unit)
        self._unit = unit
        self.block_factors: list[Register] = []
        self.weight_stride = (shape.keys // _BYTES + 1) * LANES
        self.weights = tir.scratch("int32", TILE_ROWS * self.weight_stride)

    def weigh(
        self, tops: Sequence[Register], first_row: Expr, count: Expr, *, packed: bool = True
    ) -> list[Register]:
        """The scores become weights, see `RunningSoftmax`."""
        if not packed:
            return super().weigh(tops, first_row, count, packed=False)
        highest = self.highest(tops)
        now, before = self.raise_tops(highest, first_row)
        factors = Register("float32", self._exp(highest.value - now.value))
        kept, self.block_factors = (all_rows(v, len(tops)) for v in (before, factors))
        with tir.when(count % _BYTES <= PANEL), tir.when(count % _BYTES > 0):
            # The last weights are made of half a panel more than there are scores.
            nothing = tir.broadcast(-math.inf)
            for i in range(len(tops)):
                end = i * self.stride + count // _BYTES * _BYTES + PANEL
                for u in range(0, PANEL, LANES):
                    tir.store(self.scores, nothing, tir.lanes(end + u))
        sums = [self._bytes(i, top, count) for i, top in enumerate(all_rows(highest, len(tops)))]
        scaled = [
            tir.cast("float32x16", total.value) * factor.value
            for total, factor in zip(sums, self.block_factors, strict=True)
        ]
        self.add_sums(scaled, kept, first_row)
        return kept

    def _bytes(self, i: int, top: Register, count: Expr) -> Register:
        """Row i of the weights; returns their sums per lane."""
        total = Register("int32", tir.broadcast(0))
        ones = tir.reinterpret("int8x64", tir.broadcast(0x01010101))
        with tir.loop(0, (count + (_BYTES - 1)) // _BYTES) as panel:
            start = i * self.stride + panel * _BYTES
            halves = [self._words(start + u, top) for u in (0, 2 * LANES)]
            packed = Register("int32", self._unit.pack_uint8(*halves))
            tir.store(self.weights, packed.value, tir.lanes(i * self.weight_stride + panel * LANES))
            bytes_ = tir.reinterpret("uint8x64", packed.value)
            total.set(self._unit.dot_product_bytes(total.value, bytes_, ones))
        return total

    def _words(self, start: Expr, top: Register) -> Expr:
        """Two vectors of weights as uint16, in lanes of four."""
        scale = tir.broadcast(math.log2(math.e) * 2**POINT)
        powers = []
        for first in (start, start + LANES):
            below = load_lanes(self.scores, first, LANES) - top.value
            # One less than t, so that it is negative: of t = n + f the whole part is a shift by
            # -1 - n, which is ~t without its fraction.
            power = fma(below, scale, tir.broadcast(-1.0))
            powers.append(Register("int32", self._unit.round_to_int32(power)))
        t = Register("uint16", self._unit.pack_int16(*(power.value for power in powers)), 2 * LANES)
        shift = (t.value ^ tir.all_words(0xFFFF)) >> tir.all_words(POINT)
        fraction = Register("uint16", t.value << tir.all_words(16 - POINT), 2 * LANES)
        constant, linear, square = (tir.all_words(term) for term in EXP2_TERMS)
        slope = self._unit.high_product(fraction.value, square) + linear
        series = self._unit.high_product(fraction.value, slope) + constant
        return self._unit.rounded_shift_by_7(self._unit.shift_right(series, shift))

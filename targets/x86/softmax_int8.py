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
from collections.abc import Callable, Sequence
from functools import partial

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

_SCALE = math.log2(math.e) * 2**POINT
"""From scores to t."""

Power = Callable[[Expr], Expr]

_BYTES = 4 * LANES
"""Weights that are made at a time."""


class SoftmaxInt8(RunningSoftmax):
    """Its weights are uint8, four keys to a lane.

    `block_factors` is what each row of the tile at hand multiplies the sums of this block by, and
    `row_scales` what its scores are yet to be multiplied by, if they are.
    """

    def __init__(self, shape: AttentionShape, unit: Avx512) -> None:
        super().__init__(shape, unit)
        self._unit = unit
        self.block_factors: list[Register] = []
        self.row_scales: Expr | None = None
        self.weight_stride = (shape.keys // _BYTES + 1) * LANES
        self.weights = tir.scratch("int32", TILE_ROWS * self.weight_stride)

    def weigh(
        self, tops: Sequence[Register], first_row: Expr, count: Expr, *, packed: bool = True
    ) -> list[Register]:
        """The scores become weights, see `RunningSoftmax`."""
        if not packed:
            return super().weigh(tops, first_row, count, packed=False)
        scale = self._row_scale(first_row)
        largest = Register("float32", self.highest(tops))
        whole = largest.value if scale is None else largest.value * scale
        highest = self.only_rows(whole, len(tops))
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
        powers = self._powers(largest, scale, len(tops))
        sums = [self._bytes(i, power, count) for i, power in enumerate(powers)]
        scaled = [
            tir.cast("float32x16", total.value) * factor.value
            for total, factor in zip(sums, self.block_factors, strict=True)
        ]
        self.add_sums(scaled, kept, first_row)
        return kept

    def _row_scale(self, first_row: Expr) -> Expr | None:
        """What the scores of a tile's rows are yet to be multiplied by, a lane for each."""
        scales = self.row_scales
        return None if scales is None else load_lanes(scales, first_row, LANES)

    def _powers(self, largest: Register, scale: Expr | None, count: int) -> list[Power]:
        """For each row the function from its scores, the largest of which is given, to t - 1."""
        tops = all_rows(largest, count)
        if scale is None:
            return [partial(_power, top, tir.broadcast(_SCALE)) for top in tops]
        slopes = all_rows(Register("float32", scale * tir.broadcast(_SCALE)), count)
        return [partial(_power, top, slope.value) for top, slope in zip(tops, slopes, strict=True)]

    def _bytes(self, i: int, power: Power, count: Expr) -> Register:
        """Row i of the weights; returns their sums per lane."""
        total = Register("int32", tir.broadcast(0))
        ones = tir.reinterpret("int8x64", tir.broadcast(0x01010101))
        with tir.loop(0, (count + (_BYTES - 1)) // _BYTES) as panel:
            start = i * self.stride + panel * _BYTES
            halves = [self._words(start + u, power) for u in (0, 2 * LANES)]
            packed = Register("int32", self._unit.pack_uint8(*halves))
            tir.store(self.weights, packed.value, tir.lanes(i * self.weight_stride + panel * LANES))
            bytes_ = tir.reinterpret("uint8x64", packed.value)
            total.set(self._unit.dot_product_bytes(total.value, bytes_, ones))
        return total

    def _words(self, start: Expr, power: Power) -> Expr:
        """Two vectors of weights as uint16, in lanes of four.

        One is taken from t, so that it is negative: of t = n + f the whole part is a shift by
        -1 - n, which is ~(t - 1) without its fraction.
        """
        powers = []
        for first in (start, start + LANES):
            real = power(load_lanes(self.scores, first, LANES))
            powers.append(Register("int32", self._unit.round_to_int32(real)))
        t = Register("uint16", self._unit.pack_int16(*(one.value for one in powers)), 2 * LANES)
        halvings = (t.value ^ tir.all_words(0xFFFF)) >> tir.all_words(POINT)
        fraction = Register("uint16", t.value << tir.all_words(16 - POINT), 2 * LANES)
        constant, linear, square = (tir.all_words(term) for term in EXP2_TERMS)
        slope = self._unit.high_product(fraction.value, square) + linear
        series = self._unit.high_product(fraction.value, slope) + constant
        return self._unit.rounded_shift_by_7(self._unit.shift_right(series, halvings))


def _power(top: Register, slope: Expr, score: Expr) -> Expr:
    """The t - 1 of a score.

    The difference comes first: it is exactly 0 at the top, where a product rounded by half a step
    would make t positive, and the largest weight 0; and a row of the least of all floats, which
    masks are made of, does not overflow.
    """
    return fma(score - top.value, slope, tir.broadcast(-1.0))

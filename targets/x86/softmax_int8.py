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

_SCALE = math.log2(math.e) * 2**POINT
"""From scores to t."""

_BYTES = 4 * LANES
"""Weights that are made at a time."""


class SoftmaxInt8(RunningSoftmax):
    """Its weights are uint8, four keys to a lane.

    It has the scores of two tiles: those of one become weights, a batch of 64 keys of a row at a
    time, while those of the next are made.  `block_factors` is what each row of the tile at hand
    multiplies the sums of this block by, and `row_scales` what its scores are yet to be multiplied
    by, if they are.
    """

    def __init__(self, shape: AttentionShape, unit: Avx512) -> None:
        super().__init__(shape, unit, tiles=2)
        self._unit = unit
        self.block_factors: list[Register] = []
        self.row_scales: Expr | None = None
        self.weight_stride = (shape.keys // _BYTES + 1) * LANES
        self.weights = tir.scratch("int32", TILE_ROWS * self.weight_stride)
        # A lane for each row of the tile whose scores become weights.
        self._largest, self._slopes, self._kept, self._factors = (
            tir.scratch("float32", LANES) for _ in range(4)
        )
        self._totals = tir.scratch("int32", TILE_ROWS * LANES)

    def weigh(
        self, tops: Sequence[Register], first_row: Expr, count: Expr, *, packed: bool = True
    ) -> list[Register]:
        """The scores become weights, see `RunningSoftmax`."""
        if not packed:
            return super().weigh(tops, first_row, count, packed=False)
        height, nothing = len(tops), tir.constant(0, "int32")
        self.begin(tops, first_row, count, nothing)
        self.weigh_batches(nothing, height, count, nothing)
        return self.end(height, first_row)

    def begin(
        self, tops: Sequence[Register], first_row: Expr, count: Expr, score_row: Expr
    ) -> None:
        """Before the weights of a tile, whose scores lie from row `score_row` on."""
        scale = None if self.row_scales is None else load_lanes(self.row_scales, first_row, LANES)
        largest = Register("float32", self.highest(tops))
        whole = largest.value if scale is None else largest.value * scale
        highest = self.only_rows(whole, len(tops))
        now, before = self.raise_tops(highest, first_row)
        slopes = tir.broadcast(_SCALE) if scale is None else scale * tir.broadcast(_SCALE)
        tir.store(self._largest, largest.value, tir.lanes(0))
        tir.store(self._slopes, slopes, tir.lanes(0))
        tir.store(self._kept, before.value, tir.lanes(0))
        tir.store(self._factors, self._exp(highest.value - now.value), tir.lanes(0))
        with tir.when(count % _BYTES <= PANEL), tir.when(count % _BYTES > 0):
            # The last weights are made of half a panel more than there are scores.
            nothing = tir.broadcast(-math.inf)
            for i in range(len(tops)):
                end = (score_row + i) * self.stride + count // _BYTES * _BYTES + PANEL
                for u in range(0, PANEL, LANES):
                    tir.store(self.scores, nothing, tir.lanes(end + u))
        for i in range(len(tops)):
            tir.store(self._totals, tir.broadcast(0), tir.lanes(i * LANES))

    def weigh_batches(self, done: Expr, height: int, count: Expr, score_row: Expr) -> None:
        """All weights of a tile but for the batches that are `done`."""
        with tir.loop(done, (count + (_BYTES - 1)) // _BYTES * height) as batch:
            self.weigh_batch(batch, height, score_row)

    def weigh_batch(self, batch: Expr, height: int, score_row: Expr) -> None:
        """The weights of 64 keys of a row: a batch of all rows, then that of the next keys."""
        row, keys = (Register("int32", i, 1) for i in (batch % height, batch // height))
        start = Register("int32", (score_row + row.value) * self.stride + keys.value * _BYTES, 1)
        top, slope = (
            Register("float32", tir.broadcast(lanes[row.value]))
            for lanes in (self._largest, self._slopes)
        )
        halves = [self._words(start.value + u, top, slope) for u in (0, 2 * LANES)]
        packed = Register("int32", self._unit.pack_uint8(*halves))
        index = row.value * self.weight_stride + keys.value * LANES
        tir.store(self.weights, packed.value, tir.lanes(index))
        ones = tir.reinterpret("int8x64", tir.broadcast(0x01010101))
        bytes_ = tir.reinterpret("uint8x64", packed.value)
        total = load_lanes(self._totals, row.value * LANES, LANES, "int32")
        sums = self._unit.dot_product_bytes(total, bytes_, ones)
        tir.store(self._totals, sums, tir.lanes(row.value * LANES))

    def end(self, height: int, first_row: Expr) -> list[Register]:
        """After the weights of a tile; returns the factors for what its rows have summed before."""
        lanes = [Register("float32", load_lanes(v, 0, LANES)) for v in (self._kept, self._factors)]
        kept, self.block_factors = (all_rows(vector, height) for vector in lanes)
        totals = [load_lanes(self._totals, i * LANES, LANES, "int32") for i in range(height)]
        scaled = [
            tir.cast("float32x16", total) * factor.value
            for total, factor in zip(totals, self.block_factors, strict=True)
        ]
        self.add_sums(scaled, kept, first_row)
        return kept

    def _words(self, start: Expr, top: Register, slope: Register) -> Expr:
        """Two vectors of weights as uint16, in lanes of four.

        One is taken from t, so that it is negative: of t = n + f the whole part is a shift by
        -1 - n, which is ~(t - 1) without its fraction.
        """
        powers = []
        for first in (start, start + LANES):
            # The difference comes first: it is exactly 0 at the top, where a product rounded by
            # half a step would make t positive, and the largest weight 0; and a row of the least of
            # all floats, which masks are made of, does not overflow.
            difference = load_lanes(self.scores, first, LANES) - top.value
            real = fma(difference, slope.value, tir.broadcast(-1.0))
            powers.append(Register("int32", self._unit.round_to_int32(real)))
        t = Register("uint16", self._unit.pack_int16(*(one.value for one in powers)), 2 * LANES)
        halvings = (t.value ^ tir.all_words(0xFFFF)) >> tir.all_words(POINT)
        fraction = Register("uint16", t.value << tir.all_words(16 - POINT), 2 * LANES)
        constant, linear, square = (tir.all_words(term) for term in EXP2_TERMS)
        rise = self._unit.high_product(fraction.value, square) + linear
        series = self._unit.high_product(fraction.value, rise) + constant
        return self._unit.rounded_shift_by_7(self._unit.shift_right(series, halvings))

"""Softmax over keys that come block by block, and the values it weighs.

Each row keeps its largest score so far, the sum of its exponentials and its weighted sum of values;
a block that raises the largest first scales the other two by e^(old - new) (Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018).  So any number of keys needs the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Register
from qcompiler.targets.x86.attention_shape import PANEL, TILE_ROWS, AttentionShape
from qcompiler.targets.x86.vector import (
    VectorUnit,
    all_lanes,
    all_lanes_sum,
    fma,
    load_lanes,
    maxima_of,
    store_lanes,
)

__all__ = ["LOWEST", "RunningSoftmax", "all_rows"]

LOWEST = -3.4028234663852886e38
"""Where the running maximum starts: not -inf, because -inf - -inf is not 0."""


class RunningSoftmax:
    """Emits what happens between the two products; all of its memory is on the stack.

    `scores` holds one block for the rows of a tile, or of several, `stride` floats apart, `masks`
    what is added to them, and `weights` what becomes of them, here in the same place as the scores.
    """

    def __init__(self, shape: AttentionShape, unit: VectorUnit, *, tiles: int = 1) -> None:
        self._exp = unit.exp_of_negative
        self._padded_d = shape.padded_d
        self.stride = shape.keys + LANES
        self.scores = tir.scratch("float32", tiles * TILE_ROWS * self.stride)
        self.masks = tir.scratch("float32", TILE_ROWS * self.stride)
        self.weights, self.weight_stride = self.scores, self.stride
        self._context = tir.scratch("float32", shape.rows * shape.padded_d)
        self._top = tir.scratch("float32", shape.rows + 2 * LANES)
        self._sum = tir.scratch("float32", shape.rows * LANES)

    def clear(self, rows: Expr) -> None:
        """Prepare for no keys seen, in whole tiles."""
        with tir.loop(0, (rows + (LANES - 1)) // LANES + 1) as group:
            tir.store(self._top, tir.broadcast(LOWEST), tir.lanes(group * LANES))
        with tir.loop(0, ((rows + (TILE_ROWS - 1)) // TILE_ROWS) * TILE_ROWS) as row:
            tir.store(self._sum, tir.broadcast(0.0), tir.lanes(row * LANES))
            for start in range(0, self._padded_d, LANES):
                index = tir.lanes(row * self._padded_d + start)
                tir.store(self._context, tir.broadcast(0.0), index)

    def fill(self, i: int, mask: Expr, source: Expr, step: Expr, count: Expr) -> None:
        """Row i of the masks, which is -inf from the last key to a panel's end.

        `step` is 1, or 0 if `mask[source]` is for all keys.
        """
        start, target = Register("int32", source, 1), i * self.stride
        whole = (count // LANES) * LANES
        with tir.when(step == 0):
            with tir.loop(0, count // LANES) as j:
                everywhere = tir.broadcast(mask[start.value])
                tir.store(self.masks, everywhere, tir.lanes(target + j * LANES))
            with tir.loop(whole, count) as j:
                tir.store(self.masks, mask[start.value], target + j)
        with tir.when(step != 0):
            with tir.loop(0, count // LANES) as j:
                values = load_lanes(mask, start.value + j * LANES, LANES)
                tir.store(self.masks, values, tir.lanes(target + j * LANES))
            with tir.loop(whole, count) as j:
                tir.store(self.masks, mask[start.value + j], target + j)
        with tir.loop(count, ((count + (PANEL - 1)) // PANEL) * PANEL) as j:
            tir.store(self.masks, tir.constant(-math.inf, "float32"), target + j)

    def add_scores(self, i: Expr, key: Expr, values: Expr, top: Register) -> None:
        """Stores 16 scores of row i, and raises `top` to them."""
        score = Register("float32", values)
        tir.store(self.scores, score.value, tir.lanes(i * self.stride + key))
        top.set(tir.maximum(top.value, score.value))

    def weigh(
        self, tops: Sequence[Register], first_row: Expr, count: Expr, *, packed: bool = True
    ) -> list[Register]:
        """The scores become exponentials; returns the factor for what each row has summed before.

        Unless `packed` they stay float32 in `scores`.

        What a row has one of is computed for all rows of the tile at once, a lane for each.
        """
        highest = self.only_rows(self.highest(tops), len(tops))
        factors = self.raise_tops(highest, first_row)
        now, kept = (all_rows(vector, len(tops)) for vector in factors)
        sums = [self._exponentials(i, top, count, packed) for i, top in enumerate(now)]
        self.add_sums([total.value for total in sums], kept, first_row)
        return kept

    def highest(self, tops: Sequence[Register]) -> Expr:
        """The largest lanes of a tile's rows, a lane for each; anything in the others."""
        return maxima_of(tops)

    def only_rows(self, highest: Expr, count: int) -> Register:
        """What `highest` has of a tile's rows; LOWEST in the other lanes."""
        is_row = tir.lanes(0) < tir.broadcast(count)
        return Register("float32", tir.select(is_row, highest, tir.broadcast(LOWEST)))

    def raise_tops(self, highest: Register, first_row: Expr) -> tuple[Register, Register]:
        """The largest scores so far, and the factors for what has been summed before."""
        before = Register("float32", load_lanes(self._top, first_row, LANES))
        now = Register("float32", tir.maximum(before.value, highest.value))
        # Lanes that are no row of this tile hold those of later ones, which stay as they are.
        tir.store(self._top, now.value, tir.lanes(first_row))
        return now, Register("float32", self._exp(before.value - now.value))

    def add_sums(self, sums: Sequence[Expr], kept: Sequence[Register], first_row: Expr) -> None:
        """Adds sums of exponentials, per lane, to what is kept of those before."""
        for i, (factor, total) in enumerate(zip(kept, sums, strict=True)):
            start = (first_row + i) * LANES
            old = load_lanes(self._sum, start, LANES)
            tir.store(self._sum, fma(old, factor.value, total), tir.lanes(start))

    def store_weights(self, i: int, panel: Expr, weights: Sequence[Register], packed: bool) -> None:
        """The exponentials of a panel of row i."""
        for u, weight in enumerate(weights):
            index = i * self.stride + panel * PANEL + u * LANES
            tir.store(self.scores, weight.value, tir.lanes(index))

    def _exponentials(self, i: int, top: Register, count: Expr, packed: bool) -> Register:
        """Row i of the scores becomes e^(score - top); returns the sums per lane."""
        sums = [Register("float32", tir.broadcast(0.0)) for _ in range(2)]
        with tir.loop(0, (count + (PANEL - 1)) // PANEL) as panel:
            start = i * self.stride + panel * PANEL
            scores = [load_lanes(self.scores, start + u * LANES, LANES) for u in range(2)]
            weights = [Register("float32", self._exp(score - top.value)) for score in scores]
            self.store_weights(i, panel, weights, packed)
            for total, weight in zip(sums, weights, strict=True):
                total.set(total.value + weight.value)
        return Register("float32", sums[0].value + sums[1].value)

    def add_context(self, row: Expr, first: int, kept: Register, total: Expr) -> None:
        """The context of a row from float `first` on: what is kept of it, and 16 sums."""
        index = row * self._padded_d + first
        new = fma(load_lanes(self._context, index, LANES), kept.value, total)
        tir.store(self._context, new, tir.lanes(index))

    def finish(self, row: Expr, y: Expr, start: Expr, d: int, zero_empty: Expr) -> None:
        """Store the context of a row divided by its sum; zeros if that is 0 or NaN, on request."""
        total = Register("float32", all_lanes_sum(load_lanes(self._sum, row * LANES, LANES)))
        inverse = Register("float32", tir.broadcast(1.0) / total.value)
        is_positive = total.lane(0) > tir.constant(0.0, "float32")
        empty = 1 - tir.cast("int32", is_positive)
        is_zero = Register("int32", empty * zero_empty, 1)
        for chunk in range(0, d, LANES):
            width = min(LANES, d - chunk)
            context = load_lanes(self._context, row * self._padded_d + chunk, LANES)
            store_lanes(y, context * inverse.value, start + chunk, width)
            with tir.when(is_zero.value != 0):
                store_lanes(y, tir.broadcast(0.0), start + chunk, width)


def all_rows(vector: Register, count: int) -> list[Register]:
    """The first lanes of a vector, each in every lane."""
    return [Register("float32", all_lanes(vector.value, lane)) for lane in range(count)]

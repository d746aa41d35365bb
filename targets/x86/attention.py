"""Attention in float32: scores, softmax and context of one head in one pass.

    y = softmax(q k^T scale + mask) v

Keys come in blocks that stay in L2, see `running_softmax.py`.  A block's keys are transposed to
panels of 32 and its values copied to rows without gaps, because rows that are a multiple of 4 KiB
apart, as those of 16 heads of 64 are, share one set of every cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Parameter, Register
from qcompiler.targets.x86.attention_operands import AttentionOperands
from qcompiler.targets.x86.attention_row import SingleRow
from qcompiler.targets.x86.attention_shape import PANEL, TILE_ROWS, AttentionShape
from qcompiler.targets.x86.isa import AVX512_VNNI, Isa
from qcompiler.targets.x86.running_softmax import LOWEST, RunningSoftmax
from qcompiler.targets.x86.units import unit_of
from qcompiler.targets.x86.vector import VectorUnit, fma, load_lanes

__all__ = ["PARTS", "Attention", "attention_function"]

_TILES = {32: ((TILE_ROWS, 4, 1), 2), 8: ((6, 4, 2, 1), 1)}
"""By the vectors that the registers hold: rows of a tile, and its vectors.  8 by 2 zmm keep both
multiply-add units busy and fit the registers, as do 6 by 1 pairs of ymm.  No tile reaches past the
rows that `pack_queries` fills: a multiple of 8 is 0, 2 or 4 more than one of 6."""

PARTS = 4
"""Of the products of a panel, if something is computed beside them: its scores are 4 times 64."""

_UNROLLED = 4
"""The most steps of such a part: so many instructions fit in what a processor looks ahead."""

Beside = Callable[[Expr], None]

_POINTERS = ("q", "k", "v", "mask", "y")
_INTEGERS = ("q_stride", "k_stride", "v_stride", "y_stride", "mask_row_stride", "mask_step", "rows",
             "keys", "zero_empty")  # fmt: skip


def attention_function(
    d: int,
    kind: type[Attention] | None = None,
    isa: Isa = AVX512_VNNI,
    *,
    is_masked: bool = True,
) -> Any:
    """The TIR of the attention of one head with vectors of `d`.

    `void f(const float *q, const float *k, const float *v, const float *mask, float *y,
    int32_t q_stride, ..., float scale)`: strides count floats from row to row and may be 0;
    `mask_step` is 1 or 0 for a mask with one value per row.  `rows` is from 1 to the `rows` of the
    kind's `shape`, `keys` at least 1.  A row whose sum is 0 or NaN becomes 0 if `zero_empty`, NaN
    otherwise.  Unless it `is_masked`, `mask` is a single zero and both its strides are 0.
    """
    parameters = [Parameter(name, "float32") for name in _POINTERS]
    parameters += [Parameter(name, "int32", is_pointer=False) for name in _INTEGERS]
    parameters.append(Parameter("scale", "float32", is_pointer=False))

    def body(*arguments: Expr) -> None:
        named = dict(zip((p.name for p in parameters), arguments, strict=True))
        (kind or Attention)(d, isa, named, is_masked).emit()

    return tir.function(parameters, body)


class Attention(AttentionOperands):
    """Emits the loops over blocks of keys and tiles of rows.

    The products of lanes add up in a `total`.
    """

    total = "float32"

    def __init__(self, d: int, isa: Isa, arguments: dict[str, Expr], is_masked: bool) -> None:
        super().__init__(d, arguments)
        self._is_masked = is_masked
        self._heights, self._width = _TILES[isa.vectors]
        self._unit = unit_of(isa)
        self._softmax = self.running_softmax(self.shape(d), self._unit)
        self._single_row = SingleRow(d, arguments, self._softmax)

    def running_softmax(self, shape: AttentionShape, unit: VectorUnit) -> RunningSoftmax:
        """What keeps the scores and their weights."""
        return RunningSoftmax(shape, unit)

    def dot(self, total: Expr, one: Expr, other: Expr) -> Expr:
        """`total` plus the products of two vectors of lanes."""
        return fma(one, other, total)

    def first_total(self, key: Expr) -> Expr:
        """Where the scores of 16 keys start."""
        return tir.broadcast(0.0)

    def score(self, row: Expr, key: Expr, total: Expr, mask: Expr | None) -> Expr:
        """The scores of 16 keys from their totals."""
        return total if mask is None else total + mask

    def context(self, i: int, first: int, total: Expr) -> Expr:
        """What 16 totals, from value `first` on, add to the context of row i of a tile."""
        return total

    def emit(self) -> None:
        """Everything."""
        a, block_keys = self._a, self._block
        self._softmax.clear(a["rows"])
        with tir.when(a["rows"] > 1):
            self.pack_queries()
        with tir.loop(0, (a["keys"] + (block_keys - 1)) // block_keys) as block:
            first = Register("int32", block * block_keys, 1)
            count = Register("int32", tir.minimum(a["keys"] - first.value, block_keys), 1)
            with tir.when((a["mask_row_stride"] == 0) | (a["rows"] == 1)):
                self._fill(0, tir.constant(0, "int32"), first.value, count.value)
            with tir.when(a["rows"] == 1):
                self._single_row.emit(first.value, count.value)
            with tir.when(a["rows"] > 1):
                self.pack_keys(first.value, count.value)
                self.pack_values(first.value, count.value)
                self._rows(first.value, count.value)
        with tir.loop(0, a["rows"]) as row:
            self._softmax.finish(row, a["y"], row * a["y_stride"], self._d, a["zero_empty"])

    def _fill(self, i: int, row: Expr, first: Expr, count: Expr) -> None:
        a = self._a
        start = row * a["mask_row_stride"] + first * a["mask_step"]
        self._softmax.fill(i, a["mask"], start, a["mask_step"], count)

    def _rows(self, first: Expr, count: Expr) -> None:
        """All rows against one block, in tiles; rows that the last tile has too many repeat."""
        most = self._heights[0]
        whole = Register("int32", self._a["rows"] // most, 1)
        self.whole_tiles(whole.value, first, count)
        rest = Register("int32", self._a["rows"] - whole.value * most, 1)
        for height, below in zip(self._heights, (*self._heights[1:], 0), strict=True):
            with tir.when((rest.value > below) & (rest.value <= height)):
                self._tile(height, whole.value * most, first, count)

    def whole_tiles(self, tiles: Expr, first: Expr, count: Expr) -> None:
        """The tiles of as many rows as a tile has at most."""
        with tir.loop(0, tiles) as tile:
            self._tile(self._heights[0], tile * self._heights[0], first, count)

    def _tile(self, height: int, first_row: Expr, first: Expr, count: Expr) -> None:
        tops = self.new_tops(height)
        self.fill_masks(height, first_row, first, count)
        self.multiply_keys(tops, first_row, count)
        kept = self._softmax.weigh(tops, first_row, count)
        self.multiply_values(kept, first_row, count)

    def new_tops(self, height: int) -> list[Register]:
        """For the largest scores of a tile's rows, per lane."""
        return _registers("float32", tir.broadcast(LOWEST), height)

    def fill_masks(self, height: int, first_row: Expr, first: Expr, count: Expr) -> None:
        """The masks of a tile's rows, unless all rows share one."""
        with tir.when(self._a["mask_row_stride"] != 0):
            for i in range(height):
                row = tir.minimum(first_row + i, self._a["rows"] - 1)
                self._fill(i, row, first, count)

    def multiply_keys(
        self,
        tops: Sequence[Register],
        first_row: Expr,
        count: Expr,
        score_row: Expr = 0,
        beside: Beside | None = None,
    ) -> None:
        """Stores the scores of a tile's rows, from `score_row` on, and raises `tops` to them.

        `beside` emits a part of another tile's work, of which each panel of keys does four.
        """
        softmax, height = self._softmax, len(tops)
        # A mask that all rows share is there once.
        has_rows = tir.cast("int32", self._a["mask_row_stride"] != 0)
        mask_stride = Register("int32", has_rows * softmax.stride, 1)

        def add_panel(panel: Expr, *, masked: bool) -> None:
            for first in range(0, PANEL, self._width * LANES):
                keys = [panel * PANEL + first + u * LANES for u in range(self._width)]
                sums = self._panel_sums(height, first_row, panel, first, beside)
                for i, row in enumerate(sums):
                    for key, total in zip(keys, row, strict=True):
                        at = i * mask_stride.value + key
                        mask = load_lanes(softmax.masks, at, LANES) if masked else None
                        score = self.score(first_row + i, key, total.value, mask)
                        softmax.add_scores(score_row + i, key, score, tops[i])

        # Without a mask only what lies behind the last key has one: 6% faster.
        unmasked = tir.constant(0, "int32") if self._is_masked else count // PANEL
        begin = Register("int32", unmasked, 1)
        if not self._is_masked:
            with tir.loop(0, begin.value) as panel:
                add_panel(panel, masked=False)
        with tir.loop(0, (count + (PANEL - 1)) // PANEL - begin.value) as panel:
            add_panel(begin.value + panel, masked=True)

    def _panel_sums(
        self, height: int, first_row: Expr, panel: Expr, first: int, beside: Beside | None
    ) -> list[list[Register]]:
        offsets = range(first, first + self._width * LANES, LANES)
        starts = [self.first_total(panel * PANEL + u) for u in offsets]
        sums = [[Register(self.total, start) for start in starts] for _ in range(height)]

        def add(j: Expr) -> None:
            start = (panel * self._depth + j) * PANEL
            keys = [load_lanes(self._k, start + u, LANES, self.lane) for u in offsets]
            queries = [self._q[(first_row + i) * self._query_stride + j] for i in range(height)]
            self._multiply(sums, queries, keys)

        done = 0
        if beside is not None:
            steps = min(self._depth // PARTS, _UNROLLED)
            done = PARTS * steps
            with tir.loop(0, PARTS) as part:
                beside(panel * PARTS + part)
                for step in range(steps):
                    add(part * steps + step)
        if done < self._depth:
            with tir.loop(done, self._depth) as j:
                add(j)
        return sums

    def multiply_values(self, kept: Sequence[Register], first_row: Expr, count: Expr) -> None:
        """Adds the weighted sums of the block's values to what is kept of the rows' contexts."""
        softmax, height = self._softmax, len(kept)
        for chunk in range(0, self._padded_d, self._width * LANES):
            width = min(self._width, (self._padded_d - chunk) // LANES)
            zero = tir.broadcast(tir.constant(0, self.total))
            sums = [_registers(self.total, zero, width) for _ in range(height)]
            with tir.loop(0, (count + (self.pair - 1)) // self.pair) as j:
                start = j * self._padded_d + chunk
                values = [
                    load_lanes(self._v, start + u * LANES, LANES, self.lane) for u in range(width)
                ]
                weights = [softmax.weights[i * softmax.weight_stride + j] for i in range(height)]
                self._multiply(sums, weights, values)
            for i, row in enumerate(sums):
                for u, total in enumerate(row):
                    first = chunk + u * LANES
                    added = self.context(i, first, total.value)
                    softmax.add_context(first_row + i, first, kept[i], added)

    def _multiply(
        self, sums: Sequence[Sequence[Register]], scalars: Sequence[Expr], vectors: Sequence[Expr]
    ) -> None:
        """`sums[i][u] += scalars[i] * vectors[u]`."""
        loaded = [Register(self.lane, vector) for vector in vectors]
        for row, scalar in zip(sums, scalars, strict=True):
            everywhere = Register(self.lane, tir.broadcast(scalar))
            for total, vector in zip(row, loaded, strict=True):
                total.set(self.dot(total.value, everywhere.value, vector.value))


def _registers(dtype: str, value: Expr, count: int) -> list[Register]:
    return [Register(dtype, value) for _ in range(count)]

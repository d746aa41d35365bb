"""Attention in float32: scores, softmax and context of one head in one pass.

    y = softmax(q k^T scale + mask) v

Keys come in blocks that stay in L2, see `running_softmax.py`.  A block's keys are transposed to
panels of 32 and its values copied to rows without gaps, because rows that are a multiple of 4 KiB
apart, as those of 16 heads of 64 are, share one set of every cache.  A single row of queries reads
each key and value once, so it takes them from where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Parameter, Register
from qcompiler.targets.x86.attention_shape import PANEL, TILE_ROWS, AttentionShape, attention_shape
from qcompiler.targets.x86.isa import AVX512_VNNI, Isa
from qcompiler.targets.x86.running_softmax import LOWEST, RunningSoftmax
from qcompiler.targets.x86.units import unit_of
from qcompiler.targets.x86.vector import VectorUnit, fma, load_lanes, sums_of, transpose

__all__ = ["Attention", "attention_function"]

_TILES = {32: ((TILE_ROWS, 4, 1), 2), 8: ((4, 1), 1)}
"""By the vectors that the registers hold: rows of a tile, and its vectors.  8 by 2 zmm keep both
multiply-add units busy and fit the registers, as do 4 by 1 pairs of ymm."""

_POINTERS = ("q", "k", "v", "mask", "y")
_INTEGERS = ("q_stride", "k_stride", "v_stride", "y_stride", "mask_row_stride", "mask_step", "rows",
             "keys", "zero_empty")  # fmt: skip


def attention_function(d: int, kind: type[Attention] | None = None, isa: Isa = AVX512_VNNI) -> Any:
    """The TIR of the attention of one head with vectors of `d`.

    `void f(const float *q, const float *k, const float *v, const float *mask, float *y,
    int32_t q_stride, ..., float scale)`: strides count floats from row to row and may be 0;
    `mask_step` is 1 or 0 for a mask with one value per row.  `rows` is from 1 to
    `attention_shape(d).rows` and `keys` at least 1.  A row whose sum is 0 or NaN becomes 0 if
    `zero_empty`, NaN otherwise.
    """
    parameters = [Parameter(name, "float32") for name in _POINTERS]
    parameters += [Parameter(name, "int32", is_pointer=False) for name in _INTEGERS]
    parameters.append(Parameter("scale", "float32", is_pointer=False))

    def body(*arguments: Expr) -> None:
        named = dict(zip((p.name for p in parameters), arguments, strict=True))
        (kind or Attention)(d, isa, named).emit()

    return tir.function(parameters, body)


class Attention:
    """Emits the loops over blocks of keys and tiles of rows.

    What is multiplied are lanes of 32 bits: a float32 here, `pair` smaller numbers in a subclass.
    """

    lane = "float32"
    pair = 1

    def __init__(self, d: int, isa: Isa, arguments: dict[str, Expr]) -> None:
        shape = attention_shape(d)
        self._d, self._padded_d, self._block = d, shape.padded_d, shape.keys
        self._a = arguments
        self._heights, self._width = _TILES[isa.vectors]
        self._softmax = self.running_softmax(shape, unit_of(isa))
        self._depth = -(-d // self.pair)
        self._query_stride = -(-self._depth // LANES) * LANES
        self._single_q = tir.scratch("float32", shape.padded_d)
        self._q = tir.scratch(self.lane, TILE_ROWS * self._query_stride)
        self._k = tir.scratch(self.lane, shape.keys * self._depth)
        self._v = tir.scratch(self.lane, shape.keys // self.pair * shape.padded_d)

    def running_softmax(self, shape: AttentionShape, unit: VectorUnit) -> RunningSoftmax:
        """What keeps the scores and their weights."""
        return RunningSoftmax(shape, unit)

    def dot(self, total: Expr, one: Expr, other: Expr) -> Expr:
        """`total` plus the products of two vectors of lanes."""
        return fma(one, other, total)

    def key_lanes(self, start: Expr, first: Expr, width: int) -> Expr:
        """A vector of lanes from `width` numbers of a key, zeros after them."""
        return load_lanes(self._a["k"], start + first, width)

    def store_query(self, i: int, start: Expr, first: int, width: int) -> None:
        """`width` numbers of a query, scaled, to row i of the tile."""
        values = load_lanes(self._a["q"], start + first, width) * tir.broadcast(self._a["scale"])
        tir.store(self._q, values, tir.lanes(i * self._query_stride + first))

    def pack_values(self, first: Expr, count: Expr) -> None:
        """The block's values without gaps."""
        with tir.loop(0, count) as key:
            source = Register("int32", (first + key) * self._a["v_stride"], 1)
            for chunk in range(0, self._d, LANES):
                values = load_lanes(self._a["v"], source.value + chunk, min(LANES, self._d - chunk))
                tir.store(self._v, values, tir.lanes(key * self._padded_d + chunk))

    def emit(self) -> None:
        """Everything."""
        a, block_keys = self._a, self._block
        self._softmax.clear(a["rows"])
        with tir.loop(0, (a["keys"] + (block_keys - 1)) // block_keys) as block:
            first = Register("int32", block * block_keys, 1)
            count = Register("int32", tir.minimum(a["keys"] - first.value, block_keys), 1)
            with tir.when(a["rows"] == 1):
                self._single_row(first.value, count.value)
            with tir.when(a["rows"] > 1):
                self._pack_keys(first.value, count.value)
                self.pack_values(first.value, count.value)
                self._rows(first.value, count.value)
        with tir.loop(0, a["rows"]) as row:
            self._softmax.finish(row, a["y"], row * a["y_stride"], self._d, a["zero_empty"])

    def _fill(self, i: int, row: Expr, first: Expr, count: Expr) -> None:
        a = self._a
        start = row * a["mask_row_stride"] + first * a["mask_step"]
        self._softmax.fill(i, a["mask"], start, a["mask_step"], count)

    # --- many rows ---------------------------------------------------------------------------

    def _pack_keys(self, first: Expr, count: Expr) -> None:
        """To [panel][d][32]; the keys after the last are copies of it."""
        groups = (count + (LANES - 1)) // LANES
        with tir.loop(0, groups) as group:
            starts = self._key_starts(first, count, group)
            target = (group // 2) * (self._depth * PANEL) + (group % 2) * LANES
            whole, rest = divmod(self._d, LANES * self.pair)
            if whole:
                with tir.loop(0, whole) as chunk:
                    self._transpose_keys(starts, target, chunk, LANES * self.pair)
            if rest:
                self._transpose_keys(starts, target, tir.constant(whole, "int32"), rest)
        with tir.when(groups % 2 == 1):
            # The second half of the last panel is multiplied too: no infinities may be left there.
            last = (groups // 2) * (self._depth * PANEL) + LANES
            zero = tir.broadcast(tir.constant(0, self.lane))
            with tir.loop(0, self._depth) as i:
                tir.store(self._k, zero, tir.lanes(last + i * PANEL))

    def _key_starts(self, first: Expr, count: Expr, group: Expr) -> list[Register]:
        """Where 16 keys of a block lie; those after its last are the last."""
        keys = [tir.minimum(group * LANES + i, count - 1) for i in range(LANES)]
        return [Register("int32", (first + key) * self._a["k_stride"], 1) for key in keys]

    def _transpose_keys(
        self, starts: Sequence[Register], target: Expr, chunk: Expr, width: int
    ) -> None:
        first = chunk * (LANES * self.pair)
        rows = [Register(self.lane, self.key_lanes(start.value, first, width)) for start in starts]
        for i, column in enumerate(transpose(rows, self.lane)[: -(-width // self.pair)]):
            tir.store(self._k, column.value, tir.lanes(target + (chunk * LANES + i) * PANEL))

    def _rows(self, first: Expr, count: Expr) -> None:
        """All rows against one block, in tiles; rows that the last tile has too many repeat."""
        most = self._heights[0]
        whole = Register("int32", self._a["rows"] // most, 1)
        with tir.loop(0, whole.value) as tile:
            self._tile(most, tile * most, first, count)
        rest = Register("int32", self._a["rows"] - whole.value * most, 1)
        for height, below in zip(self._heights, (*self._heights[1:], 0), strict=True):
            with tir.when((rest.value > below) & (rest.value <= height)):
                self._tile(height, whole.value * most, first, count)

    def _tile(self, height: int, first_row: Expr, first: Expr, count: Expr) -> None:
        last_row = self._a["rows"] - 1
        for i in range(height):
            row = Register("int32", tir.minimum(first_row + i, last_row), 1)
            for chunk in range(0, self._d, LANES * self.pair):
                width = min(LANES * self.pair, self._d - chunk)
                self.store_query(i, row.value * self._a["q_stride"], chunk, width)
            self._fill(i, row.value, first, count)
        tops = self._multiply_keys(height, count)
        kept = self._softmax.weigh(tops, first_row, count)
        self._multiply_values(kept, first_row, count)

    def _multiply_keys(self, height: int, count: Expr) -> list[Register]:
        """Adds q k^T to the rows of scores; returns the maxima, per lane."""
        tops = [Register("float32", tir.broadcast(LOWEST)) for _ in range(height)]
        with tir.loop(0, (count + (PANEL - 1)) // PANEL) as panel:
            for first in range(0, PANEL, self._width * LANES):
                offsets = range(first, first + self._width * LANES, LANES)
                sums = _zeros(height, self._width)
                with tir.loop(0, self._depth) as j:
                    start = (panel * self._depth + j) * PANEL
                    keys = [load_lanes(self._k, start + u, LANES, self.lane) for u in offsets]
                    queries = [self._q[i * self._query_stride + j] for i in range(height)]
                    self._multiply(sums, queries, keys)
                for i, row in enumerate(sums):
                    for u, total in zip(offsets, row, strict=True):
                        self._softmax.add_scores(i, panel * PANEL + u, total.value, tops[i])
        return tops

    def _multiply_values(self, kept: Sequence[Register], first_row: Expr, count: Expr) -> None:
        """Adds the weighted sums of the block's values to what is kept of the rows' contexts."""
        softmax, height = self._softmax, len(kept)
        for chunk in range(0, self._padded_d, self._width * LANES):
            width = min(self._width, (self._padded_d - chunk) // LANES)
            sums = _zeros(height, width)
            with tir.loop(0, (count + (self.pair - 1)) // self.pair) as j:
                start = j * self._padded_d + chunk
                values = [
                    load_lanes(self._v, start + u * LANES, LANES, self.lane) for u in range(width)
                ]
                weights = [softmax.weights[i * softmax.weight_stride + j] for i in range(height)]
                self._multiply(sums, weights, values)
            for i, row in enumerate(sums):
                softmax.add_context(first_row + i, chunk, kept[i], row)

    def _multiply(
        self, sums: Sequence[Sequence[Register]], scalars: Sequence[Expr], vectors: Sequence[Expr]
    ) -> None:
        """`sums[i][u] += scalars[i] * vectors[u]`."""
        loaded = [Register(self.lane, vector) for vector in vectors]
        for row, scalar in zip(sums, scalars, strict=True):
            everywhere = Register(self.lane, tir.broadcast(scalar))
            for total, vector in zip(row, loaded, strict=True):
                total.set(self.dot(total.value, everywhere.value, vector.value))

    # --- a single row ------------------------------------------------------------------------

    def _single_row(self, first: Expr, count: Expr) -> None:
        row = tir.constant(0, "int32")
        scale = tir.broadcast(self._a["scale"])
        for chunk in range(0, self._d, LANES):
            values = load_lanes(self._a["q"], chunk, min(LANES, self._d - chunk))
            tir.store(self._single_q, values * scale, tir.lanes(chunk))
        self._fill(0, row, first, count)
        top = Register("float32", tir.broadcast(LOWEST))
        with tir.loop(0, (count + (LANES - 1)) // LANES) as group:
            products = self._products(self._key_starts(first, count, group))
            self._softmax.add_scores(0, group * LANES, sums_of(products), top)
        (kept,) = self._softmax.weigh([top], row, count, packed=False)
        for chunk in range(0, self._d, 4 * LANES):
            widths = [min(LANES, self._d - i) for i in range(chunk, self._d, LANES)][:4]
            self._softmax.add_context(row, chunk, kept, self._weigh(chunk, widths, first, count))

    def _products(self, starts: Sequence[Register]) -> list[Register]:
        """Query times each of 16 keys, per lane."""
        (sums,) = _zeros(1, LANES)

        def step(chunk: Expr, width: int) -> None:
            query = Register("float32", load_lanes(self._single_q, chunk, LANES))
            for total, start in zip(sums, starts, strict=True):
                key = load_lanes(self._a["k"], start.value + chunk, width)
                total.set(fma(query.value, key, total.value))

        whole, rest = divmod(self._d, LANES)
        if whole:
            with tir.loop(0, whole) as chunk:
                step(chunk * LANES, LANES)
        if rest:
            step(tir.constant(whole * LANES, "int32"), rest)
        return sums

    def _weigh(
        self, chunk: int, widths: Sequence[int], first: Expr, count: Expr
    ) -> Sequence[Register]:
        """The weighted sum of part of the values, four keys at a time to have enough chains."""
        partial, unrolled = _zeros(4, len(widths)), count // 4

        def step(sums: Sequence[Register], key: Expr) -> None:
            start = Register("int32", (first + key) * self._a["v_stride"] + chunk, 1)
            weight = Register("float32", tir.broadcast(self._softmax.scores[key]))
            for u, (total, width) in enumerate(zip(sums, widths, strict=True)):
                values = load_lanes(self._a["v"], start.value + u * LANES, width)
                total.set(fma(weight.value, values, total.value))

        with tir.loop(0, unrolled) as group:
            for i, sums in enumerate(partial):
                step(sums, group * 4 + i)
        with tir.loop(unrolled * 4, count) as key:
            step(partial[0], key)
        for total, *others in zip(*partial, strict=True):
            total.set(total.value + others[0].value + (others[1].value + others[2].value))
        return partial[0]


def _zeros(height: int, width: int) -> list[list[Register]]:
    return [[Register("float32", tir.broadcast(0.0)) for _ in range(width)] for _ in range(height)]

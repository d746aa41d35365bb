"""Attention with products of int8, for AVX512-VNNI.

Queries and keys are quantized per token, values per channel of a block of keys, weights to 8 bits
(`softmax_int8.py`); the sums of both products are exact.  The result is good to 30 to 40 dB.
Queries are the unsigned operand of vpdpbusd, with zero point 128, which costs nothing: the scores
of a key start at -128 times its sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qcompiler.ir.dialect import SMALLEST_MAGNITUDE
from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Register
from qcompiler.targets.x86.attention import PARTS, Attention, attention_function
from qcompiler.targets.x86.attention_row import row_starts
from qcompiler.targets.x86.attention_shape import PANEL, AttentionShape, int8_attention_shape
from qcompiler.targets.x86.avx512 import Avx512
from qcompiler.targets.x86.isa import AVX512_VNNI, Isa
from qcompiler.targets.x86.softmax_int8 import SoftmaxInt8
from qcompiler.targets.x86.vector import (
    VectorUnit,
    fma,
    load_lanes,
    maxima_of,
    offset_by_128,
    transpose,
)

__all__ = ["attention_int8_function"]

_STEP = 4 * LANES
"""Numbers that become one vector of bytes."""


def attention_int8_function(d: int, *, is_masked: bool) -> Any:
    """The TIR of `attention_function`, with products of int8."""
    return attention_function(d, _AttentionInt8, AVX512_VNNI, is_masked=is_masked)


class _AttentionInt8(Attention):
    lane = "int32"
    total = "int32"
    pair = 4
    shape = staticmethod(int8_attention_shape)
    _softmax: SoftmaxInt8

    def __init__(self, d: int, isa: Isa, arguments: dict[str, Expr], is_masked: bool) -> None:
        super().__init__(d, isa, arguments, is_masked)
        shape = self.shape(d)
        self._avx512 = Avx512()
        self._inverses = tir.scratch("float32", LANES)
        self._q_scale = tir.scratch("float32", shape.rows + LANES)
        if not is_masked:  # a mask is added to scores that are whole
            self._softmax.row_scales = self._q_scale
        self._k_scale = tir.scratch("float32", shape.keys)
        self._k_start = tir.scratch("int32", shape.keys)
        self._v_scale = tir.scratch("float32", shape.padded_d)

    def running_softmax(self, shape: AttentionShape, unit: VectorUnit) -> SoftmaxInt8:
        """What keeps the scores and their weights."""
        return SoftmaxInt8(shape, Avx512())

    def dot(self, total: Expr, one: Expr, other: Expr) -> Expr:
        """`total` plus four products per lane, of uint8 and int8."""
        unsigned, signed = tir.reinterpret("uint8x64", one), tir.reinterpret("int8x64", other)
        return self._avx512.dot_product_bytes(total, unsigned, signed)

    # --- tiles -------------------------------------------------------------------------------

    def whole_tiles(self, tiles: Expr, first: Expr, count: Expr) -> None:
        """The scores of a tile become weights beside the products that make those of the next.

        Exponentials are made by the units that dot products leave idle: 4% of 1500 tokens in
        vectors of 64, 10% of 128 in vectors of 32.  The first tile has what happens to be there
        beside it, of which nothing is used.
        """
        softmax, height = self._softmax, self._heights[0]
        with tir.loop(0, tiles + 1) as tile:
            row = tile * height
            scores = Register("int32", tile % 2 * height, 1)
            others = Register("int32", height - scores.value, 1)
            tops, done = self.new_tops(height), Register("int32", 0, 1)
            with tir.when(tile < tiles):
                self.fill_masks(height, row, first, count)

                def weigh(batch: Expr) -> None:
                    softmax.weigh_batch(batch, height, others.value)

                self.multiply_keys(tops, row, count, scores.value, weigh)
                done.set((count + (PANEL - 1)) // PANEL * PARTS)
            with tir.when(tile > 0):
                softmax.weigh_batches(done.value, height, count, others.value)
                kept = softmax.end(height, row - height)
                self.multiply_values(kept, row - height, count)
            with tir.when(tile < tiles):
                softmax.begin(tops, row, count, scores.value)

    # --- scores ------------------------------------------------------------------------------

    def first_total(self, key: Expr) -> Expr:
        """-128 times the sums of 16 keys."""
        return load_lanes(self._k_start, key, LANES, "int32")

    def score(self, row: Expr, key: Expr, total: Expr, mask: Expr | None) -> Expr:
        """The scores of 16 keys from their totals."""
        scale, real = load_lanes(self._k_scale, key, LANES), tir.cast("float32x16", total)
        if self._is_masked:
            scale = scale * tir.broadcast(self._q_scale[row])
        return real * scale if mask is None else fma(real, scale, mask)

    def pack_queries(self) -> None:
        """All rows, 16 at a time; those after the last are copies of it."""
        given = self._a["scale"]
        one = tir.constant(1.0, "float32")
        sign = tir.select(given < tir.constant(0.0, "float32"), -one, one)
        magnitude = given * sign
        with tir.loop(0, (self._a["rows"] + (LANES - 1)) // LANES) as group:
            starts = row_starts(self._a["q_stride"], 0, self._a["rows"], group)
            # The sign of the scale goes to the queries: the largest of sums is that of scores then.
            scale = self._measure("q", starts) * tir.broadcast(magnitude)
            inverses = load_lanes(self._inverses, 0, LANES) * tir.broadcast(sign)
            tir.store(self._inverses, inverses, tir.lanes(0))
            tir.store(self._q_scale, scale, tir.lanes(group * LANES))
            for chunk in range(0, self._d, _STEP):
                for i, row in enumerate(self._quantize("q", starts, chunk)):
                    index = (group * LANES + i) * self._query_stride + chunk // 4
                    unsigned = tir.reinterpret("int32x16", offset_by_128(row))
                    tir.store(self._q, unsigned, tir.lanes(index))

    def pack_16_keys(self, starts: Sequence[Register], target: Expr, key: Expr) -> None:
        """The keys at `starts`, which are those from `key` on, transposed to half of a panel."""
        tir.store(self._k_scale, self._measure("k", starts), tir.lanes(key))
        zeros = tir.broadcast(tir.constant(0x80808080, "uint32"))
        sums = Register("int32", tir.broadcast(0))
        for chunk in range(0, self._d, _STEP):
            rows = [
                Register("int32", tir.reinterpret("int32x16", row))
                for row in self._quantize("k", starts, chunk)
            ]
            for i, column in enumerate(transpose(rows, "int32")[: self._depth - chunk // 4]):
                tir.store(self._k, column.value, tir.lanes(target + (chunk // 4 + i) * PANEL))
                sums.set(self.dot(sums.value, zeros, column.value))
        tir.store(self._k_start, tir.broadcast(0) - sums.value, tir.lanes(key))

    def _measure(self, name: str, starts: Sequence[Register]) -> Expr:
        """The scales of 16 rows; what `_quantize` multiplies them by is left in `_inverses`."""
        magnitudes = [self._magnitude(self._row(name, start.value)) for start in starts]
        top = Register("float32", maxima_of(magnitudes))
        tir.store(self._inverses, tir.broadcast(127.0) / top.value, tir.lanes(0))
        return top.value * tir.broadcast(1 / 127)

    def _quantize(self, name: str, starts: Sequence[Register], chunk: int) -> Iterator[Expr]:
        """A vector of bytes of each of 16 rows, zeros after their end."""
        for i, start in enumerate(starts):
            values = self._row(name, start.value, chunk, chunk + _STEP)
            yield self._unit.pack_int8(self._integers(values, tir.broadcast(self._inverses[i])))

    # --- contexts ----------------------------------------------------------------------------

    def context(self, i: int, first: int, total: Expr) -> Expr:
        """What 16 totals, from value `first` on, add to the context of row i of a tile."""
        scale = load_lanes(self._v_scale, first, LANES) * self._softmax.block_factors[i].value
        return tir.cast("float32x16", total) * scale

    def pack_values(self, first: Expr, count: Expr) -> None:
        """The block's values, four keys to a lane; after the last key are copies of it."""

        def row(key: Expr) -> list[Register]:
            start = Register(
                "int32", (first + tir.minimum(key, count - 1)) * self._a["v_stride"], 1
            )
            return self._row("v", start.value)

        tops = [
            Register("float32", tir.broadcast(SMALLEST_MAGNITUDE)) for _ in range(0, self._d, LANES)
        ]
        with tir.loop(0, count) as key:
            for top, value in zip(tops, row(key), strict=True):
                top.set(self._unit.larger_magnitude(value.value, top.value))
        for u, top in enumerate(tops):
            tir.store(self._v_scale, top.value * tir.broadcast(1 / 127), tir.lanes(u * LANES))
            top.set(tir.broadcast(127.0) / top.value)
        with tir.loop(0, (count + 3) // 4) as group:
            rows = [row(group * 4 + i) for i in range(4)]
            for u, (inverse, *values) in enumerate(zip(tops, *rows, strict=True)):
                packed = self._avx512.pack_int8_by_lanes(self._integers(values, inverse.value))
                index = tir.lanes(group * self._padded_d + u * LANES)
                tir.store(self._v, tir.reinterpret("int32x16", packed), index)

    # --- rows of floats ----------------------------------------------------------------------

    def _row(
        self, name: str, start: Expr, first: int = 0, last: int | None = None
    ) -> list[Register]:
        """Vectors of a row, from number `first` to `last` or its end, zeros after that."""
        end = self._d if last is None else min(last, self._d)
        return [
            Register("float32", load_lanes(self._a[name], start + i, min(LANES, end - i)))
            for i in range(first, end, LANES)
        ]

    def _magnitude(self, values: Sequence[Register]) -> Register:
        top = Register("float32", tir.broadcast(SMALLEST_MAGNITUDE))
        for value in values:
            top.set(self._unit.larger_magnitude(value.value, top.value))
        return top

    def _integers(self, values: Sequence[Register], inverse: Expr) -> list[Expr]:
        """Four vectors of int32, zeros for those that are missing."""
        found = [self._unit.round_to_int32(value.value * inverse) for value in values]
        nothing = [tir.broadcast(0)] * (4 - len(found))
        return [Register("int32", value).value for value in (*found, *nothing)]

"""Matrix multiplication of int8 activations by int4 weights in groups.

    y = epilogue(s * sum_g ws_g * float(sum_{k in g} a w))

Weights lie as [panel][ceil(K/8)][vectors of a panel][64 bytes], 8 more than they are: a byte holds
two of a column, whose four bytes side by side are one group of four rows in their low bits and the
next in their high ones.  a is q - 128; `init` holds for each row and chunk -8 times the sum of a.
A chunk is a group, or as much of it as a unit adds up before it widens its sums.

The floats of a tile lie in memory meanwhile: they are needed once for each chunk, and registers are
for the integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qcompiler.ir.region import Region
from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Parameter, Register
from qcompiler.targets.x86.isa import AVX512_VNNI, Isa
from qcompiler.targets.x86.qmatmul import PART, RANGE
from qcompiler.targets.x86.results import Results
from qcompiler.targets.x86.tile import TileShape
from qcompiler.targets.x86.units import unit_of
from qcompiler.targets.x86.vector import VectorUnit, fma, load_lanes
from qcompiler.targets.x86.w4_family import EIGHT, Chunks, chunks_of, w4_tile

__all__ = ["qmatmul_w4_function"]

_BYTES = 4 * LANES
"""Of a vector of weights."""
_LOW = 0x0F0F0F0F


class _TokenResults(Results):
    """What is stored of sums that have the scales of their weights already."""

    def _product(self, total: Expr, row: Expr, column: Expr) -> Expr:
        return total * tir.broadcast(self.s[row])


@dataclasses.dataclass(frozen=True)
class _Operands:
    """The parameters that the loops read."""

    a: Expr
    init: Expr
    weights: Expr
    ws: Expr
    rows: Expr
    panel_begin: Expr
    panel_end: Expr


class _Loops:
    """Emits the loops over panels, tiles and K."""

    def __init__(
        self, n: int, unit: VectorUnit, shape: TileShape, chunks: Chunks, operands: _Operands,
        finish: Results,
    ) -> None:  # fmt: skip
        self._n, self._unit, self._shape, self._chunks = n, unit, shape, chunks
        self._operands, self._finish = operands, finish
        self._sums = tir.scratch("float32", 2 * shape.rows * shape.columns)

    def emit(self) -> None:
        """Everything: panels [panel_begin, panel_end) of all rows."""
        ops, whole_panels = self._operands, self._n // self._shape.columns
        whole_end = tir.minimum(ops.panel_end, tir.constant(whole_panels, "int32"))
        begin = Register("int32", ops.panel_begin, 1)
        with tir.when(ops.rows == 1):
            pairs = Register("int32", tir.half(whole_end - ops.panel_begin), 1)
            self._single_row(pairs.value)
            begin.set(ops.panel_begin + pairs.value * 2)
        with tir.loop(0, whole_end - begin.value) as panel:
            self._panel(begin.value + panel, self._shape.columns)
        if edge := self._n % self._shape.columns:
            with tir.when(ops.panel_end > whole_panels):
                self._panel(tir.constant(whole_panels, "int32"), edge)

    def _single_row(self, pairs: Expr) -> None:
        """One row, two panels at a time: one stream of weights leaves memory bandwidth unused."""
        begin, row = self._operands.panel_begin, tir.constant(0, "int32")
        with tir.loop(0, pairs) as index:
            panels = [begin + index, begin + pairs + index]
            self._accumulate(panels, row, 1, self._shape.vectors)
            for i, panel in enumerate(panels):
                self._store(i, row, panel, self._shape.columns)

    def _panel(self, panel: Expr, columns: int) -> None:
        """All rows of one panel, in whole tiles and what is left over by halves."""
        rows, height, vectors = self._operands.rows, self._shape.rows, -(-columns // LANES)
        done = Register("int32", tir.constant(0, "int32"), 1)
        while height:
            with tir.loop(0, (rows - done.value) // height) as index:
                first = done.value + index * height
                self._accumulate([panel], first, height, vectors)
                with tir.loop(0, height) as i:
                    self._store(i, first + i, panel, columns)
            done.set(done.value + (rows - done.value) // height * height)
            height //= 2

    def _accumulate(
        self, panels: Sequence[Expr], first_row: Expr, height: int, vectors: int
    ) -> None:
        """Sums of `height` rows for each panel in turn: row p * height + i of `_sums`."""
        for i in range(len(panels) * height * self._shape.vectors):
            tir.store(self._sums, tir.broadcast(0.0), tir.lanes(i * LANES))
        with tir.loop(0, self._chunks.count) as chunk:
            for p, panel in enumerate(panels):
                totals = self._chunk(panel, chunk, first_row, height, vectors)
                group = tir.cast("int32", chunk // self._chunks.per_group)
                self._scale(totals, panel, group, chunk, first_row, p * height)

    def _chunk(
        self, panel: Expr, chunk: Expr, first_row: Expr, height: int, vectors: int
    ) -> list[list[Register]]:
        unit, chunks = self._unit, self._chunks
        dtype, lanes = unit.nibble_sums
        zero = tir.broadcast(tir.constant(0, dtype), lanes)
        totals = [[Register(dtype, zero, lanes) for _ in range(vectors)] for _ in range(height)]

        def step(eight: Expr) -> None:
            for v in range(vectors):
                low, high = self._weights(panel, eight, v)
                for i, row in enumerate(totals):
                    start = (first_row + i) * chunks.padded_k + eight * EIGHT
                    for nibbles, offset in ((low, 0), (high, 4)):
                        bits = self._operands.a.vload([start + offset], "uint8x4")
                        bits = tir.reinterpret("int32", bits)
                        row[v].set(unit.add_nibbles(row[v].value, nibbles.value, bits))

        eights = chunks.size // EIGHT
        if eights <= 4:
            for i in range(eights):
                step(chunk * eights + i)
        else:
            with tir.loop(0, eights) as i:
                step(chunk * eights + i)
        return totals

    def _weights(self, panel: Expr, eight: Expr, vector: int) -> tuple[Register, Register]:
        """The low and high halves of the bytes of a vector."""
        index = (panel * self._chunks.eights + eight) * self._shape.vectors + vector
        packed = self._operands.weights.vload([index * _BYTES], f"int8x{_BYTES}")
        both = Register("uint32", tir.reinterpret("uint32x16", packed))
        mask = tir.broadcast(tir.constant(_LOW, "uint32"))
        shifted = both.value >> tir.broadcast(tir.constant(4, "uint32"))
        halves = (both.value & mask, shifted & mask)
        bytes_ = [tir.reinterpret(f"uint8x{_BYTES}", half) for half in halves]
        return Register("uint8", bytes_[0], _BYTES), Register("uint8", bytes_[1], _BYTES)

    def _scale(
        self, totals: Sequence[Sequence[Register]], panel: Expr, group: Expr, chunk: Expr,
        first_row: Expr, first: int,
    ) -> None:  # fmt: skip
        """Adds integers times the scales of their group to the floats."""
        chunks, vectors = self._chunks, self._shape.vectors
        scales = [
            Register("float32", load_lanes(
                self._operands.ws, ((panel * chunks.groups + group) * vectors + v) * LANES, LANES
            ))
            for v in range(len(totals[0]))
        ]  # fmt: skip
        for i, row in enumerate(totals):
            start = tir.broadcast(self._operands.init[(first_row + i) * chunks.count + chunk])
            for v, (total, scale) in enumerate(zip(row, scales, strict=True)):
                place = tir.lanes(((first + i) * vectors + v) * LANES)
                integers = self._unit.whole_sums(total.value) + start
                before = self._sums.vload([place.base], "float32x16")
                real = tir.cast("float32x16", integers)
                tir.store(self._sums, fma(real, scale.value, before), place)

    def _store(self, i: Expr, row: Expr, panel: Expr, columns: int) -> None:
        """Row i of the floats as one of y."""
        vectors = -(-columns // LANES)
        sums = [
            load_lanes(self._sums, (i * self._shape.vectors + v) * LANES, LANES)
            for v in range(vectors)
        ]
        self._finish(sums, row, panel * self._shape.columns, columns)


def qmatmul_w4_function(region: Region, isa: Isa = AVX512_VNNI) -> Any:
    """The TIR of a region of `QMatMulW4A8` for an instruction set.

    `void f(const uint8_t *a, const int32_t *init, const float *s, const int8_t *weights,
    const float *ws, const float *extra..., y, int32_t rows, int32_t panel_begin,
    int32_t panel_end)`: a [rows, chunks * size of one], int8 and zeros after K; ws as
    [panel][group][columns of a panel].  Of merged products each call stores to one result, that
    one's width and first column, `int32_t y_columns, int32_t y_first`, at the end.  Neither the
    rows nor the range of panels is empty.
    """
    n, unit, shape, chunks = region.size("N"), unit_of(isa), w4_tile(isa), chunks_of(region, isa)
    count = len(region.extras)

    def body(a: Expr, init: Expr, s: Expr, weights: Expr, ws: Expr, *rest: Expr) -> None:
        extras, (y, rows, begin, end, *part) = rest[:count], rest[count:]
        y_columns, y_first = part or (n, 0)
        results = _TokenResults(region, unit, s, ws, (), extras, y, y_columns, y_first)
        operands = _Operands(a, init, weights, ws, rows, begin, end)
        _Loops(n, unit, shape, chunks, operands, results).emit()

    return tir.function(
        [
            Parameter("a", "uint8"),
            Parameter("init", "int32"),
            Parameter("s", "float32"),
            Parameter("weights", "int8"),
            Parameter("ws", "float32"),
            *(Parameter(f"extra{i}", "float32") for i in range(count)),
            Parameter("y", "uint8" if region.is_quantized else "float32"),
            *RANGE,
            *(PART if region.widths else ()),
        ],
        body,
    )

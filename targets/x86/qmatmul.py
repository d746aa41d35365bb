"""int8 matrix multiplication, weights packed in panels of NR vectors of columns.

    y = epilogue(float(sum_k (q - z) w) * (s * ws))

The weights lie as [panel][ceil(K/4)][NR * 16 * 4]: for each four rows of K, each lane of a panel
has its int8 side by side, as the vector unit multiplies them (vpdpbusd).  `init` holds
-z * sum_k w, so the zero point of the activations, 128 or known at run time, costs nothing.  A tile
is MR rows by one panel, its accumulators in registers.

Where rows are split, weights are uint8, 128 more, activations int8 and less the row's centre c, and
`init` holds for each row -128 * sum_k (q - c).  Then (z - c) sum_k w is to be subtracted; of W8A8
c is z.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from qcompiler.ir.region import Region
from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Parameter, Register
from qcompiler.targets.x86.activations import ByteRows, Excess, Part, SplitRows
from qcompiler.targets.x86.isa import AVX512_VNNI, Isa
from qcompiler.targets.x86.results import Results
from qcompiler.targets.x86.tile import tile_shape
from qcompiler.targets.x86.units import unit_of
from qcompiler.targets.x86.vector import VectorUnit, load_lanes, store_lanes
from qcompiler.targets.x86.w8_family import differences, most_lacking

__all__ = ["PART", "RANGE", "accumulator_function", "qmatmul_function"]

_QUAD = 4

Finish = Callable[[Sequence[Expr], Expr, Expr, int], None]
"""Stores a part of one row of y: (its sums, 16 in each; row; first column; columns that exist)."""

Ask = Callable[[Expr, Expr, int], None]
"""Asks memory for what the same part will be finished with: (row; first column; columns)."""


@dataclasses.dataclass(frozen=True)
class Operands:
    """The parameters that the loops read."""

    q: Expr
    weights: Expr
    init: Expr
    rows: Expr
    panel_begin: Expr
    panel_end: Expr
    excess: Excess | None = None
    """Of rows that are split."""


class Loops:
    """Emits the loops over panels, tiles and K for one shape; `finish` turns sums into y."""

    def __init__(
        self,
        k: int,
        n: int,
        unit: VectorUnit,
        isa: Isa,
        operands: Operands,
        finish: Finish,
        ask: Ask = lambda row, column, columns: None,
    ) -> None:
        self._unit = unit
        self._k, self._groups = k, -(-k // _QUAD)
        self._shape = tile_shape(n, isa)
        self._operands = operands
        self._finish, self._ask = finish, ask
        self._whole_panels, self._edge_columns = divmod(n, self._shape.columns)
        self._activations = self._rows()

    def _rows(self) -> ByteRows | SplitRows:
        operands = self._operands
        if operands.excess is not None:
            return SplitRows(operands.q, self._k, self._shape.rows, operands.excess)
        return ByteRows(operands.q, self._k)

    def emit(self) -> None:
        """Everything: panels [panel_begin, panel_end) of all rows."""
        ops = self._operands
        whole_end = tir.minimum(ops.panel_end, tir.constant(self._whole_panels, "int32"))
        begin = Register("int32", ops.panel_begin, 1)
        with tir.when(ops.rows == 1):
            pairs = Register("int32", tir.half(whole_end - ops.panel_begin), 1)
            self._single_row(pairs.value)
            begin.set(ops.panel_begin + pairs.value * 2)
        with tir.loop(0, whole_end - begin.value) as panel:
            self._panel(begin.value + panel, self._shape.columns)
        if self._edge_columns:
            with tir.when(ops.panel_end > self._whole_panels):
                self._panel(tir.constant(self._whole_panels, "int32"), self._edge_columns)

    def _panel(self, panel: Expr, columns: int) -> None:
        """All rows of one panel, in tiles of nearly equal height; the last overlaps upwards."""
        rows, most, vectors = self._operands.rows, self._shape.rows, _vectors(columns)
        first_column = panel * self._shape.columns
        spilled = tir.scratch("int32", most * vectors * LANES)
        tiles = Register("int32", (rows + (most - 1)) // most, 1)
        height = Register("int32", (rows + tiles.value - 1) // tiles.value, 1)
        with tir.loop(0, tiles.value) as index:
            # While the first tiles compute they fetch the next panel, an equal part each; otherwise
            # weights from memory are read and multiplied in turn (20% slower at 32 x 4096 x 4096).
            part = tir.minimum(index, self._shape.vectors - 1)
            first = Register("int32", tir.minimum(index * height.value, rows - height.value), 1)
            for exact in range(1, most):
                with tir.when(height.value == exact):
                    tile = self._accumulate([panel], index, first.value, exact, vectors, part)
                    _spill(tile, spilled)
            # One copy of the epilogue for all those heights, and for the full height one that takes
            # the sums from registers: spilling them costs 4% at K = 384.
            with tir.when(height.value < most), tir.loop(0, height.value) as i:
                self._finish(_spilled(spilled, i, vectors), first.value + i, first_column, columns)
            with tir.when(height.value == most):
                for i in range(most):
                    self._ask(first.value + i, first_column, columns)
                tile = self._accumulate([panel], index, first.value, most, vectors, part)
                for i, sums in enumerate(tile):
                    self._finish(_values(sums), first.value + i, first_column, columns)

    def _single_row(self, pairs: Expr) -> None:
        """One row, two panels at a time: one stream of weights leaves memory bandwidth unused."""
        shape, begin, row = self._shape, self._operands.panel_begin, tir.constant(0, "int32")
        with tir.loop(0, pairs) as index:
            panels = [begin + index, begin + pairs + index]
            for panel, sums in zip(
                panels, self._accumulate(panels, row, row, 1, shape.vectors), strict=True
            ):
                self._finish(_values(sums), row, panel * shape.columns, shape.columns)

    def _accumulate(
        self,
        panels: Sequence[Expr],
        tile: Expr,
        first_row: Expr,
        height: int,
        vectors: int,
        prefetched: Expr | None = None,
    ) -> list[list[Register]]:
        """The sums over all of K of `height` rows, for each panel in turn: `vectors` per row.

        Asks on the way for the part `prefetched`, of as many as a panel has vectors, of the panel
        after, in the order of its memory: any other keeps the hardware from reading ahead.
        """
        sums = [
            [Register("int32", self._init(panel, first_row + i, j)) for j in range(vectors)]
            for panel in panels
            for i in range(height)
        ]

        def step(rows: Sequence[Sequence[Part]]) -> None:
            if prefetched is not None:
                next_panel = self._weight_start(panels[0] + 1, 0, 0)
                for group, _ in rows[0]:
                    line = (prefetched * self._groups + group) * (LANES * _QUAD)
                    tir.prefetch_to_l2(self._operands.weights, next_panel + line)
            for p, panel in enumerate(panels):
                for row, parts in zip(sums[p * height : (p + 1) * height], rows, strict=True):
                    for j, total in enumerate(row):
                        factors = [(bits, self._weights(panel, g, j)) for g, bits in parts]
                        total.set(self._unit.dot_products_u8s8(total.value, factors))

        self._activations.for_groups(tile, first_row, height, step)
        return sums

    def _init(self, panel: Expr, row: Expr, vector: int) -> Expr:
        if self._unit.splits:
            return tir.broadcast(self._operands.init[row])
        start = panel * self._shape.columns + vector * LANES
        return load_lanes(self._operands.init, start, LANES, "int32")

    def _weights(self, panel: Expr, group: Expr, vector: int) -> Expr:
        start = self._weight_start(panel, group, vector)
        return self._operands.weights.vload([start], f"int8x{LANES * _QUAD}")

    def _weight_start(self, panel: Expr, group: Expr, vector: Expr) -> Expr:
        group_start = (panel * self._groups + group) * (self._shape.columns * _QUAD)
        return group_start + vector * (LANES * _QUAD)


def _vectors(columns: int) -> int:
    return -(-columns // LANES)


def _values(sums: Sequence[Register]) -> list[Expr]:
    return [register.value for register in sums]


def _spill(sums: Sequence[Sequence[Register]], memory: Expr) -> None:
    flat = [register for row in sums for register in row]
    for i, register in enumerate(flat):
        tir.store(memory, register.value, tir.lanes(i * LANES))


def _spilled(memory: Expr, row: Expr, vectors: int) -> list[Expr]:
    return [load_lanes(memory, (row * vectors + j) * LANES, LANES, "int32") for j in range(vectors)]


def qmatmul_function(region: Region, isa: Isa = AVX512_VNNI) -> Any:
    """The TIR of a region of `QMatMulW8A8`, `QMatMulU8S8` or `QMatMulU8U8` for an instruction set.

    `void f(const uint8_t *q, const float *s, const int8_t *weights, const int32_t *init,
    const float *ws, const float *extra..., float *y, int32_t rows, int32_t panel_begin,
    int32_t panel_end)`, where `ws` is padded to whole panels like `init`, and neither the rows nor
    the range of panels is empty; `s` has a value per row, or one in all (U8S8, U8U8).  The arrays
    of `Excess` follow `init` where rows are split, and those of `differences` follow `ws`, as
    `const int32_t *`.  A region of several results stores those of one per call, in `y`, and takes
    that one's width and first column, `int32_t y_columns, int32_t y_first`, at the end.  Where the
    last step quantizes, `y` is `uint8_t *`.
    """
    k, n, unit = region.size("K"), region.size("N"), unit_of(isa)
    most, pairs = most_lacking(region.anchor, isa), differences(region, isa)
    extra_count = len(region.extras)

    def body(q: Expr, s: Expr, weights: Expr, init: Expr, *rest: Expr) -> None:
        excess, rest = (Excess(rest[0], rest[1], rest[2], most), rest[3:]) if most else (None, rest)
        ws, rest = rest[0], rest[1:]
        subtracted, rest = rest[: len(pairs)], rest[len(pairs) :]
        extras, (y, rows, begin, end, *part) = rest[:extra_count], rest[extra_count:]
        results = Results(region, unit, s, ws, subtracted, extras, y, *(part or (n, 0)))
        operands = Operands(q, weights, init, rows, begin, end, excess)
        Loops(k, n, unit, isa, operands, results, results.ask).emit()

    return tir.function(
        [
            Parameter("q", "uint8"),
            Parameter("s", "float32"),
            Parameter("weights", "int8"),
            Parameter("init", "int32"),
            *(_EXCESS if most else ()),
            Parameter("ws", "float32"),
            *(Parameter(name, "int32") for name in pairs),
            *(Parameter(f"extra{i}", "float32") for i in range(extra_count)),
            Parameter("y", "uint8" if region.is_quantized else "float32"),
            *RANGE,
            *(PART if region.widths else ()),
        ],
        body,
    )


def accumulator_function(k: int, n: int, isa: Isa = AVX512_VNNI) -> Any:
    """The loops of W8A8 with the int32 sums as result, for tests and for timing the loops alone.

    `void f(const uint8_t *q, const int8_t *weights, const int32_t *init, int32_t *y, int32_t rows,
    int32_t panel_begin, int32_t panel_end)`, with the arrays of `Excess` after `init` where rows
    are split.
    """
    unit, most = unit_of(isa), most_lacking("QMatMulW8A8", isa)

    def body(q: Expr, weights: Expr, init: Expr, *rest: Expr) -> None:
        *lacking, y, rows, begin, end = rest
        excess = Excess(lacking[0], lacking[1], lacking[2], most) if most else None

        def finish(sums: Sequence[Expr], row: Expr, first_column: Expr, columns: int) -> None:
            for index, total in enumerate(sums):
                start = row * n + first_column + index * LANES
                store_lanes(y, total, start, min(LANES, columns - index * LANES), "int32")

        operands = Operands(q, weights, init, rows, begin, end, excess)
        Loops(k, n, unit, isa, operands, finish).emit()

    pointers = [
        Parameter("q", "uint8"),
        Parameter("weights", "int8"),
        Parameter("init", "int32"),
        *(_EXCESS if most else ()),
        Parameter("y", "int32"),
    ]
    return tir.function([*pointers, *RANGE], body)


RANGE = tuple(
    Parameter(name, "int32", is_pointer=False) for name in ("rows", "panel_begin", "panel_end")
)
PART = tuple(Parameter(name, "int32", is_pointer=False) for name in ("y_columns", "y_first"))

_EXCESS = (
    Parameter("counts", "int32"),
    Parameter("groups", "uint16"),
    Parameter("values", "int32"),
)

"""From the int32 sums of a product to what is stored: scales, and the epilogue of its region."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qcompiler.ir.region import Region
from qcompiler.targets import tir
from qcompiler.targets.epilogue import apply_steps
from qcompiler.targets.tir import LANES, Expr
from qcompiler.targets.x86.vector import VectorUnit, load_lanes, store_lanes

__all__ = ["Results"]


@dataclasses.dataclass(frozen=True)
class Results:
    """Turns sums of a row into y and stores it.

    Attributes:
        s: A scale per row, or one in all.
        ws: A scale per column.
        subtracted: The arrays of `differences`.
        extras: The operands of the epilogue.
        y: Where results go.
        y_columns: The width of y.
        y_first: The first column that is stored in it.
    """

    region: Region
    unit: VectorUnit
    s: Expr
    ws: Expr
    subtracted: Sequence[Expr]
    extras: Sequence[Expr]
    y: Expr
    y_columns: Expr | int
    y_first: Expr | int

    def __call__(self, sums: Sequence[Expr], row: Expr, first_column: Expr, columns: int) -> None:
        """Store one row's columns from the first on, of which so many exist; 16 in each sum."""
        for index, total in enumerate(sums):
            column = first_column + index * LANES
            count = min(LANES, columns - index * LANES)
            result = apply_steps(
                self.unit, self.region, self._product(total, row, column),
                self._operands(row, column, count),
            )  # fmt: skip
            y_type = "float32"
            if self.region.is_quantized:
                result, y_type = tir.cast("uint8x16", self.unit.round_to_int32(result)), "uint8"
            start = row * self.y_columns + (column - self.y_first)
            store_lanes(self.y, result, start, count, y_type)

    def ask(self, row: Expr, first_column: Expr, columns: int) -> None:
        """Ask memory for the operands of a part of one row, long before they are needed."""
        for extra, kind in zip(self.extras, self.region.extras, strict=True):
            for column in range(0, columns if kind != "channel" else 0, LANES):
                start = row * self.region.size("N") + first_column + column
                tir.prefetch_to_l1(extra, start)

    def _product(self, total: Expr, row: Expr, column: Expr) -> Expr:
        for of_row, of_column in zip(self.subtracted[::2], self.subtracted[1::2], strict=True):
            factors = load_lanes(of_column, column, LANES, "int32")
            total = total - tir.broadcast(of_row[row]) * factors
        s = self.s[row if self.region.anchor == "QMatMulW8A8" else 0]
        return tir.cast("float32x16", total) * (
            tir.broadcast(s) * load_lanes(self.ws, column, LANES)
        )

    def _operands(self, row: Expr, column: Expr, count: int) -> list[Expr]:
        n = self.region.size("N")
        return [
            load_lanes(extra, column if kind == "channel" else row * n + column, count)
            for extra, kind in zip(self.extras, self.region.extras, strict=True)
        ]

"""How a tile reads its activations: four elements of K at a time, as an int32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from qcompiler.targets import tir
from qcompiler.targets.tir import Expr, Register

__all__ = ["ByteRows", "Emit", "Excess", "Part", "SplitRows"]

Part = tuple[Expr, Expr]
"""A group of elements of K: its number, and the bits of a row's."""

Emit = Callable[[Sequence[Sequence[Part]]], None]
"""Emits the products of the parts of each row, whose sum is added to the row's."""

_QUAD = 4


class ByteRows:
    """Rows of uint8, four elements at a time, from where they are."""

    def __init__(self, q: Expr, k: int) -> None:
        self._q, self._k = q, k

    def for_groups(self, tile: Expr, first_row: Expr, rows: int, emit: Emit) -> None:
        """Call `emit` for each four elements of K."""
        whole, rest = divmod(self._k, _QUAD)

        def quads(quad: Expr, width: int) -> list[list[Part]]:
            return [[(quad, self._bits(first_row + i, quad, width))] for i in range(rows)]

        with tir.loop(0, whole) as quad:
            emit(quads(quad, _QUAD))
        if rest:
            emit(quads(whole, rest))

    def _bits(self, row: Expr, quad: Expr, width: int) -> Expr:
        """`width` activations as the bytes of an int32; those past the end of K are zero."""
        start = row * self._k + quad * _QUAD
        if width == _QUAD:
            return tir.reinterpret("int32", self._q.vload([start], "uint8x4"))
        first, *others = (tir.cast("int32", self._q[start + i]) << (8 * i) for i in range(width))
        return sum(others, first)


@dataclasses.dataclass(frozen=True)
class Excess:
    """What `SplitRows` lack, by tile: so many numbers of each row, those of an index side by side.

    Attributes:
        counts: How many of each row, [tile].
        groups: Where, as uint16, [tile][most * ceil(ceil(K/4) / 2)][rows of a tile].
        values: What, four int8, of the same shape.
        most: How many numbers two groups may lack.
    """

    counts: Expr
    groups: Expr
    values: Expr
    most: int


class SplitRows:
    """Rows of int8, eight elements at a time, in fours that vpmaddubsw and vpaddw do not saturate.

    Four products of a uint8 and an int8 fit an int16 if neither the positive of the int8 add up to
    more than 128, nor the negative.  From the few fours beyond, native/split_rows.c takes what is
    too much, to be multiplied once more with the same weights.  They are less their zero point, or
    another number.  Rows are whole groups long, with zeros at the end.
    """

    def __init__(self, q: Expr, k: int, rows: int, excess: Excess) -> None:
        self._q, self._groups, self._most, self._excess = q, -(-k // _QUAD), rows, excess

    def for_groups(self, tile: Expr, first_row: Expr, rows: int, emit: Emit) -> None:
        """Call `emit` for each two groups, for the last of an odd number, for what is lacking."""

        def parts(*groups: Expr) -> list[list[Part]]:
            return [[(group, self._bits(first_row + i, group)) for group in groups]
                    for i in range(rows)]  # fmt: skip

        with tir.loop(0, self._groups // 2) as two:
            emit(parts(two * 2, two * 2 + 1))
        if self._groups % 2:
            emit(parts(tir.constant(self._groups - 1, "int32")))
        excess = self._excess
        most_lacking = excess.most * -(-self._groups // 2)
        with tir.loop(0, excess.counts[tile]) as index:
            start = Register("int32", (tile * most_lacking + index) * self._most, 1)
            places = [start.value + i for i in range(rows)]
            emit([[(tir.cast("int32", excess.groups[i]), excess.values[i])] for i in places])

    def _bits(self, row: Expr, group: Expr) -> Expr:
        start = (row * self._groups + group) * _QUAD
        return tir.reinterpret("int32", self._q.vload([start], "uint8x4"))

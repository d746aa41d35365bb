"""Activations as int16, for instruction sets that multiply no bytes exactly.

vpmaddwd takes pairs of int16.  Widened where they are multiplied, activations would cost one
instruction for every four of the products; here a tile's are widened once for all its columns, a
part of K at a time, so that they stay in L1 for rows of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Register

__all__ = ["WidenedRows"]

_PAIR = 2
_CHUNK = 512
"""Elements of K at a time: 6 KiB for six rows."""


class WidenedRows:
    """The rows of a tile of `q`, whose rows have `k` elements."""

    def __init__(self, q: Expr, k: int, rows: int) -> None:
        self._q, self._k = q, k
        self._chunk = min(_CHUNK, -(-k // LANES) * LANES)
        self._wide = tir.scratch("uint16", rows * self._chunk)

    def for_pairs(
        self, first_row: Expr, rows: int, emit: Callable[[Expr, Sequence[Expr]], None]
    ) -> None:
        """`emit(pair, activations)` for each two elements of K: their bits, of each of the rows."""
        with tir.loop(0, -(-self._k // self._chunk)) as chunk:
            first = Register("int32", chunk * self._chunk, 1)
            count = Register("int32", tir.minimum(self._k - first.value, self._chunk), 1)
            # A loop of the compiled program, or LLVM unrolls it to more code than all the rest.
            with tir.loop(0, rows) as i:
                start = Register("int32", (first_row + i) * self._k + first.value, 1)
                self._widen(i * self._chunk, start.value, count.value)
            with tir.loop(0, (count.value + 1) // _PAIR) as pair:
                activations = [self._bits(i * self._chunk + pair * _PAIR) for i in range(rows)]
                emit(first.value // _PAIR + pair, activations)

    def _widen(self, target: Expr, start: Expr, count: Expr) -> None:
        with tir.loop(0, count // LANES) as group:
            values = self._q.vload([start + group * LANES], f"uint8x{LANES}")
            tir.store(
                self._wide, tir.cast(f"uint16x{LANES}", values), tir.lanes(target + group * LANES)
            )
        if self._k % LANES:
            with tir.loop((count // LANES) * LANES, count) as i:
                tir.store(self._wide, tir.cast("uint16", self._q[start + i]), target + i)
        if self._k % _PAIR:
            # What the last weights, which are zeros, are multiplied by; any number would do.
            tir.store(self._wide, tir.constant(0, "uint16"), target + count)

    def _bits(self, index: Expr) -> Expr:
        return tir.reinterpret("int32", self._wide.vload([index], "uint16x2"))

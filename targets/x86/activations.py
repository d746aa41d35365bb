"""How a tile reads its activations: `depth` elements of K of each row at a time, as an int32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Register

__all__ = ["ByteRows", "Emit", "WidenedRows"]

Emit = Callable[[Expr, Sequence[Expr]], None]
"""Emits the code for one group of elements: (its number; its bits, of each row)."""

_QUAD, _PAIR = 4, 2

_CHUNK = 512
"""Elements of K that are widened at a time: 1 KiB a row."""


class ByteRows:
    """Rows of uint8, four elements at a time, from where they are."""

    def __init__(self, q: Expr, k: int, rows: int) -> None:
        self._q, self._k = q, k

    def for_groups(self, first_row: Expr, rows: int, emit: Emit) -> None:
        """Call `emit` for each four elements of K."""
        whole, rest = divmod(self._k, _QUAD)

        def quads(quad: Expr, width: int) -> list[Expr]:
            return [self._bits(first_row + i, quad, width) for i in range(rows)]

        with tir.loop(0, whole) as quad:
            emit(quad, quads(quad, _QUAD))
        if rest:
            emit(whole, quads(whole, rest))

    def _bits(self, row: Expr, quad: Expr, width: int) -> Expr:
        """`width` activations as the bytes of an int32; those past the end of K are zero."""
        start = row * self._k + quad * _QUAD
        if width == _QUAD:
            return tir.reinterpret("int32", self._q.vload([start], "uint8x4"))
        first, *others = (tir.cast("int32", self._q[start + i]) << (8 * i) for i in range(width))
        return sum(others, first)


class WidenedRows:
    """Rows as uint16, two elements at a time, for vpmaddwd.

    Widened where they are multiplied, they would cost an instruction for every four of products;
    here a tile's are widened once for all its columns, a part of K at a time, so that they stay in
    L1 for rows of any length.
    """

    def __init__(self, q: Expr, k: int, rows: int) -> None:
        self._q, self._k = q, k
        self._chunk = min(_CHUNK, -(-k // LANES) * LANES)
        self._wide = tir.scratch("uint16", rows * self._chunk)

    def for_groups(self, first_row: Expr, rows: int, emit: Emit) -> None:
        """Call `emit` for each two elements of K."""
        with tir.loop(0, -(-self._k // self._chunk)) as chunk:
            first = Register("int32", chunk * self._chunk, 1)
            count = Register("int32", tir.minimum(self._k - first.value, self._chunk), 1)
            # A loop of the compiled program, or LLVM unrolls it to more code than all the rest.
            with tir.loop(0, rows) as i:
                start = Register("int32", (first_row + i) * self._k + first.value, 1)
                self._widen(i * self._chunk, start.value, count.value)
            with tir.loop(0, (count.value + 1) // _PAIR) as pair:
                pairs = [self._bits(i * self._chunk + pair * _PAIR) for i in range(rows)]
                emit(first.value // _PAIR + pair, pairs)

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
            with tir.when(count % _PAIR != 0):
                tir.store(self._wide, tir.constant(0, "uint16"), target + count)

    def _bits(self, index: Expr) -> Expr:
        return tir.reinterpret("int32", self._wide.vload([index], "uint16x2"))

"""Attention of a single row of queries, as when one token is decoded, in float32.

It reads each key and value once, so it takes them from where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Register
from qcompiler.targets.x86.attention_shape import PANEL
from qcompiler.targets.x86.running_softmax import LOWEST, RunningSoftmax
from qcompiler.targets.x86.vector import fma, load_lanes, sums_of

__all__ = ["SingleRow", "row_starts"]


def row_starts(stride: Expr, first: Expr, count: Expr, group: Expr) -> list[Register]:
    """Where 16 of `count` rows from the `first` on lie; those after the last are the last."""
    rows = [tir.minimum(group * LANES + i, count - 1) for i in range(LANES)]
    return [Register("int32", (first + row) * stride, 1) for row in rows]


class SingleRow:
    """Emits what a block of keys adds to row 0, whose mask is filled in."""

    def __init__(self, d: int, arguments: Mapping[str, Expr], softmax: RunningSoftmax) -> None:
        self._d, self._a, self._softmax = d, arguments, softmax
        self._q = tir.scratch("float32", -(-d // LANES) * LANES)

    def emit(self, first: Expr, count: Expr) -> None:
        """Keys [first, first + count)."""
        row = tir.constant(0, "int32")
        scale = tir.broadcast(self._a["scale"])
        for chunk in range(0, self._d, LANES):
            values = load_lanes(self._a["q"], chunk, min(LANES, self._d - chunk))
            tir.store(self._q, values * scale, tir.lanes(chunk))
        top = Register("float32", tir.broadcast(LOWEST))
        with tir.loop(0, (count + (PANEL - 1)) // PANEL * (PANEL // LANES)) as group:
            products = self._products(row_starts(self._a["k_stride"], first, count, group))
            mask = load_lanes(self._softmax.masks, group * LANES, LANES)
            self._softmax.add_scores(0, group * LANES, sums_of(products) + mask, top)
        (kept,) = self._softmax.weigh([top], row, count, packed=False)
        for chunk in range(0, self._d, 4 * LANES):
            widths = [min(LANES, self._d - i) for i in range(chunk, self._d, LANES)][:4]
            for u, total in enumerate(self._weigh(chunk, widths, first, count)):
                self._softmax.add_context(row, chunk + u * LANES, kept, total.value)

    def _products(self, starts: Sequence[Register]) -> list[Register]:
        """Query times each of 16 keys, per lane."""
        sums = _zeros(LANES)

        def step(chunk: Expr, width: int) -> None:
            query = Register("float32", load_lanes(self._q, chunk, LANES))
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
        partial, unrolled = [_zeros(len(widths)) for _ in range(4)], count // 4

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


def _zeros(count: int) -> list[Register]:
    return [Register("float32", tir.broadcast(0.0)) for _ in range(count)]

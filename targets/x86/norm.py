"""LayerNorm and RMSNorm with what surrounds them: the residual before, the quantization after.

    x = a + b
    y = (c - mean(c)) / sqrt(mean(c^2) - mean(c)^2 + epsilon) gamma + beta,  c = x - mean(x)
    y = x / sqrt(mean(x^2) + epsilon) gamma                                      (RMSNorm)
    q, s = Quantize(y), or Quantize(y smoothing) with one factor per channel

A row is read once from memory and swept three times in L1; nothing is kept on a stack.  A sum that
a later sweep needs waits in x where that is an output, else in y before y itself; where neither is,
it is added again.

The variance is mean(x^2) - mean(x)^2 from the first sweep where the mean is less than half of the
deviation, so that nothing cancels.  Other rows get another sweep, which sums up c and c^2.  Their
mean(c) would be 0 but for rounding: taking it out once more makes rows whose mean is thousands of
times their deviation as exact as all others.

Where squares leave float32, for values about 1e19 and above, y is beta (0 for RMSNorm), as in ONNX
Runtime; where the sum of a row does, it is NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from qcompiler.ir.dialect import SMALLEST_MAGNITUDE
from qcompiler.ir.region import Region
from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Parameter, Register
from qcompiler.targets.x86.families import norm_operands
from qcompiler.targets.x86.isa import AVX512_VNNI, Isa
from qcompiler.targets.x86.norm_rows import (
    Chains,
    Row,
    Sums,
    averages,
    negative,
    one_is_less,
    reciprocal_deviations,
    spread,
    variances,
)
from qcompiler.targets.x86.quantize import (
    FastQuotient,
    QuantizedRow,
    quantize_rows,
    scale_rows,
    sweep,
    sweep_chunks,
)
from qcompiler.targets.x86.units import unit_of
from qcompiler.targets.x86.vector import first_lanes, fma, load_lanes, store_lanes

__all__ = ["norm_function"]

_GROUPED_ELEMENTS = 1536
"""Rows are taken several at a time while they have no more elements than this: the reductions and
roots of one are latency that the others fill, and they share the loads of gamma and beta."""

_LONGEST_PREFETCHED_ROW = 1536
"""Of longer rows, two with their operands fill an L1: fetching the next would drive out those at
work, and the hardware's own prefetching is better."""

_LONGEST_ROW_IN_L1 = 2048
"""Longer ones are taken two at a time, since gamma and beta come from an L2 each time."""

_MOST_ROWS = 4

_MOST_CHAINS = 4
"""Accumulators per row; with those of the other rows, 4 to 8 hide the 4 cycles of an addition."""

_VECTORS_PER_CHAIN = 4
"""Of the registers: two sums, and what is added to them.  Of 16 ymm a vector takes two: that leaves
two accumulators for all rows, and more would be spilled."""

_LEAST_DEVIATION = 2.0
"""Times the mean: below that a row takes a sweep of its own for its variance."""


def norm_function(region: Region, isa: Isa = AVX512_VNNI) -> Any:
    """The TIR of `void f(norm_operands(region)..., int32_t rows)`, rows of K."""
    names = norm_operands(region)
    pointers = [Parameter(name, "uint8" if name == "q" else "float32") for name in names]

    def body(*arguments: Expr) -> None:
        _Norm(region, isa, dict(zip(names, arguments[:-1], strict=True))).emit(arguments[-1])

    return tir.function([*pointers, Parameter("rows", "int32", is_pointer=False)], body)


class _Norm:
    """Emits the code for groups of rows; each sweep over all of them before the next."""

    def __init__(self, region: Region, isa: Isa, arrays: dict[str, Expr]) -> None:
        self._unit = unit_of(isa)
        self._k = region.size("K")
        self._most_chains = isa.vectors // _VECTORS_PER_CHAIN
        grouped = 2 if self._k > _LONGEST_ROW_IN_L1 else _GROUPED_ELEMENTS // self._k
        self._group = max(1, min(_MOST_ROWS, self._most_chains, grouped))
        self._arrays = arrays
        self._centred = "beta" in arrays
        self._residual = "a" in arrays
        self._epsilon = region.number("epsilon")
        self._waiting = "x" if "x" in arrays else "y" if "y" in arrays else ""

    def emit(self, rows: Expr) -> None:
        """The code for so many rows: groups of them, and those left over one by one."""
        grouped = tir.constant(0, "int32")
        if self._group > 1:
            groups = Register("int32", rows // self._group, 1)
            self._emit_groups(grouped, groups.value, self._group)
            grouped = groups.value * self._group
        self._emit_groups(grouped, rows - grouped, 1)

    def _emit_groups(self, first: Expr, count: Expr, size: int) -> None:
        """`count` groups of `size` rows, from `first` on."""
        chains = min(_MOST_CHAINS, self._most_chains // size)
        with tir.when(count > 0):
            rows = self._rows(first, size)
            sums = [Sums(chains, self._centred) for _ in rows]
            self._sum_up(rows, sums, chains)
            with tir.loop(0, count) as index:
                row = first + index * size
                rows = self._rows(row, size)
                if {"y", "q"} & self._arrays.keys():
                    self._measure(rows, sums, chains)
                    self._store_y(rows, chains)
                quantized = self._quantized(rows, row)
                for own in sums:
                    own.reset()
                with tir.when(index + 1 < count):
                    self._go_on(quantized, self._rows(row + size, size), sums, chains)
                if quantized:
                    with tir.when(index + 1 >= count):
                        quantize_rows(quantized, self._k)

    def _rows(self, first: Expr, count: int) -> list[Row]:
        return [Row((first + i) * self._k) for i in range(count)]

    def _sum_up(self, rows: Sequence[Row], sums: Sequence[Sums], chains: int) -> None:
        def update(offset: Expr, count: int, chain: int) -> None:
            for row, own in zip(rows, sums, strict=True):
                self._keep(row, offset, count, self._add(row, own, offset, count, chain))

        sweep(self._k, chains, update)

    def _add(self, row: Row, sums: Sums, offset: Expr, count: int, chain: int) -> Register:
        """Some lanes of the norm's operand, counted in."""
        x = Register("float32", self._sum(row, offset, count))
        sums.add(chain, x.value)
        return x

    def _keep(self, row: Row, offset: Expr, count: int, x: Register) -> None:
        """Store what was added, where there is an array for it."""
        if self._residual and self._waiting:
            store_lanes(self._arrays[self._waiting], x.value, row.start + offset, count)

    def _go_on(
        self,
        quantized: Sequence[QuantizedRow],
        following: Sequence[Row],
        sums: Sequence[Sums],
        chains: int,
    ) -> None:
        """Quantizes rows beside the sums of those that follow, which come from memory meanwhile.

        All is read before anything is stored: rows of 1024 are 4 KiB apart, and a load waits for a
        store before it whose address has the same last 12 bits.
        """
        if not quantized:
            self._sum_up(following, sums, chains)
            return

        def both(offset: Expr, count: int) -> None:
            for row, own, one in zip(following, sums, quantized, strict=True):
                # The chains of `sweep`, so that the first row is summed up as all others are.
                chain = offset // LANES if isinstance(offset, int) else 0
                parts = [(offset + at, min(LANES, count - at)) for at in range(0, count, LANES)]
                added = [self._add(row, own, *part, chain + i) for i, part in enumerate(parts)]
                one.store(offset, count)
                for part, x in zip(parts, added, strict=True):
                    self._keep(row, *part, x)

        sweep_chunks(self._k, both)

    def _measure(self, rows: Sequence[Row], sums: Sequence[Sums], chains: int) -> None:
        """Sets factor of every row, and for LayerNorm mean and offset."""
        square = Register("float32", averages([own.squares for own in sums], self._k))
        if not self._centred:
            spread(reciprocal_deviations(self._unit, square.value, self._epsilon), rows, "factor")
            return
        mean = Register("float32", averages([own.values for own in sums], self._k))
        spread(mean, rows, "mean")
        variance = variances(square, mean)
        offset = Register("float32", tir.broadcast(0.0))
        bound = Register("float32", mean.value * mean.value * tir.broadcast(_LEAST_DEVIATION**2))
        with tir.when(one_is_less(variance, bound, len(rows))):
            self._deviate(rows, chains, bound.value, variance, offset)
        positive = tir.maximum(tir.broadcast(0.0), variance.value)
        factor = reciprocal_deviations(self._unit, positive, self._epsilon)
        spread(factor, rows, "factor")
        spread(Register("float32", offset.value * factor.value), rows, "offset")

    def _deviate(
        self, rows: Sequence[Row], chains: int, bound: Expr, variance: Register, offset: Register
    ) -> None:
        """Of rows that are off centre, the variance of deviations, and what is left of their mean.

        The others keep theirs, lest numbers of a row depend on its neighbours.
        """
        totals = [Sums(chains, is_centred=True) for _ in rows]

        def update(at: Expr, count: int, chain: int) -> None:
            for row, own in zip(rows, totals, strict=True):
                c = first_lanes(self._deviation(row, at, count), count)
                own.add(chain, Register("float32", c).value)

        sweep(self._k, chains, update)
        deviation = Register("float32", averages([own.values for own in totals], self._k))
        left = Register("float32", negative(deviation.value))
        square = averages([own.squares for own in totals], self._k)
        # One fma: of huge rows inf - inf would be NaN, of which a maximum would make 0.
        exact = Register("float32", fma(left.value, deviation.value, square))
        is_centred = variance.value >= bound
        offset.set(tir.select(is_centred, offset.value, left.value))
        variance.set(tir.select(is_centred, variance.value, exact.value))

    def _store_y(self, rows: Sequence[Row], chains: int) -> None:
        """Stores y where it is an output; sets `top` of every row where it is to be quantized."""
        tops = [Chains(chains, SMALLEST_MAGNITUDE) for _ in rows]

        def update(offset: Expr, count: int, chain: int) -> None:
            for row, top in zip(rows, tops, strict=True):
                self._prefetch(row, offset, len(rows))
                y = Register("float32", self._normalized(row, offset, count)).value
                if "y" in self._arrays:
                    store_lanes(self._arrays["y"], y, row.start + offset, count)
                if "q" in self._arrays:
                    z = self._smoothed(y, offset, count)
                    top.update(chain, functools.partial(self._unit.larger_magnitude, z))

        sweep(self._k, chains, update)
        if "q" in self._arrays:
            for row, top in zip(rows, tops, strict=True):
                row.top = Register("float32", top.combine(tir.maximum))

    def _quantized(self, rows: Sequence[Row], first: Expr) -> list[QuantizedRow]:
        """The same rows with their scales, which are stored; none if there is no q."""
        if "q" not in self._arrays:
            return []
        values = [functools.partial(self._result, row) for row in rows]
        tops = [row.top for row in rows if row.top is not None]
        numbers = [first + i for i in range(len(rows))]
        q, s = self._arrays["q"], self._arrays["s"]
        return scale_rows(self._unit, values, tops, q, s, numbers, self._k, FastQuotient)

    def _sum(self, row: Row, offset: Expr, count: int) -> Expr:
        """The norm's operand, from its inputs."""
        at = row.start + offset
        if not self._residual:
            return load_lanes(self._arrays["x"], at, count)
        return load_lanes(self._arrays["a"], at, count) + load_lanes(self._arrays["b"], at, count)

    def _deviation(self, row: Row, offset: Expr, count: int) -> Expr:
        """The norm's operand once more, less its mean."""
        if self._residual and self._waiting:
            x = load_lanes(self._arrays[self._waiting], row.start + offset, count)
        else:
            x = self._sum(row, offset, count)
        return x - row.mean.value if row.mean is not None else x

    def _normalized(self, row: Row, offset: Expr, count: int) -> Expr:
        """Y, from the norm's operand."""
        assert row.factor is not None
        c = self._deviation(row, offset, count)
        gamma = load_lanes(self._arrays["gamma"], offset, count)
        if row.offset is None:
            return c * row.factor.value * gamma
        beta = load_lanes(self._arrays["beta"], offset, count)
        return fma(fma(c, row.factor.value, row.offset.value), gamma, beta)

    def _result(self, row: Row, offset: Expr, count: int) -> Expr:
        """What is quantized, from y once more."""
        if "y" in self._arrays:
            y = load_lanes(self._arrays["y"], row.start + offset, count)
        else:
            y = self._normalized(row, offset, count)
        return self._smoothed(y, offset, count)

    def _smoothed(self, y: Expr, offset: Expr, count: int) -> Expr:
        if "smoothing" not in self._arrays:
            return y
        smoothing = load_lanes(self._arrays["smoothing"], offset, count)
        return Register("float32", y * smoothing).value

    def _prefetch(self, row: Row, offset: Expr, group: int) -> None:
        """Fetch the operands of the rows that follow; asking for where y goes as well is slower."""
        if self._residual and self._k <= _LONGEST_PREFETCHED_ROW:
            for name in ("a", "b"):
                tir.prefetch_to_l1(self._arrays[name], row.start + offset + group * self._k)

"""LayerNorm and RMSNorm with what surrounds them: the residual before, the quantization after.

    x = a + b
    y = (c - mean(c)) / sqrt(mean(c^2) - mean(c)^2 + epsilon) gamma + beta,  c = x - mean(x)
    y = x / sqrt(mean(x^2) + epsilon) gamma                                      (RMSNorm)
    q, s = Quantize(y), or Quantize(y smoothing) with one factor per channel

A row is read once from memory and swept three or four times in L1; nothing is kept on a stack.  A
sum that a later sweep needs waits in x where that is an output, else in y before y itself; where
neither is, it is added again.

mean(c) would be 0 but for rounding.  Taking it out once more makes rows whose mean is thousands of
times their deviation as exact as all others, for one addition per vector.

Where squares leave float32, for values about 1e19 and above, y is beta (0 for RMSNorm), as in ONNX
Runtime; where the sum of a row does, it is NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from qcompiler.ir.dialect import SMALLEST_MAGNITUDE
from qcompiler.ir.region import Region
from qcompiler.targets import tir
from qcompiler.targets.tir import Expr, Parameter, Register
from qcompiler.targets.x86.families import norm_operands
from qcompiler.targets.x86.isa import AVX512_VNNI, Isa
from qcompiler.targets.x86.quantize import for_rows, quantize_rows, sweep
from qcompiler.targets.x86.units import unit_of
from qcompiler.targets.x86.vector import (
    all_lanes_max,
    all_lanes_sum,
    first_lanes,
    fma,
    load_lanes,
    store_lanes,
)

__all__ = ["norm_function"]

_GROUPED_ELEMENTS = 1536
"""Rows are taken several at a time while they have no more elements than this: the reductions and
roots of one are latency that the others fill, and they share the loads of gamma and beta."""

_LONGEST_PREFETCHED_ROW = 2048
"""The operands and results of longer rows are more than half of an L1: fetching the next ones would
drive out those at work, and the hardware's own prefetching is better."""

_MOST_ROWS = 4

_MOST_CHAINS = 4
"""Accumulators per row; with those of the other rows, 4 to 8 hide the 4 cycles of an addition."""

_VECTORS_PER_CHAIN = 4
"""Of the registers: two sums, and what is added to them.  Of 16 ymm a vector takes two: that leaves
two accumulators for all rows, and more would be spilled."""

_LARGEST = 3e38
"""Bound of a variance, so that an estimate of its root can be refined."""


def norm_function(region: Region, isa: Isa = AVX512_VNNI) -> Any:
    """The TIR of `void f(norm_operands(region)..., int32_t rows)`, rows of K."""
    names = norm_operands(region)
    pointers = [Parameter(name, "uint8" if name == "q" else "float32") for name in names]

    def body(*arguments: Expr) -> None:
        norm = _Norm(region, isa, dict(zip(names, arguments[:-1], strict=True)))
        for_rows(arguments[-1], norm.group, norm.emit)

    return tir.function([*pointers, Parameter("rows", "int32", is_pointer=False)], body)


class _Chains:
    """Accumulators of one row, kept apart because each waits for its own last addition."""

    def __init__(self, count: int, init: float = 0.0) -> None:
        self._parts = [Register("float32", tir.broadcast(init)) for _ in range(count)]

    def update(self, chain: int, change: Callable[[Expr], Expr]) -> None:
        """Replace one accumulator by a function of it."""
        self._parts[chain].set(change(self._parts[chain].value))

    def combine(self, operation: Callable[[Expr, Expr], Expr]) -> Expr:
        """One vector of all."""
        return functools.reduce(operation, [part.value for part in self._parts])


@dataclasses.dataclass
class _Row:
    """What is known of a row so far; every register has its value in all lanes."""

    start: Expr
    mean: Register | None = None
    """None for RMSNorm."""
    factor: Register | None = None
    offset: Register | None = None
    """y = (c * factor + offset) * gamma + beta."""
    amax: Register | None = None


class _Norm:
    """Emits the code for some rows; each sweep over all of them before the next."""

    def __init__(self, region: Region, isa: Isa, arrays: dict[str, Expr]) -> None:
        self._unit = unit_of(isa)
        self._k = region.size("K")
        self._chains = isa.vectors // _VECTORS_PER_CHAIN
        self.group = max(1, min(_MOST_ROWS, self._chains, _GROUPED_ELEMENTS // self._k))
        self._arrays = arrays
        self._centred = "beta" in arrays
        self._residual = "a" in arrays
        self._epsilon = region.number("epsilon")
        self._waiting = "x" if "x" in arrays else "y" if "y" in arrays else ""
        self._ahead = self._plan_prefetches(region)

    def emit(self, rows: Sequence[Expr]) -> None:
        """The code for the given rows."""
        states = [_Row(row * self._k) for row in rows]
        chains = min(_MOST_CHAINS, self._chains // len(rows))
        self._sum_up(states, chains)
        if self._centred:
            self._deviate(states, chains)
        if {"y", "q"} & self._arrays.keys():
            self._store_y(states, chains)
        if "q" in self._arrays:
            values = [functools.partial(self._result, state) for state in states]
            amax = [state.amax for state in states if state.amax is not None]
            q, s = self._arrays["q"], self._arrays["s"]
            quantize_rows(self._unit, values, amax, q, s, rows, self._k)

    def _sum_up(self, rows: Sequence[_Row], chains: int) -> None:
        """Sets the mean of every row, or for RMSNorm its factor."""
        totals = [_Chains(chains) for _ in rows]

        def update(offset: Expr, count: int, chain: int) -> None:
            for row, total in zip(rows, totals, strict=True):
                self._prefetch("sum", row, offset)
                x = Register("float32", self._sum(row, offset, count)).value
                if self._residual and self._waiting:
                    store_lanes(self._arrays[self._waiting], x, row.start + offset, count)
                term = functools.partial(fma, x, x) if not self._centred else x.__add__
                total.update(chain, term)

        sweep(self._k, chains, update)
        for row, total in zip(rows, totals, strict=True):
            average = self._average(total)
            if self._centred:
                row.mean = Register("float32", average)
            else:
                row.factor = self._factor(average)

    def _deviate(self, rows: Sequence[_Row], chains: int) -> None:
        """Sets factor and offset of every row of a LayerNorm."""
        totals = [(_Chains(chains), _Chains(chains)) for _ in rows]

        def update(offset: Expr, count: int, chain: int) -> None:
            for row, (deviations, squares) in zip(rows, totals, strict=True):
                self._prefetch("deviate", row, offset)
                c = first_lanes(self._deviation(row, offset, count), count)
                c = Register("float32", c).value
                deviations.update(chain, c.__add__)
                squares.update(chain, functools.partial(fma, c, c))

        sweep(self._k, chains, update)
        for row, (deviations, squares) in zip(rows, totals, strict=True):
            rest = Register("float32", self._average(deviations)).value
            # One fma: of huge rows inf - inf would be NaN, of which a maximum would make 0.
            variance = fma(tir.broadcast(0.0) - rest, rest, self._average(squares))
            row.factor = self._factor(tir.maximum(tir.broadcast(0.0), variance))
            row.offset = Register("float32", (tir.broadcast(0.0) - rest) * row.factor.value)

    def _store_y(self, rows: Sequence[_Row], chains: int) -> None:
        """Stores y where it is an output; sets amax of every row where it is to be quantized."""
        tops = [_Chains(chains, SMALLEST_MAGNITUDE) for _ in rows]

        def update(offset: Expr, count: int, chain: int) -> None:
            for row, top in zip(rows, tops, strict=True):
                self._prefetch("normalize", row, offset)
                y = Register("float32", self._normalized(row, offset, count)).value
                if "y" in self._arrays:
                    store_lanes(self._arrays["y"], y, row.start + offset, count)
                if "q" in self._arrays:
                    z = self._smoothed(y, offset, count)
                    top.update(chain, functools.partial(self._unit.larger_magnitude, z))

        sweep(self._k, chains, update)
        if "q" in self._arrays:
            for row, top in zip(rows, tops, strict=True):
                row.amax = Register("float32", all_lanes_max(top.combine(tir.maximum)))

    def _average(self, total: _Chains) -> Expr:
        return all_lanes_sum(total.combine(operator.add)) * tir.broadcast(1.0 / self._k)

    def _factor(self, variance: Expr) -> Register:
        above_zero = Register("float32", variance + tir.broadcast(self._epsilon))
        largest = tir.broadcast(_LARGEST)
        # In this order a NaN stays: the second operand is taken if the comparison fails.
        bounded = Register("float32", tir.minimum(largest, above_zero.value))
        factor = self._unit.reciprocal_root(bounded.value)
        return Register(
            "float32", tir.select(above_zero.value > largest, tir.broadcast(0.0), factor)
        )

    def _sum(self, row: _Row, offset: Expr, count: int) -> Expr:
        """The norm's operand, from its inputs."""
        at = row.start + offset
        if not self._residual:
            return load_lanes(self._arrays["x"], at, count)
        return load_lanes(self._arrays["a"], at, count) + load_lanes(self._arrays["b"], at, count)

    def _deviation(self, row: _Row, offset: Expr, count: int) -> Expr:
        """The norm's operand once more, less its mean."""
        if self._residual and self._waiting:
            x = load_lanes(self._arrays[self._waiting], row.start + offset, count)
        else:
            x = self._sum(row, offset, count)
        return x - row.mean.value if row.mean is not None else x

    def _normalized(self, row: _Row, offset: Expr, count: int) -> Expr:
        """Y, from the norm's operand."""
        assert row.factor is not None
        c = self._deviation(row, offset, count)
        gamma = load_lanes(self._arrays["gamma"], offset, count)
        if row.offset is None:
            return c * row.factor.value * gamma
        beta = load_lanes(self._arrays["beta"], offset, count)
        return fma(fma(c, row.factor.value, row.offset.value), gamma, beta)

    def _result(self, row: _Row, offset: Expr, count: int) -> Expr:
        """What is quantized, from y once more."""
        self._prefetch("quantize", row, offset)
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

    def _plan_prefetches(self, region: Region) -> dict[str, list[tuple[Expr, bool]]]:
        """Which arrays each sweep prefetches for the next rows, and whether they are written.

        Spread over the sweeps, because more at a time than an L1 can wait for stall it.
        """
        steps = [*(["deviate"] if self._centred else []), "normalize"]
        steps += [*(["quantize"] if "q" in self._arrays else []), "sum"]
        plan: dict[str, list[tuple[Expr, bool]]] = {step: [] for step in steps}
        if self._k <= _LONGEST_PREFETCHED_ROW:
            streams = [name for name in ("a", "b", "x", "y") if name in self._arrays]
            for step, name in zip(itertools.cycle(steps), streams, strict=False):
                plan[step].append((self._arrays[name], name in region.outputs))
        return plan

    def _prefetch(self, step: str, row: _Row, offset: Expr) -> None:
        for array, is_written in self._ahead[step]:
            at = row.start + offset + self.group * self._k
            tir.prefetch_to_l1(array, at, write=is_written)

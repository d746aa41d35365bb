"""What a norm finds out about its rows: their sums, and what follows from those."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

from qcompiler.targets import tir
from qcompiler.targets.tir import Expr, Register
from qcompiler.targets.x86.vector import VectorUnit, all_lanes, fma, sums_of

__all__ = [
    "Chains",
    "Row",
    "Sums",
    "averages",
    "negative",
    "one_is_less",
    "reciprocal_deviations",
    "spread",
    "variances",
]

_LARGEST = 3e38
"""Bound of a variance, so that an estimate of its root can be refined."""


class Chains:
    """Accumulators of one row, kept apart because each waits for its own last addition."""

    def __init__(self, count: int, init: float = 0.0) -> None:
        self._init = tir.broadcast(init)
        self._parts = [Register("float32", self._init) for _ in range(count)]

    def reset(self) -> None:
        """As they were at first."""
        for part in self._parts:
            part.set(self._init)

    def update(self, chain: int, change: Callable[[Expr], Expr]) -> None:
        """Replace one accumulator by a function of it; they are counted modulo their number."""
        part = self._parts[chain % len(self._parts)]
        part.set(change(part.value))

    def combine(self, operation: Callable[[Expr, Expr], Expr]) -> Expr:
        """One vector of all."""
        return functools.reduce(operation, [part.value for part in self._parts])


class Sums:
    """The sums of a row, where it `is_centred`, and those of its squares."""

    def __init__(self, chains: int, is_centred: bool) -> None:
        self.values = Chains(chains) if is_centred else None
        self.squares = Chains(chains)

    def reset(self) -> None:
        """Those of no elements."""
        self.squares.reset()
        if self.values is not None:
            self.values.reset()

    def add(self, chain: int, x: Expr) -> None:
        """Add a vector, which is a register's."""
        self.squares.update(chain, functools.partial(fma, x, x))
        if self.values is not None:
            self.values.update(chain, x.__add__)


@dataclasses.dataclass
class Row:
    """What is known of a row so far; every register has its value in all lanes."""

    start: Expr
    mean: Register | None = None
    """None for RMSNorm."""
    factor: Register | None = None
    offset: Register | None = None
    """y = (c * factor + offset) * gamma + beta."""
    top: Register | None = None
    """The largest magnitude of y in each lane."""


def spread(vector: Register, rows: Sequence[Row], name: str) -> None:
    """Gives each row its lane of `vector`, in all lanes."""
    for lane, row in enumerate(rows):
        setattr(row, name, Register("float32", all_lanes(vector.value, lane)))


def averages(totals: Sequence[Chains | None], k: int) -> Expr:
    """The averages of rows of `k`, a lane for each."""
    sums = [Register("float32", total.combine(operator.add)) for total in totals if total]
    return sums_of(sums) * tir.broadcast(1.0 / k)


def variances(squares: Register, means: Register) -> Register:
    """Those of rows, from their averages of squares and of values.

    -1, which makes a row be off centre, where squares left float32: those of deviations need not.
    """
    apart = fma(negative(means.value), means.value, squares.value)
    is_large = squares.value > tir.broadcast(_LARGEST)
    return Register("float32", tir.select(is_large, tir.broadcast(-1.0), apart))


def reciprocal_deviations(unit: VectorUnit, variances: Expr, epsilon: float) -> Register:
    """1 / sqrt(variance + epsilon), a lane for each row; 0 where that left float32."""
    above_zero = Register("float32", variances + tir.broadcast(epsilon))
    largest = tir.broadcast(_LARGEST)
    # In this order a NaN stays: the second operand is taken if the comparison fails.
    bounded = Register("float32", tir.minimum(largest, above_zero.value))
    factor = unit.reciprocal_root(bounded.value)
    return Register("float32", tir.select(above_zero.value > largest, tir.broadcast(0.0), factor))


def one_is_less(values: Register, bounds: Register, lanes: int) -> Expr:
    """Whether one of the first `lanes` is below its bound, or is NaN."""
    return tir.any_of([tir.negation(values.lane(i) >= bounds.lane(i)) for i in range(lanes)])


def negative(value: Expr) -> Expr:
    """-value; 0 for 0."""
    return tir.broadcast(0.0) - value

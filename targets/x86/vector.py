"""Arithmetic on vectors of 16 lanes of 32 bits, whatever the registers: one zmm or two ymm.

Here is what LLVM makes of plain vector code, and in a `VectorUnit` what is made of the
`Instructions` of one set.  A vector of two ymm needs no care in a generator: LLVM emits each
operation twice.

The transcendental functions are ours because TVM calls libm once per lane for `exp` and `tanh` and
has no `erf`.  Their coefficients are minimax fits (Lawson's iterated weighted least squares).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from qcompiler.targets import tir
from qcompiler.targets.piecewise import GELU_TAILS, Piecewise
from qcompiler.targets.tir import LANES, Expr, Register, broadcast, maximum, minimum
from qcompiler.targets.x86.instructions import Instructions

__all__ = [
    "EXP2_OF_FRACTION",
    "VectorUnit",
    "absolute",
    "all_lanes",
    "all_lanes_max",
    "all_lanes_sum",
    "first_lanes",
    "fma",
    "horner",
    "load_lanes",
    "maxima_of",
    "nearest",
    "offset_by_128",
    "polynomial",
    "store_lanes",
    "sums_of",
    "transpose",
]

# 2^f on [-1/2, 1/2], relative error 9e-8.
_EXP2 = (
    1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957,
    0.001326472731307149,
)  # fmt: skip

# 2^f on [0, 1], relative error 3e-6.
EXP2_OF_FRACTION = (
    1.0, 0.6930448440, 0.2412802090, 0.0522424716, 0.0134266900,
)  # fmt: skip

_ROUNDER = 1.5 * 2**23
"""Added to a float from 0 to 2^22 and taken away again it rounds to an integer, which the low bits
of the sum hold."""


def load_lanes(array: Expr, start: Expr, count: int, dtype: str = "float32") -> Expr:
    """`array[start : start + count]` as a vector, zeros after it, reading nothing further."""
    if count == LANES:
        return array.vload([start], f"{dtype}x{LANES}")
    copy = tir.scratch(dtype, LANES)
    tir.store(copy, tir.broadcast(tir.constant(0, dtype)), tir.lanes(0))
    with tir.loop(0, count) as lane:
        tir.store(copy, array[start + lane], lane)
    return copy.vload([0], f"{dtype}x{LANES}")


def store_lanes(array: Expr, value: Expr, start: Expr, count: int, dtype: str = "float32") -> None:
    """`array[start : start + count] = value[:count]`, writing nothing further."""
    if count == LANES:
        tir.store(array, value, tir.lanes(start))
        return
    copy = tir.scratch(dtype, LANES)
    tir.store(copy, value, tir.lanes(0))
    with tir.loop(0, count) as lane:
        tir.store(array, copy[lane], start + lane)


def offset_by_128(value: Expr) -> Expr:
    """An int8x64 as uint8 with zero point 128: its sign bits flipped."""
    signs = tir.broadcast(tir.constant(0x80808080, "uint32"))
    return tir.reinterpret("uint8x64", tir.reinterpret("uint32x16", value) ^ signs)


def absolute(value: Expr) -> Expr:
    """|value|."""
    return tir.intrinsic("float32x16", "llvm.fabs.v16f32", value)


def all_lanes(value: Expr, lane: int) -> Expr:
    """One lane of `value`, in every lane."""
    return tir.shuffle(value, [lane] * LANES)


def all_lanes_max(value: Expr) -> Expr:
    """The largest lane, in every lane."""
    return _reduce_lanes(value, tir.maximum)


def all_lanes_sum(value: Expr) -> Expr:
    """The sum of all lanes, in every lane."""
    return _reduce_lanes(value, lambda a, b: a + b)


def _reduce_lanes(value: Expr, combine: Callable[[Expr, Expr], Expr], down_to: int = 1) -> Expr:
    """Of all lanes, or of those that are a multiple of `down_to` apart."""
    for distance in (d for d in (8, 4, 2, 1) if d >= down_to):
        # A register per stage: as one expression the tree would double at each.
        stage = Register("float32", value)
        swapped = tir.shuffle(stage.value, [lane ^ distance for lane in range(LANES)])
        value = combine(stage.value, swapped)
    return value


def transpose(rows: Sequence[Register], dtype: str = "float32") -> list[Register]:
    """The columns of 16 registers of 16 lanes: four rounds that swap blocks of 1, 2, 4 and 8."""
    current = list(rows)
    for distance in (1, 2, 4, 8):
        for i in (i for i in range(LANES) if not i & distance):
            pair = _swap_blocks(current[i], current[i + distance], distance, dtype)
            current[i], current[i + distance] = pair
    return current


def sums_of(rows: Sequence[Register]) -> Expr:
    """The sums of the lanes of up to 16 registers: a transpose that adds as it goes.

    Lane i has that of number i, and so on from lane 2, 4, 8 or 16, as many as there are registers
    or more.
    """
    return _reduce_rows(rows, lambda one, other: one + other)


def maxima_of(rows: Sequence[Register]) -> Expr:
    """The largest lanes of up to 16 registers, where `sums_of` has their sums."""
    return _reduce_rows(rows, tir.maximum)


def _reduce_rows(rows: Sequence[Register], combine: Callable[[Expr, Expr], Expr]) -> Expr:
    count = len(rows)
    current = [*rows, *[rows[-1]] * ((1 << (count - 1).bit_length()) - count)]
    for distance in (1, 2, 4, 8):
        if len(current) == 1:
            return _reduce_lanes(current[0].value, combine, down_to=distance)
        pairs = zip(current[::2], current[1::2], strict=True)
        halves = [_swap_blocks(first, second, distance) for first, second in pairs]
        current = [Register("float32", combine(low.value, high.value)) for low, high in halves]
    return current[0].value


def _swap_blocks(
    first: Register, second: Register, distance: int, dtype: str = "float32"
) -> tuple[Register, Register]:
    """Two rows of a matrix of 2 x 2 blocks of so many lanes, transposed blockwise."""
    low = [LANES + j - distance if j & distance else j for j in range(LANES)]
    high = [LANES + j if j & distance else j + distance for j in range(LANES)]
    return (
        Register(dtype, tir.shuffle(first.value, low, second.value)),
        Register(dtype, tir.shuffle(first.value, high, second.value)),
    )


def first_lanes(value: Expr, count: int) -> Expr:
    """The first `count` lanes of `value`, zeros after them."""
    if count == LANES:
        return value
    return tir.select(tir.lanes(0) < tir.broadcast(count), value, tir.broadcast(0.0))


def nearest(value: Expr) -> Expr:
    """The nearest whole number, ties to even."""
    return tir.intrinsic("float32x16", "llvm.rint.v16f32", value)


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """A * b + c, rounded once."""
    return tir.intrinsic("float32x16", "llvm.fma.v16f32", a, b, c)


def polynomial(variable: Expr, coefficients: tuple[float, ...]) -> Expr:
    """The polynomial with these `coefficients`, from the constant up."""
    return horner(variable, [tir.broadcast(c) for c in coefficients])


def horner(variable: Expr, coefficients: Sequence[Expr]) -> Expr:
    """The same of vectors of coefficients."""
    *rest, top = coefficients
    return functools.reduce(lambda sum_, c: fma(sum_, variable, c), reversed(rest), top)


class VectorUnit(Instructions):
    """The functions that are made of an instruction set."""

    Register = Register
    broadcast = staticmethod(broadcast)
    maximum = staticmethod(maximum)
    minimum = staticmethod(minimum)
    nearest = staticmethod(nearest)

    def reciprocal_root(self, value: Expr) -> Expr:
        """1 / sqrt(value) to 2 ulp: an estimate and one Newton step.

        It can start again every few cycles; vsqrtps and vdivps together take 20.
        """
        estimate = Register("float32", self.reciprocal_root_estimate(value))
        half = Register("float32", estimate.value * tir.broadcast(-0.5))
        error = fma(value * estimate.value, estimate.value, tir.broadcast(-1.0))
        return fma(half.value, error, estimate.value)

    def quotient(self, value: Expr, divisor: Expr) -> Expr:
        """`value` / `divisor`, correctly rounded (see `quantize.py`); NaN from 2^128 on.

        Takes a division of the divisor alone, which LLVM does once for all rows of a tile.
        """
        inverse = Register("float32", tir.broadcast(1.0) / divisor)
        near = Register("float32", value * inverse.value)
        error = fma(near.value, tir.broadcast(0.0) - divisor, value)
        return fma(error, inverse.value, near.value)

    def reciprocal(self, value: Expr) -> Expr:
        """1 / value to 2 ulp: an estimate and one Newton step, a fifth of a division."""
        estimate = Register("float32", self.reciprocal_estimate(value))
        error = fma(tir.broadcast(0.0) - value, estimate.value, tir.broadcast(2.0))
        return estimate.value * error

    def exp(self, value: Expr) -> Expr:
        """e^value to 1e-5 relative (1e-7 for |value| < 1), between 2^-126 and 2^126."""
        return self._exp2(value * tir.broadcast(math.log2(math.e)))

    def gelu_tail(self, value: Expr, approximate: str) -> Expr:
        """max(x, 0) - GELU(x), to 3e-5; anything for NaN."""
        return self._piecewise(value, GELU_TAILS[self.lookup_size][approximate])

    def _piecewise(self, value: Expr, pieces: Piecewise) -> Expr:
        """A function of |value|, of which each coefficient is looked up."""
        bounded = Register("float32", self.smaller_magnitude(value, tir.broadcast(pieces.last)))
        rounded = fma(bounded.value, tir.broadcast(1.0 / pieces.step), tir.broadcast(_ROUNDER))
        index = Register("int32", tir.reinterpret("int32x16", rounded))
        tables = [self.lookup(table, index.value) for table in pieces.coefficients]
        return horner(bounded.value, tables)

    def sigmoid(self, value: Expr) -> Expr:
        """1 / (1 + e^-value)."""
        return self.reciprocal(self.exp(tir.broadcast(0.0) - value) + tir.broadcast(1.0))

    def _exp2(self, value: Expr) -> Expr:
        # In this order a NaN stays.
        bounded = tir.maximum(tir.broadcast(-126.0), tir.minimum(tir.broadcast(126.0), value))
        power = Register("float32", bounded)
        whole = Register("float32", nearest(power.value))
        fraction = Register("float32", power.value - whole.value)
        return self.times_power_of_two(polynomial(fraction.value, _EXP2), whole.value)

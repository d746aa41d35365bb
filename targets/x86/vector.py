"""Arithmetic on vectors of 16 lanes for AVX-512.

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

__all__ = [
    "Register",
    "absolute",
    "all_lanes_max",
    "all_lanes_sum",
    "broadcast",
    "dot_product_u8s8",
    "exp",
    "exp_of_negative",
    "first_lanes",
    "fma",
    "gelu_tail",
    "larger_magnitude",
    "load_lanes",
    "maximum",
    "minimum",
    "offset_by_128",
    "pack_int8",
    "reciprocal_root",
    "round_to_int32",
    "sigmoid",
    "store_lanes",
    "sums_of",
    "transpose",
]

_ROUND_AS_MXCSR = 4
"""The rounding operand that means "as the control register says": to nearest, ties to even."""

_ROUND_DOWN = 1
"""The rounding operand of vreduceps that means "towards minus infinity"."""

# 2^f on [-1/2, 1/2], relative error 9e-8.
_EXP2 = (
    1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957,
    0.001326472731307149,
)  # fmt: skip

# 2^f on [0, 1], relative error 3e-6.
_EXP2_OF_FRACTION = (
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


def dot_product_u8s8(total: Expr, quads: Expr, weights: Expr) -> Expr:
    """`total + dot(quads, weights)` per lane, over four uint8 and four int8 (vpdpbusd).

    `quads` is an int32 that holds four uint8, used for all lanes; `weights` is an int8x64.
    """
    everywhere = tir.reinterpret("uint8x64", tir.broadcast(quads))
    return tir.intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, everywhere, weights)


def round_to_int32(value: Expr) -> Expr:
    """Nearest integer, ties to even; `T.round` rounds ties away from zero."""
    return _masked("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", value, tir.broadcast(0))


def pack_int8(quarters: Sequence[Expr]) -> Expr:
    """Four vectors of int32 from -128 to 127 as one int8x64, in order.

    Four instructions and one store; vpmovdb takes two of each for every vector.
    """
    pairs = [
        tir.intrinsic("int16x32", "llvm.x86.avx512.packssdw.512", first, second)
        for first, second in (quarters[:2], quarters[2:])
    ]
    mixed = tir.intrinsic("int8x64", "llvm.x86.avx512.packsswb.512", *pairs)
    # Packing works within 128 bits: dword 4 i + j holds elements 4 i to 4 i + 3 of quarter j.
    order = [4 * (dword % 4) + dword // 4 for dword in range(LANES)]
    return tir.reinterpret("int8x64", tir.shuffle(tir.reinterpret("int32x16", mixed), order))


def offset_by_128(value: Expr) -> Expr:
    """An int8x64 as uint8 with zero point 128: its sign bits flipped."""
    signs = tir.broadcast(tir.constant(0x80808080, "uint32"))
    return tir.reinterpret("uint8x64", tir.reinterpret("uint32x16", value) ^ signs)


def reciprocal_root(value: Expr) -> Expr:
    """1 / sqrt(value) to 2 ulp: an estimate of 14 bits and one Newton step.

    It can start again every few cycles; vsqrtps and vdivps together take 20.
    """
    estimate = Register(
        "float32",
        tir.intrinsic(
            "float32x16", "llvm.x86.avx512.rsqrt14.ps.512", value, tir.broadcast(0.0), _all_lanes()
        ),
    )
    half = Register("float32", estimate.value * tir.broadcast(-0.5))
    error = fma(value * estimate.value, estimate.value, tir.broadcast(-1.0))
    return fma(half.value, error, estimate.value)


def absolute(value: Expr) -> Expr:
    """|value|."""
    return tir.intrinsic("float32x16", "llvm.fabs.v16f32", value)


def larger_magnitude(value: Expr, magnitude: Expr) -> Expr:
    """max(|value|, magnitude) for magnitude >= 0, in one instruction (vrangeps)."""
    sign_cleared_of_larger_magnitude = tir.constant(0b1011, "int32")
    return _masked(
        "float32x16",
        "llvm.x86.avx512.mask.range.ps.512",
        value,
        magnitude,
        sign_cleared_of_larger_magnitude,
        tir.broadcast(0.0),
    )


def all_lanes_max(value: Expr) -> Expr:
    """The largest lane, in every lane."""
    return _reduce_lanes(value, tir.maximum)


def all_lanes_sum(value: Expr) -> Expr:
    """The sum of all lanes, in every lane."""
    return _reduce_lanes(value, lambda a, b: a + b)


def _reduce_lanes(value: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    for distance in (8, 4, 2, 1):
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
    """The sums of the lanes of 16 registers, one in each lane: a transpose that adds as it goes."""
    current = list(rows)
    for distance in (1, 2, 4, 8):
        pairs = zip(current[::2], current[1::2], strict=True)
        halves = [_swap_blocks(first, second, distance) for first, second in pairs]
        current = [Register("float32", low.value + high.value) for low, high in halves]
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


def reciprocal(value: Expr) -> Expr:
    """1 / value to 2 ulp: an estimate of 14 bits and one Newton step, a fifth of a division."""
    estimate = Register(
        "float32",
        tir.intrinsic(
            "float32x16", "llvm.x86.avx512.rcp14.ps.512", value, tir.broadcast(0.0), _all_lanes()
        ),
    )
    error = fma(tir.broadcast(0.0) - value, estimate.value, tir.broadcast(2.0))
    return estimate.value * error


def exp(value: Expr) -> Expr:
    """e^value to 1e-5 relative (1e-7 for |value| < 1), between 2^-126 and 2^126."""
    return _exp2(value * tir.broadcast(math.log2(math.e)))


def exp_of_negative(value: Expr) -> Expr:
    """e^value to 3e-6 relative for -80 < value <= 0; 0 far below and for -inf, NaN for NaN.

    Half the instructions of `exp`: vreduceps gives x - floor(x), and 0 for -inf, and vscalefps
    takes the floor of its exponent itself.
    """
    power = Register("float32", value * tir.broadcast(math.log2(math.e)))
    nothing, below = tir.broadcast(0.0), tir.constant(_ROUND_DOWN, "int32")
    fraction = Register(
        "float32",
        _masked("float32x16", "llvm.x86.avx512.mask.reduce.ps.512", power.value, below, nothing),
    )
    series = _polynomial(fraction.value, _EXP2_OF_FRACTION)
    return _masked("float32x16", "llvm.x86.avx512.mask.scalef.ps.512", series, power.value, nothing)


def gelu_tail(magnitude: Expr, approximate: str) -> Expr:
    """max(x, 0) - GELU(x) for the magnitude of x, to 6e-7; NaN for NaN."""
    return _piecewise(magnitude, GELU_TAILS[approximate])


def _piecewise(magnitude: Expr, pieces: Piecewise) -> Expr:
    """A function of magnitude >= 0: each coefficient is picked from two registers of them."""
    # In this order vminps returns NaN for NaN.
    bounded = Register("float32", minimum(broadcast(pieces.last), magnitude))
    per_step = broadcast(1.0 / pieces.step)
    index = Register("float32", fma(bounded.value, per_step, broadcast(_ROUNDER)))
    middle = index.value - broadcast(_ROUNDER)
    offset = Register("float32", fma(bounded.value, per_step, broadcast(0.0) - middle))
    order = tir.reinterpret("int32x16", index.value)
    *rest, top = (_lookup(table, order) for table in pieces.coefficients)
    return functools.reduce(lambda sum_, c: fma(sum_, offset.value, c), reversed(rest), top)


def _lookup(table: Sequence[float], index: Expr) -> Expr:
    """`table[index % 32]` (vpermi2ps)."""
    low, high = (_vector(table[i : i + LANES]) for i in (0, LANES))
    return tir.intrinsic("float32x16", "llvm.x86.avx512.vpermi2var.ps.512", low, index, high)


def _vector(numbers: Sequence[float]) -> Expr:
    return tir.concatenate([tir.constant(number, "float32") for number in numbers])


def sigmoid(value: Expr) -> Expr:
    """1 / (1 + e^-value)."""
    return reciprocal(exp(tir.broadcast(0.0) - value) + tir.broadcast(1.0))


def _exp2(value: Expr) -> Expr:
    bounded = tir.maximum(tir.minimum(value, tir.broadcast(126.0)), tir.broadcast(-126.0))
    power = Register("float32", bounded)
    whole = Register("float32", tir.intrinsic("float32x16", "llvm.rint.v16f32", power.value))
    fraction = Register("float32", power.value - whole.value)
    series = _polynomial(fraction.value, _EXP2)
    return _masked(
        "float32x16",
        "llvm.x86.avx512.mask.scalef.ps.512",
        series,
        whole.value,
        tir.broadcast(0.0),
    )


def _polynomial(variable: Expr, coefficients: tuple[float, ...]) -> Expr:
    """Horner's rule; `coefficients` from the constant up."""
    *rest, top = (tir.broadcast(c) for c in coefficients)
    return functools.reduce(lambda sum_, c: fma(sum_, variable, c), reversed(rest), top)


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """A * b + c, rounded once."""
    return tir.intrinsic("float32x16", "llvm.fma.v16f32", a, b, c)


def _all_lanes() -> Expr:
    return tir.constant(-1, "int16")


def _masked(dtype: str, name: str, *operands: Expr) -> Expr:
    """An intrinsic that also takes a lane mask and a rounding mode."""
    rounding = tir.constant(_ROUND_AS_MXCSR, "int32")
    return tir.intrinsic(dtype, name, *operands, _all_lanes(), rounding)

"""Arithmetic on vectors of 16 lanes for AVX-512.

The transcendental functions are ours because TVM calls libm once per lane for `exp` and `tanh` and
has no `erf`.  Their coefficients are minimax fits (Lawson's iterated weighted least squares).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Register, broadcast, maximum, minimum

__all__ = [
    "Register",
    "absolute",
    "all_lanes_max",
    "broadcast",
    "dot_product_u8s8",
    "erfc_positive",
    "exp",
    "fma",
    "load_lanes",
    "maximum",
    "minimum",
    "pack_uint8",
    "round_to_int32",
    "sigmoid",
    "store_lanes",
]

_ROUND_AS_MXCSR = 4
"""The rounding operand that means "as the control register says": to nearest, ties to even."""

# 2^f on [-1/2, 1/2], relative error 9e-8.
_EXP2 = (
    1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957,
    0.001326472731307149,
)  # fmt: skip

# erfc(z) exp(z^2) = t P(t) with t = 1 / (1 + 0.4 z), absolute error of z erfc(z) 7e-9 for z >= 0.
# One odd polynomial for erf, the usual choice, cannot reach 1e-6 in float32.
_ERFC_SLOPE = 0.4
_ERFC = (
    0.2339019477367401, 0.14920590817928314, 0.5002164840698242, -0.4110690951347351,
    0.7342315316200256, -0.20648708939552307,
)  # fmt: skip


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


def pack_uint8(quarters: Sequence[Expr]) -> Expr:
    """Four vectors of int32 from 0 to 255 as one uint8x64, in order.

    Four instructions and one store; vpmovdb takes two of each for every vector.
    """
    pairs = [
        tir.intrinsic("int16x32", "llvm.x86.avx512.packssdw.512", first, second)
        for first, second in (quarters[:2], quarters[2:])
    ]
    mixed = tir.intrinsic("int8x64", "llvm.x86.avx512.packuswb.512", *pairs)
    # Packing works within 128 bits: dword 4 i + j holds elements 4 i to 4 i + 3 of quarter j.
    order = [4 * (dword % 4) + dword // 4 for dword in range(LANES)]
    return tir.reinterpret("uint8x64", tir.shuffle(tir.reinterpret("int32x16", mixed), order))


def absolute(value: Expr) -> Expr:
    """|value|."""
    return tir.intrinsic("float32x16", "llvm.fabs.v16f32", value)


def all_lanes_max(value: Expr) -> Expr:
    """The largest lane, in every lane."""
    for distance in (8, 4, 2, 1):
        # A register per stage: as one expression the tree would double at each.
        stage = Register("float32", value)
        swapped = tir.shuffle(stage.value, [lane ^ distance for lane in range(LANES)])
        value = tir.maximum(stage.value, swapped)
    return value


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


def erfc_positive(value: Expr) -> Expr:
    """erfc(value) for value >= 0."""
    z = Register("float32", value)
    t = Register(
        "float32", reciprocal(fma(z.value, tir.broadcast(_ERFC_SLOPE), tir.broadcast(1.0)))
    )
    gauss = _exp2(z.value * z.value * tir.broadcast(-math.log2(math.e)))
    return gauss * (_polynomial(t.value, _ERFC) * t.value)


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

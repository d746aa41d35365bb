"""The vector unit of AVX-512: a vector is one zmm."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qcompiler.targets import tir
from qcompiler.targets.piecewise import GELU_TAILS, Piecewise
from qcompiler.targets.tir import LANES, Expr, Register
from qcompiler.targets.x86.vector import EXP2_OF_FRACTION, VectorUnit, fma, horner, polynomial

__all__ = ["Avx512"]

_ROUND_AS_MXCSR = 4
"""The rounding operand that means "as the control register says": to nearest, ties to even."""

_ROUNDER = 1.5 * 2**23
"""Added to a float from 0 to 2^22 and taken away again it rounds to an integer, which the low bits
of the sum hold."""

_ROUND_DOWN = 1
"""The rounding operand of vreduceps that means "towards minus infinity"."""


class Avx512(VectorUnit):
    """AVX-512 F, BW, DQ and VNNI."""

    def dot_product_u8s8(self, total: Expr, activations: Expr, weights: Expr) -> Expr:
        """`total` plus four products per lane (vpdpbusd)."""
        everywhere = tir.reinterpret("uint8x64", tir.broadcast(activations))
        return tir.intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, everywhere, weights)

    def round_to_int32(self, value: Expr) -> Expr:
        """Nearest integer, ties to even; `T.round` rounds ties away from zero."""
        return _masked("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", value, tir.broadcast(0))

    def pack_int8(self, quarters: Sequence[Expr]) -> Expr:
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

    def larger_magnitude(self, value: Expr, magnitude: Expr) -> Expr:
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

    def reciprocal_estimate(self, value: Expr) -> Expr:
        """1 / value, good to 14 bits."""
        return _estimate("llvm.x86.avx512.rcp14.ps.512", value)

    def reciprocal_root_estimate(self, value: Expr) -> Expr:
        """1 / sqrt(value), good to 14 bits."""
        return _estimate("llvm.x86.avx512.rsqrt14.ps.512", value)

    def times_power_of_two(self, value: Expr, power: Expr) -> Expr:
        """`value` 2^power (vscalefps)."""
        return _masked(
            "float32x16", "llvm.x86.avx512.mask.scalef.ps.512", value, power, tir.broadcast(0.0)
        )

    def exp_of_negative(self, value: Expr) -> Expr:
        """e^value to 3e-6 relative for -80 < value <= 0; 0 far below and for -inf, NaN for NaN.

        Half the instructions of `exp`: vreduceps gives x - floor(x), and 0 for -inf, and vscalefps
        takes the floor of its exponent itself.
        """
        power = Register("float32", value * tir.broadcast(math.log2(math.e)))
        nothing, below = tir.broadcast(0.0), tir.constant(_ROUND_DOWN, "int32")
        fraction = Register(
            "float32",
            _masked(
                "float32x16", "llvm.x86.avx512.mask.reduce.ps.512", power.value, below, nothing
            ),
        )
        series = polynomial(fraction.value, EXP2_OF_FRACTION)
        return _masked(
            "float32x16", "llvm.x86.avx512.mask.scalef.ps.512", series, power.value, nothing
        )

    def gelu_tail(self, magnitude: Expr, approximate: str) -> Expr:
        """max(x, 0) - GELU(x) for the magnitude of x, to 6e-7; NaN for NaN."""
        return _piecewise(magnitude, GELU_TAILS[approximate])


def _piecewise(magnitude: Expr, pieces: Piecewise) -> Expr:
    """A function of magnitude >= 0: each coefficient is picked from two registers of them."""
    # In this order vminps returns NaN for NaN.
    bounded = Register("float32", tir.minimum(tir.broadcast(pieces.last), magnitude))
    per_step = tir.broadcast(1.0 / pieces.step)
    index = Register("float32", fma(bounded.value, per_step, tir.broadcast(_ROUNDER)))
    middle = index.value - tir.broadcast(_ROUNDER)
    offset = Register("float32", fma(bounded.value, per_step, tir.broadcast(0.0) - middle))
    order = tir.reinterpret("int32x16", index.value)
    return horner(offset.value, [_lookup(table, order) for table in pieces.coefficients])


def _lookup(table: Sequence[float], index: Expr) -> Expr:
    """`table[index % 32]` (vpermi2ps)."""
    low, high = (_vector(table[i : i + LANES]) for i in (0, LANES))
    return tir.intrinsic("float32x16", "llvm.x86.avx512.vpermi2var.ps.512", low, index, high)


def _vector(numbers: Sequence[float]) -> Expr:
    return tir.concatenate([tir.constant(number, "float32") for number in numbers])


def _estimate(name: str, value: Expr) -> Expr:
    return tir.intrinsic("float32x16", name, value, tir.broadcast(0.0), _all_lanes())


def _all_lanes() -> Expr:
    return tir.constant(-1, "int16")


def _masked(dtype: str, name: str, *operands: Expr) -> Expr:
    """An intrinsic that also takes a lane mask and a rounding mode."""
    rounding = tir.constant(_ROUND_AS_MXCSR, "int32")
    return tir.intrinsic(dtype, name, *operands, _all_lanes(), rounding)

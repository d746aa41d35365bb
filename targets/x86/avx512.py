"""The vector unit of AVX-512: a vector is one zmm."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Register
from qcompiler.targets.x86.vector import EXP2_OF_FRACTION, VectorUnit, polynomial

__all__ = ["Avx512"]

_ROUND_AS_MXCSR = 4
"""The rounding operand that means "as the control register says": to nearest, ties to even."""

_BY_QUARTERS = [4 * (dword % 4) + dword // 4 for dword in range(LANES)]
"""The dwords of four vectors that were packed to bytes within 128 bits, each vector's in turn."""

_ROUND_DOWN = 1
"""The rounding operand of vreduceps that means "towards minus infinity"."""

_SMALLER, _LARGER = 0b1010, 0b1011
"""Operands of vrangeps: the value of smaller or of larger magnitude, its sign cleared."""


class Avx512(VectorUnit):
    """AVX-512 F, BW, DQ and VNNI."""

    lookup_size = 2 * LANES

    def dot_product_u8s8(self, total: Expr, activations: Expr, weights: Expr) -> Expr:
        """`total` plus four products per lane (vpdpbusd)."""
        everywhere = tir.reinterpret("uint8x64", tir.broadcast(activations))
        return self.dot_product_bytes(total, everywhere, weights)

    def dot_product_bytes(self, total: Expr, unsigned: Expr, signed: Expr) -> Expr:
        """The same of a uint8x64 and an int8x64."""
        return tir.intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, unsigned, signed)

    def add_nibbles(self, total: Expr, nibbles: Expr, activations: Expr) -> Expr:
        """`total` plus four products per lane (vpdpbusd)."""
        everywhere = tir.reinterpret("int8x64", tir.broadcast(activations))
        return self.dot_product_bytes(total, nibbles, everywhere)

    def round_to_int32(self, value: Expr) -> Expr:
        """Nearest integer, ties to even; `T.round` rounds ties away from zero."""
        return _masked("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", value, tir.broadcast(0))

    def pack_int8(self, quarters: Sequence[Expr]) -> Expr:
        """Four vectors of int32 from -128 to 127 as one int8x64, in order.

        Four instructions and one store; vpmovdb takes two of each for every vector.
        """
        mixed = tir.reinterpret("int32x16", _mix_int8(quarters))
        return tir.reinterpret("int8x64", tir.shuffle(mixed, _BY_QUARTERS))

    def pack_int8_by_lanes(self, quarters: Sequence[Expr]) -> Expr:
        """The same, but the four of each lane side by side."""
        order = [16 * (i // 16) + 4 * (i % 4) + i % 16 // 4 for i in range(4 * LANES)]
        return tir.shuffle(_mix_int8(quarters), order)

    def pack_int16(self, first: Expr, second: Expr) -> Expr:
        """Two vectors of int32 as one of 32 uint16, saturated as int16, in lanes of four."""
        return _words("packssdw", first, second)

    def pack_uint8(self, first: Expr, second: Expr) -> Expr:
        """Two results of `pack_int16`, saturated as uint8, in order, as an int32x16."""
        mixed = tir.intrinsic("uint8x64", "llvm.x86.avx512.packuswb.512", first, second)
        return tir.shuffle(tir.reinterpret("int32x16", mixed), _BY_QUARTERS)

    def high_product(self, one: Expr, other: Expr) -> Expr:
        """`one * other // 2^16` of 32 uint16."""
        return _words("pmulhu.w", one, other)

    def shift_right(self, value: Expr, shift: Expr) -> Expr:
        """`value >> shift` of 32 uint16, each by its own shift, of which any from 16 on gives 0."""
        return _words("psrlv.w", value, shift)

    def rounded_shift_by_7(self, value: Expr) -> Expr:
        """`(value + 64) >> 7` of 32 uint16 below 2^15."""
        return _words("pmul.hr.sw", value, tir.all_words(1 << 8))

    def larger_magnitude(self, value: Expr, magnitude: Expr) -> Expr:
        """max(|value|, magnitude) for magnitude >= 0, in one instruction."""
        return _of_magnitudes(_LARGER, value, magnitude)

    def smaller_magnitude(self, value: Expr, magnitude: Expr) -> Expr:
        """min(|value|, magnitude) for magnitude >= 0; `magnitude` if `value` is NaN."""
        return _of_magnitudes(_SMALLER, value, magnitude)

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

    def lookup(self, table: Sequence[float], index: Expr) -> Expr:
        """`table[index % 32]` (vpermi2ps)."""
        low, high = (tir.constants(table[i : i + LANES]) for i in (0, LANES))
        return tir.intrinsic("float32x16", "llvm.x86.avx512.vpermi2var.ps.512", low, index, high)


def _mix_int8(quarters: Sequence[Expr]) -> Expr:
    """Four vectors of int32 as bytes, packed within 128 bits: 4 i to 4 i + 3 of each quarter."""
    pairs = [
        tir.intrinsic("int16x32", "llvm.x86.avx512.packssdw.512", first, second)
        for first, second in (quarters[:2], quarters[2:])
    ]
    return tir.intrinsic("int8x64", "llvm.x86.avx512.packsswb.512", *pairs)


def _words(name: str, *operands: Expr) -> Expr:
    return tir.intrinsic("uint16x32", f"llvm.x86.avx512.{name}.512", *operands)


def _of_magnitudes(which: int, one: Expr, other: Expr) -> Expr:
    how, nothing = tir.constant(which, "int32"), tir.broadcast(0.0)
    return _masked("float32x16", "llvm.x86.avx512.mask.range.ps.512", one, other, how, nothing)


def _estimate(name: str, value: Expr) -> Expr:
    return tir.intrinsic("float32x16", name, value, tir.broadcast(0.0), _all_lanes())


def _all_lanes() -> Expr:
    return tir.constant(-1, "int16")


def _masked(dtype: str, name: str, *operands: Expr) -> Expr:
    """An intrinsic that also takes a lane mask and a rounding mode."""
    rounding = tir.constant(_ROUND_AS_MXCSR, "int32")
    return tir.intrinsic(dtype, name, *operands, _all_lanes(), rounding)

"""The vector units of AVX2 and of AVX-VNNI: a vector is two ymm, an intrinsic takes one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Register
from qcompiler.targets.x86.vector import EXP2_OF_FRACTION, VectorUnit, absolute, polynomial

__all__ = ["Avx2", "AvxVnni"]

_MANTISSA_BITS = 23

_EXPONENT_OF_ZERO = -127.0
"""The power of two whose float32 is the pattern 0 but for the mantissa."""


class Avx2(VectorUnit):
    """AVX2 and FMA.  Of four activations neither sign adds up to more than 128, see `SplitRows`."""

    splits = True
    lookup_size = LANES // 2

    def dot_product_u8s8(self, total: Expr, activations: Expr, weights: Expr) -> Expr:
        """`total` plus four products per lane (vpmaddubsw, vpmaddwd by 1, vpaddd)."""
        return self.dot_products_u8s8(total, [(activations, weights)])

    def dot_products_u8s8(self, total: Expr, factors: Sequence[tuple[Expr, Expr]]) -> Expr:
        """The same of one pair or two, whose products are added as int16.

        Five instructions for 64 products of two, of which three are multiplications; widened to
        int16 first it would be eight and four, of twice the bytes.
        """
        first, *second = (_pairs(*pair) for pair in factors)
        ones = tir.broadcast(tir.constant(1, "int16"), 2 * LANES)
        return total + _by_halves("int32", "llvm.x86.avx2.pmadd.wd", sum(second, first), ones)

    nibble_sums = ("int16", 2 * LANES)

    def add_nibbles(self, total: Expr, nibbles: Expr, activations: Expr) -> Expr:
        """`total` plus two products per lane (vpmaddubsw, vpaddw); 16 of 15 * 128 fit."""
        everywhere = tir.reinterpret("int8x64", tir.broadcast(activations))
        return total + _by_halves(
            "int16", "llvm.x86.avx2.pmadd.ub.sw", nibbles, everywhere, width=16
        )

    def whole_sums(self, total: Expr) -> Expr:
        """The int32x16 that a total of `add_nibbles` is (vpmaddwd by 1)."""
        ones = tir.broadcast(tir.constant(1, "int16"), 2 * LANES)
        return _by_halves("int32", "llvm.x86.avx2.pmadd.wd", total, ones)

    def round_to_int32(self, value: Expr) -> Expr:
        """Nearest integer, ties to even."""
        return _by_halves("int32", "llvm.x86.avx.cvt.ps2dq.256", value)

    def pack_int8(self, quarters: Sequence[Expr]) -> Expr:
        """Four vectors of int32 from -128 to 127 as one int8x64, in order."""
        eighths = [half for quarter in quarters for half in _halves(quarter, LANES)]
        low, high = (_pack_int8x32(eighths[i : i + 4]) for i in (0, 4))
        return tir.reinterpret("int8x64", tir.shuffle(low, range(LANES), high))

    def larger_magnitude(self, value: Expr, magnitude: Expr) -> Expr:
        """max(|value|, magnitude) for magnitude >= 0; `magnitude` if `value` is NaN."""
        return tir.maximum(absolute(value), magnitude)

    def smaller_magnitude(self, value: Expr, magnitude: Expr) -> Expr:
        """min(|value|, magnitude) for magnitude >= 0; NaN if `value` is."""
        return tir.minimum(magnitude, absolute(value))

    def reciprocal_estimate(self, value: Expr) -> Expr:
        """1 / value, good to 11 bits."""
        return _by_halves("float32", "llvm.x86.avx.rcp.ps.256", value)

    def reciprocal_root_estimate(self, value: Expr) -> Expr:
        """1 / sqrt(value), good to 11 bits."""
        return _by_halves("float32", "llvm.x86.avx.rsqrt.ps.256", value)

    def lookup(self, table: Sequence[float], index: Expr) -> Expr:
        """`table[index % 8]` (vpermps)."""
        # The same register twice, from which each half is taken.
        numbers = tir.constants([*table, *table])
        return _by_halves("float32", "llvm.x86.avx2.permps", numbers, index)

    def times_power_of_two(self, value: Expr, power: Expr) -> Expr:
        """`value` 2^power: the power is added to the exponent."""
        exponent = self.round_to_int32(power) << tir.broadcast(_MANTISSA_BITS)
        return tir.reinterpret("float32x16", tir.reinterpret("int32x16", value) + exponent)

    def exp_of_negative(self, value: Expr) -> Expr:
        """e^value to 3e-6 relative for -80 < value <= 0; 0 far below and for -inf, NaN for NaN."""
        power = value * tir.broadcast(math.log2(math.e))
        # In this order a NaN stays: the second operand is taken if the comparison fails.
        bounded = Register("float32", tir.maximum(tir.broadcast(_EXPONENT_OF_ZERO), power))
        whole = Register("float32", tir.intrinsic("float32x16", "llvm.floor.v16f32", bounded.value))
        # At the bound the fraction is 0 and the polynomial exactly 1, so the result exactly 0.
        series = polynomial(bounded.value - whole.value, EXP2_OF_FRACTION)
        return self.times_power_of_two(series, whole.value)


class AvxVnni(Avx2):
    """AVX2 and AVX-VNNI, which is vpdpbusd for ymm."""

    splits = False
    dot_products_u8s8 = VectorUnit.dot_products_u8s8
    nibble_sums = VectorUnit.nibble_sums
    whole_sums = VectorUnit.whole_sums

    def add_nibbles(self, total: Expr, nibbles: Expr, activations: Expr) -> Expr:
        """`total` plus four products per lane (vpdpbusd)."""
        everywhere = tir.reinterpret("int8x64", tir.broadcast(activations))
        return _by_halves("int32", "llvm.x86.avx512.vpdpbusd.256", total, nibbles, everywhere)

    def dot_product_u8s8(self, total: Expr, activations: Expr, weights: Expr) -> Expr:
        """`total` plus four products per lane (vpdpbusd)."""
        everywhere = tir.reinterpret("uint8x64", tir.broadcast(activations))
        # The name is AVX-512's; LLVM encodes it for the processor at hand.
        return _by_halves("int32", "llvm.x86.avx512.vpdpbusd.256", total, everywhere, weights)


def _pairs(activations: Expr, weights: Expr) -> Expr:
    """Sums of two products each as int16."""
    everywhere = tir.reinterpret("int8x64", tir.broadcast(activations))
    return _by_halves("int16", "llvm.x86.avx2.pmadd.ub.sw", weights, everywhere, width=16)


def _by_halves(dtype: str, name: str, *operands: Expr, width: int = LANES // 2) -> Expr:
    """An intrinsic on ymm, applied to both halves; its results have `width` lanes of `dtype`."""
    halves = [_halves(operand, operand.ty.dtype.lanes) for operand in operands]
    low, high = (
        tir.intrinsic(f"{dtype}x{width}", name, *some) for some in zip(*halves, strict=True)
    )
    return tir.shuffle(low, range(2 * width), high)


def _halves(value: Expr, count: int) -> tuple[Expr, Expr]:
    middle = count // 2
    return tir.shuffle(value, range(middle)), tir.shuffle(value, range(middle, count))


def _pack_int8x32(quarters: Sequence[Expr]) -> Expr:
    """Four vectors of 8 int32 as int8, in lanes of four."""
    pairs = [
        tir.intrinsic("int16x16", "llvm.x86.avx2.packssdw", first, second)
        for first, second in (quarters[:2], quarters[2:])
    ]
    mixed = tir.intrinsic("int8x32", "llvm.x86.avx2.packsswb", *pairs)
    # Packing works within 128 bits: dword 4 i + j holds elements 4 i to 4 i + 3 of quarter j.
    order = [4 * (dword % 2) + dword // 2 for dword in range(LANES // 2)]
    return tir.shuffle(tir.reinterpret("int32x8", mixed), order)

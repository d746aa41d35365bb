"""What the vector unit of each instruction set computes in its own way."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence

from qcompiler.targets.tir import LANES, Expr

__all__ = ["Instructions"]


class Instructions(ABC):
    """Vectors are of 16 lanes of 32 bits, whatever the registers: one zmm or two ymm."""

    splits = False
    """Whether it takes activations as `SplitRows`, and weights as uint8, 128 more."""
    lookup_size: int
    """How many numbers a table for `lookup` has."""

    @abstractmethod
    def dot_product_u8s8(self, total: Expr, activations: Expr, weights: Expr) -> Expr:
        """`total` plus four products per lane, exactly.

        `activations` are the bits of an int32, used for all lanes; `weights` are int8, those of a
        lane side by side.
        """

    def dot_products_u8s8(self, total: Expr, factors: Sequence[tuple[Expr, Expr]]) -> Expr:
        """The same of several pairs of activations and weights."""
        return functools.reduce(
            lambda so_far, pair: self.dot_product_u8s8(so_far, *pair), factors, total
        )

    nibble_sums = ("int32", LANES)
    """Type and lanes of what `add_nibbles` adds up."""

    @abstractmethod
    def add_nibbles(self, total: Expr, nibbles: Expr, activations: Expr) -> Expr:
        """`total` plus the products of a uint8x64 below 16 and the int8 of `activations`.

        Those are the bits of an int32, used for all lanes.
        """

    def whole_sums(self, total: Expr) -> Expr:
        """The int32x16 that a total of `add_nibbles` is."""
        return total

    @abstractmethod
    def round_to_int32(self, value: Expr) -> Expr:
        """Nearest integer, ties to even; `T.round` rounds ties away from zero."""

    @abstractmethod
    def pack_int8(self, quarters: Sequence[Expr]) -> Expr:
        """Four vectors of int32 from -128 to 127 as one int8x64, in order."""

    @abstractmethod
    def larger_magnitude(self, value: Expr, magnitude: Expr) -> Expr:
        """max(|value|, magnitude) for magnitude >= 0; `magnitude` if `value` is NaN."""

    @abstractmethod
    def smaller_magnitude(self, value: Expr, magnitude: Expr) -> Expr:
        """min(|value|, magnitude) for magnitude >= 0; either of them if `value` is NaN."""

    @abstractmethod
    def reciprocal_estimate(self, value: Expr) -> Expr:
        """1 / value, good to at least 11 bits."""

    @abstractmethod
    def reciprocal_root_estimate(self, value: Expr) -> Expr:
        """1 / sqrt(value), good to at least 11 bits."""

    @abstractmethod
    def times_power_of_two(self, value: Expr, power: Expr) -> Expr:
        """`value` 2^power, for a whole `power` from -126 to 126 and a value about 1."""

    @abstractmethod
    def exp_of_negative(self, value: Expr) -> Expr:
        """e^value to 3e-6 relative for -80 < value <= 0; 0 far below and for -inf, NaN for NaN."""

    @abstractmethod
    def lookup(self, table: Sequence[float], index: Expr) -> Expr:
        """`table[index % lookup_size]` for each lane of an int32x16."""

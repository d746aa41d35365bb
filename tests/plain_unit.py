"""The sums of AVX512-VNNI in arithmetic of any vector, so that its loops run on any processor."""

from __future__ import annotations

from typing import Any

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES
from qcompiler.targets.x86.avx2 import Avx2

Expr = Any


class PlainUnit(Avx2):
    """AVX2 but for its products, which are those of four bytes that vpdpbusd adds to each lane."""

    splits = False
    nibble_sums = ("int32", LANES)

    def dot_product_u8s8(self, total: Expr, activations: Expr, weights: Expr) -> Expr:
        return _four_products(total, [(activations >> (8 * i)) & 255 for i in range(4)], weights)

    def dot_products_u8s8(self, total: Expr, factors: Any) -> Expr:
        for activations, weights in factors:
            total = self.dot_product_u8s8(total, activations, weights)
        return total

    def add_nibbles(self, total: Expr, nibbles: Expr, activations: Expr) -> Expr:
        bytes_ = [(activations << (24 - 8 * i)) >> 24 for i in range(4)]
        return _four_products(total, bytes_, nibbles)

    def whole_sums(self, total: Expr) -> Expr:
        return total


def _four_products(total: Expr, scalars: list[Expr], vector: Expr) -> Expr:
    for i, scalar in enumerate(scalars):
        column = tir.shuffle(vector, [4 * lane + i for lane in range(LANES)])
        total = total + tir.cast("int32x16", column) * tir.broadcast(scalar)
    return total

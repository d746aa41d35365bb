"""The regions that stand for a Quantize and a product: which two."""

from __future__ import annotations

import dataclasses

from qcompiler.ir.region import ExtraKind, Region

__all__ = ["quantizing_parts", "requantized_parts"]


def quantizing_parts(region: Region) -> tuple[Region, Region]:
    """The Quantize before the product of a region that quantizes its input, and the product."""
    quantize = Region("Quantize", (("K", region.size("K")),))
    product = dataclasses.replace(region, anchor="QMatMulW8A8", sizes=region.sizes[:2])
    return quantize, product


def requantized_parts(region: Region) -> tuple[Region, Region]:
    """The Quantize of the result of a region that quantizes it, and the product without.

    A factor of each channel between the two is an operand of the Quantize.
    """
    factors: tuple[ExtraKind, ...] = ("channel",) if region.flags else ()
    quantize = Region("Quantize", (("K", region.size("N")),), factors, flags=region.flags)
    extras = region.extras[: len(region.extras) - len(factors)]
    product = dataclasses.replace(region, anchor="QMatMulW8A8", extras=extras, outputs=(), flags=())
    return quantize, product

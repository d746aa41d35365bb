"""The regions that stand for a Quantize and a product: which two, and what the first reads."""

from __future__ import annotations

import dataclasses

from qcompiler.ir.region import ExtraKind, Region

__all__ = [
    "dilation_of_windows",
    "pads_of_windows",
    "quantizing_parts",
    "requantized",
    "requantized_parts",
    "requantizes",
]

_REQUANTIZED = "Requantized"


def quantizing_parts(region: Region) -> tuple[Region, Region]:
    """The Quantize before the product of a region that quantizes its input, and the product."""
    quantize = Region("Quantize", (("K", region.size("K")),))
    sizes = region.sizes[:2]
    product = dataclasses.replace(region, anchor="QMatMulW8A8", sizes=sizes, attributes=())
    return quantize, product


def pads_of_windows(region: Region) -> tuple[int, int]:
    """How many rows of zeros there are before and behind those that a region reads windows of."""
    begin, end = region.integers("pads") if dict(region.attributes).get("pads") else (0, 0)
    return begin, end


def dilation_of_windows(region: Region) -> int:
    """How many rows further in what it reads the next row of a window is."""
    return region.integers("dilations")[0] if "dilations" in dict(region.attributes) else 1


def requantized(anchor: str) -> str:
    """The anchor that quantizes the result of a product with `anchor`."""
    return _REQUANTIZED + anchor


def requantizes(region: Region) -> bool:
    """Whether a region is a product that quantizes its result."""
    return region.anchor.startswith(_REQUANTIZED)


def requantized_parts(region: Region) -> tuple[Region, Region]:
    """The Quantize of the result of a region that quantizes it, and the product without.

    A factor of each channel between the two is an operand of the Quantize.
    """
    factors: tuple[ExtraKind, ...] = ("channel",) if region.flags else ()
    quantize = Region("Quantize", (("K", region.size("N")),), factors, flags=region.flags)
    extras = region.extras[: len(region.extras) - len(factors)]
    anchor = region.anchor.removeprefix(_REQUANTIZED)
    product = dataclasses.replace(region, anchor=anchor, extras=extras, outputs=(), flags=())
    return quantize, product

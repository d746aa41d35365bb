"""What a family of kernels is.  Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from qcompiler.ir.joined_regions import requantized_parts
from qcompiler.ir.region import Region
from qcompiler.targets.x86.isa import AVX2, AVX512_VNNI, Isa

__all__ = [
    "FAST",
    "MAX_ELEMENTS",
    "MAX_QUANTIZED_DEPTH",
    "Family",
    "misfit_of_quantized",
    "misfit_of_results",
    "requantizing_kernels",
]

MAX_ELEMENTS = 1 << 30
"""Kernels index a row, and the packed weights, with int32."""
MAX_QUANTIZED_DEPTH = 4096
"""A tile of such rows fits the 64 KiB that DynamicQMatMulW8A8 quantizes into; one is
WINDOW_FLOATS of native/qmatmul.h, and a tile of results fits its RESULT_FLOATS."""
FAST = "fast"
"""The flag of a Quantize of numbers that have been rounded otherwise than the body's before."""
_MAX_PARTS = 8
"""Results of merged products: QC__MAX_PARTS of native/qcompiler.h."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Kernels of one anchor op.

    Attributes:
        sizes: Names of a region's sizes, in order.
        anchor: The `struct qc_anchor` that runs them, in targets/native/.
        member: The function pointer of `struct qc_variant`; its arguments are
            `struct qc_<member>_args`.
        parameters: C type and expression (from the arguments `a`) of each kernel parameter.
        unsupported: Why a region has no kernel, or None.
        generate: The TIR of a region's kernel for an instruction set; None for one that is made of
            others', or is plain C.
        parts: The regions whose kernels it is made of.
        constants: Further members of `struct qc_variant`, as C initializers.
        isas: The instruction sets it is compiled for, in order of preference.
    """

    sizes: tuple[str, ...]
    anchor: str
    member: str
    parameters: Callable[[Region, Isa], list[tuple[str, str]]]
    unsupported: Callable[[Region], str | None]
    generate: Callable[[Region, Isa], Any] | None
    constants: Callable[[Region, Isa], dict[str, int]] = lambda region, isa: {}
    isas: tuple[Isa, ...] = (AVX512_VNNI, AVX2)
    parts: Callable[[Region], tuple[Region, ...]] = lambda region: ()


def misfit_of_results(region: Region, panels: Iterable[int]) -> str | None:
    """Why several results cannot be stored by kernels with panels of so many columns, or None."""
    if len(region.widths) > _MAX_PARTS:
        return f"{len(region.widths)} results; at most {_MAX_PARTS} are supported"
    for panel in panels:
        if any(width % panel for width in region.widths):
            return f"results of {region.widths} columns: not all are multiples of {panel}"
    return None


def misfit_of_quantized(region: Region) -> str | None:
    """Why the result of a product cannot be quantized by it, or None."""
    n = region.size("N")
    if region.widths or region.is_quantized or region.outputs[-2:] != ("yq", "ys"):
        return "one result of floats is quantized"
    if n > MAX_QUANTIZED_DEPTH:
        return f"N={n}: rows of more than {MAX_QUANTIZED_DEPTH} are quantized later"
    return None


def requantizing_kernels(region: Region) -> tuple[Region, Region]:
    """Its parts.  Results have been rounded otherwise than the body's before they are quantized."""
    quantize, product = requantized_parts(region)
    return dataclasses.replace(quantize, flags=(FAST, *quantize.flags)), product

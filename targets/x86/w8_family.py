"""The kernels of products by weights of 8 bits: which have one, and their arguments.

Some are made of two kernels, one of them a Quantize of what is multiplied or of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from qcompiler.ir.joined_regions import dilation_of_windows, pads_of_windows, quantizing_parts
from qcompiler.ir.region import Region
from qcompiler.targets.epilogue import unsupported_epilogue
from qcompiler.targets.x86.family import (
    MAX_ELEMENTS,
    MAX_QUANTIZED_DEPTH,
    Family,
    misfit_of_quantized,
    misfit_of_results,
    requantizing_kernels,
)
from qcompiler.targets.x86.isa import AVX2, AVX512_VNNI, AVX_VNNI, Isa
from qcompiler.targets.x86.tile import tile_shape

__all__ = ["W8_FAMILIES", "differences", "most_lacking"]

_ISAS = (AVX512_VNNI, AVX_VNNI, AVX2)

MAX_QUANTIZED_WIDTH = 1024
"""Beyond this many columns quantizing is little of the work, and panels of weights that many rows
share in an L1 matter more: 128 x 1536 x 384 takes 4% longer in one op."""
MAX_CACHED_WEIGHTS = 768 << 10
"""Bytes of weights that an L2 of 1 MiB holds beside a block of activations."""
MAX_DISTANCE = 1 << 20
"""Floats from one window to the next: kernels index up to 512 of them with int32."""
MAX_DEPTH = (1 << 31) // (128 * 128) - 1
"""The longest sum of int8 products that an int32 surely holds."""
MAX_ASYMMETRIC_DEPTH = {
    "QMatMulU8S8": (1 << 31) // (255 * 128) - 1,
    "QMatMulU8U8": (1 << 31) // (255 * 255) - 1,
}
"""The same where a zero point of 0 or 255 makes factors as large as 255."""


def _generate_qmatmul(region: Region, isa: Isa) -> Any:
    from qcompiler.targets.x86.qmatmul import qmatmul_function

    return qmatmul_function(region, isa)


def _unsupported_qmatmul(region: Region) -> str | None:
    k, n = region.size("K"), region.size("N")
    deepest = MAX_ASYMMETRIC_DEPTH.get(region.anchor, MAX_DEPTH)
    if k > deepest:
        return f"K={k}: an int32 sum of more than {deepest} products may overflow"
    columns = tile_shape(n).columns
    panels = [tile_shape(n, isa).columns for isa in _ISAS]
    if (reason := misfit_of_results(region, panels)) is not None:
        return reason
    if -(-n // columns) * columns * -(-k // 4) * 4 > MAX_ELEMENTS:
        return f"{k} x {n} weights take more than 2^30 bytes"
    return unsupported_epilogue(region)


def _unsupported_dynamic(region: Region) -> str | None:
    k, n = region.size("K"), region.size("N")
    if k > MAX_QUANTIZED_DEPTH:
        return f"K={k}: rows of more than {MAX_QUANTIZED_DEPTH} are quantized first"
    if n > MAX_QUANTIZED_WIDTH:
        return f"N={n}: products of more than {MAX_QUANTIZED_WIDTH} columns are quantized first"
    if k * n > MAX_CACHED_WEIGHTS:
        return f"{k} x {n} weights do not stay in a cache while few rows at a time are multiplied"
    return _unsupported_qmatmul(region)


def _unsupported_windowed(region: Region) -> str | None:
    if region.size("K") % region.size("R"):
        return f"rows of {region.size('K')} are no windows of {region.size('R')} rows"
    distance = region.size("K") // region.size("R") * region.size("S")
    if not 0 < dilation_of_windows(region) <= MAX_ELEMENTS // region.size("R"):
        return f"dilation {dilation_of_windows(region)}: windows of up to 2^30 rows are supported"
    if distance > MAX_DISTANCE:
        return f"windows {distance} floats apart; at most {MAX_DISTANCE} are supported"
    if not all(0 <= pad <= MAX_ELEMENTS for pad in pads_of_windows(region)):
        return f"{pads_of_windows(region)} rows of zeros around x: 0 to 2^30 are supported"
    return _unsupported_dynamic(region)


def _unsupported_requantized(region: Region) -> str | None:
    return misfit_of_quantized(region) or _unsupported_qmatmul(region)


def _qmatmul_parameters(region: Region, isa: Isa) -> list[tuple[str, str]]:
    return [
        ("const uint8_t *", "a->q"),
        ("const float *", "a->s"),
        ("const int8_t *", "a->weights"),
        ("const int32_t *", "a->init"),
        *(
            (f"const {'uint16_t' if name == 'groups' else 'int32_t'} *", f"a->excess.{name}")
            for name in ("counts", "groups", "values")
            if most_lacking(region.anchor, isa)
        ),
        ("const float *", "a->ws"),
        *(("const int32_t *", f"a->{name}") for name in differences(region, isa)),
        *(("const float *", f"a->extra[{i}]") for i in range(len(region.extras))),
        ("uint8_t *" if region.is_quantized else "float *", "a->y"),
        ("int32_t", "a->rows"),
        ("int32_t", "a->panel_begin"),
        ("int32_t", "a->panel_end"),
        *((("int32_t", "a->y_columns"), ("int32_t", "a->y_first")) if region.widths else ()),
    ]


def _qmatmul_constants(region: Region, isa: Isa) -> dict[str, int]:
    tile = tile_shape(region.size("N"), isa)
    most = most_lacking(region.anchor, isa)
    splits = {"most_lacking": most} if most else {}
    return {"tile_rows": tile.rows, "tile_vectors": tile.vectors} | splits


def most_lacking(anchor: str, isa: Isa) -> int:
    """How many numbers two groups of four may lack of the `SplitRows` that a product reads, or 0.

    Two elements are up to 2 * 127 above a zero point of 128, and 2 * 255 above another; 127 of that
    can be multiplied at once.
    """
    if isa != AVX2:
        return 0
    return 9 if anchor in MAX_ASYMMETRIC_DEPTH else 3


def differences(region: Region, isa: Isa) -> tuple[str, ...]:
    """What is subtracted from sums: products of a number of each row and one of each column.

    `SplitRows` of activations with a zero point of their own may be less another number than that.
    """
    asymmetric = region.anchor in MAX_ASYMMETRIC_DEPTH
    centres = ("offsets", "column_sums") if asymmetric and isa == AVX2 else ()
    zero_points = ("row_sums", "wz") if region.anchor == "QMatMulU8U8" else ()
    return centres + zero_points


def _qmatmul(anchor: str) -> Family:
    return Family(
        ("K", "N"),
        anchor,
        "qmatmul",
        _qmatmul_parameters,
        _unsupported_qmatmul,
        _generate_qmatmul,
        _qmatmul_constants,
        _ISAS,
    )


def _joined(
    anchor: str,
    unsupported: Callable[[Region], str | None],
    parts: Callable[[Region], tuple[Region, ...]],
    *sizes: str,
) -> Family:
    """A product made of its own kernel and a Quantize's, with sizes beside K and N."""
    return dataclasses.replace(
        _qmatmul(anchor),
        sizes=("K", "N", *sizes),
        unsupported=unsupported,
        generate=None,
        parts=parts,
    )


W8_FAMILIES = {
    "QMatMulW8A8": _qmatmul("qc_qmatmul_w8a8"),
    "QMatMulU8S8": _qmatmul("qc_qmatmul_u8s8"),
    "QMatMulU8U8": _qmatmul("qc_qmatmul_u8u8"),
    "DynamicQMatMulW8A8": _joined(
        "qc_dynamic_qmatmul_w8a8", _unsupported_dynamic, quantizing_parts
    ),
    "WindowedQMatMulW8A8": _joined(
        "qc_windowed_qmatmul_w8a8", _unsupported_windowed, quantizing_parts, "R", "S"
    ),
    "RequantizedQMatMulW8A8": _joined(
        "qc_requantized_qmatmul_w8a8", _unsupported_requantized, requantizing_kernels
    ),
}

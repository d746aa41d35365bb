"""The families of kernels for GPUs: which anchor ops have one, and why a region may have none."""

from __future__ import annotations

import dataclasses

from qcompiler.ir.region import QUANTIZATION, Region
from qcompiler.targets.cuda.image_plan import unsupported_conv, unsupported_image
from qcompiler.targets.cuda.norm_plan import NORMS, unsupported_norm
from qcompiler.targets.cuda.packing import (
    CONV,
    CONV_IMAGE,
    CONVS,
    FOUR_BITS,
    IMAGE,
    INTEGERS,
    depth_of,
    packing,
)
from qcompiler.targets.epilogue import unsupported_epilogue

__all__ = ["FAMILIES", "Family", "unsupported"]

MAX_ELEMENTS = 1 << 30
"""Kernels index a row, and the packed weights, with int32."""
MAX_PACKED_BYTES = 1 << 30
"""The same of weights whose columns are padded, of which there may be one."""
MAX_INT8_DEPTH = (1 << 31) // (255 * 128) - 1
"""The longest sum of products of uint8 and int8 that an int32 surely holds."""
MAX_SPLIT_COLUMNS = 1 << 22
"""256 rows of so many columns are counted in an int32."""

MAX_PARTS = 8
"""`QC_MAX_PARTS` in `native/qcompiler.h`."""

_ALL = ("sm_80", "sm_89", "sm_90a")
_WITH_FP8 = ("sm_89", "sm_90a")


@dataclasses.dataclass(frozen=True)
class Family:
    """Kernels of one anchor op.

    Attributes:
        sizes: Names of a region's sizes, in order.
        archs: The architectures that can run them.
    """

    sizes: tuple[str, ...]
    archs: tuple[str, ...]


FAMILIES = {
    "QMatMulW4A16": Family(("K", "N", "G"), _ALL),
    "QMatMulW4Z4A16": Family(("K", "N", "G"), _ALL),
    "QMatMulW8A8": Family(("K", "N"), _ALL),
    "QMatMulFp8": Family(("K", "N"), _WITH_FP8),
    "Quantize": Family(("K",), _ALL),
    "QuantizeFp8": Family(("K",), _WITH_FP8),
    IMAGE: Family(("K",), _ALL),
    CONV: Family(("K", "N", "R", "S"), _ALL),
    CONV_IMAGE: Family(("K", "N", "R", "S"), _ALL),
    **{norm: Family(("K",), _WITH_FP8 if norm.endswith("Fp8") else _ALL) for norm in NORMS},
}


def unsupported(region: Region) -> str | None:
    """Why `region` has no kernel, or None when it has one."""
    family = FAMILIES.get(region.anchor)
    if family is None:
        return f"no kernel for {region.anchor}; there are {', '.join(FAMILIES)}"
    if tuple(name for name, _ in region.sizes) != family.sizes:
        return f"{region.anchor} takes the sizes {', '.join(family.sizes)}"
    if any(size < 1 for _, size in region.sizes):
        return f"a size of {dict(region.sizes)} is not positive"
    if any(size > MAX_ELEMENTS for _, size in region.sizes):
        return f"a size of {dict(region.sizes)} is more than 2^30"
    if "repeated" in region.extras:
        return "operands that repeat over the first dimensions have no kernel"
    if region.anchor == IMAGE:
        return unsupported_image(region)
    if region.anchor in CONVS and (reason := unsupported_conv(region)) is not None:
        return reason
    if "N" in family.sizes:
        return _unsupported_product(region)
    if region.anchor in NORMS:
        return unsupported_norm(region)
    return f"{region.anchor} takes no epilogue" if region.extras or region.steps else None


def _is_known_group(group: int, k: int) -> bool:
    """Whether a step of 16, or a chunk of 64, lies within one group."""
    return group in (16, 32) or group % 64 == 0 or group >= k


def _unsupported_product(region: Region) -> str | None:
    k, n = depth_of(region), region.size("N")
    if k * n > MAX_ELEMENTS:
        return f"{k} x {n} weights are more than 2^30"
    if (packed := packing(region).weight_bytes) > MAX_PACKED_BYTES:
        return f"{k} x {n} weights are {packed} bytes when padded; at most 2^30 are supported"
    if n > MAX_SPLIT_COLUMNS:
        return f"N={n}: at most {MAX_SPLIT_COLUMNS} columns are supported"
    if region.anchor in INTEGERS and k > MAX_INT8_DEPTH:
        return f"K={k}: an int32 sum of more than {MAX_INT8_DEPTH} products may overflow"
    if region.anchor in FOUR_BITS and not _is_known_group(region.size("G"), k):
        return f"groups of {region.size('G')}; known are 16, 32 and multiples of 64"
    if len(region.widths) > MAX_PARTS:
        return f"{len(region.widths)} results; at most {MAX_PARTS} are supported"
    if any(step.op in QUANTIZATION for step in region.steps):
        return "results that are quantized by constants have no kernel for GPUs"
    return unsupported_epilogue(region)

"""The kernels of products by weights of 4 bits: which have one, and their arguments.

Scales of two levels are multiplied when a session is made: the kernels are the same.  The sums of
groups beside them are so little work that they are plain C (native/group_sums.c).  What quantizes
its own result is made of two kernels, one of them a Quantize's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from qcompiler.ir.region import Region
from qcompiler.targets.epilogue import unsupported_epilogue
from qcompiler.targets.x86.family import (
    MAX_ELEMENTS,
    Family,
    misfit_of_quantized,
    misfit_of_results,
    requantizing_kernels,
)
from qcompiler.targets.x86.isa import AVX2, AVX512_VNNI, AVX_VNNI, Isa
from qcompiler.targets.x86.tile import TileShape

__all__ = ["EIGHT", "W4_FAMILIES", "Chunks", "chunks_of", "w4_tile"]

EIGHT = 8
"""Rows of weights that bytes hold two by two."""

_ISAS = (AVX512_VNNI, AVX_VNNI, AVX2)
_WIDENED = 32
"""After so many products AVX2 widens an int16."""


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How K is cut: into groups, and those into what is added up in integers.

    Attributes:
        size: Elements of a chunk, a multiple of 8.
        per_group: Chunks of a group.
        groups: How many there are, as many as scales of a column.
    """

    size: int
    per_group: int
    groups: int

    @property
    def count(self) -> int:
        """Of all chunks."""
        return self.per_group * self.groups

    @property
    def padded_k(self) -> int:
        """Elements of a row of activations."""
        return self.count * self.size

    @property
    def eights(self) -> int:
        """Of a panel."""
        return self.padded_k // EIGHT


def chunks_of(region: Region, isa: Isa) -> Chunks:
    """The chunks of a region; a single group is padded to whole ones."""
    k, group = region.size("K"), region.size("G")
    groups = -(-k // group)
    if groups == 1:
        group = -(-k // EIGHT) * EIGHT
    size = math.gcd(group, _WIDENED) if isa == AVX2 else group
    return Chunks(size, group // size, groups)


def w4_tile(isa: Isa) -> TileShape:
    """The tile for an instruction set."""
    return TileShape(8, 2) if isa == AVX512_VNNI else TileShape(4, 1)


def _unsupported(region: Region) -> str | None:
    k, n, group = (region.size(name) for name in ("K", "N", "G"))
    if group < k and group % EIGHT:
        return f"groups of {group}: kernels take multiples of {EIGHT}, or all of K"
    panels = [w4_tile(isa).columns for isa in _ISAS]
    if (reason := misfit_of_results(region, panels)) is not None:
        return reason
    columns = w4_tile(AVX512_VNNI).columns
    if -(-n // columns) * columns * (k + group) > MAX_ELEMENTS:
        return f"{k} x {n} weights: kernels take up to 2^30"
    return unsupported_epilogue(region)


def _generate(region: Region, isa: Isa) -> Any:
    from qcompiler.targets.x86.qmatmul_w4 import qmatmul_w4_function

    return qmatmul_w4_function(region, isa)


def _parameters(region: Region, isa: Isa) -> list[tuple[str, str]]:
    return [
        ("const uint8_t *", "a->q"),
        ("const int32_t *", "a->init"),
        ("const float *", "a->s"),
        ("const int8_t *", "a->weights"),
        ("const float *", "a->ws"),
        *(("const float *", f"a->extra[{i}]") for i in range(len(region.extras))),
        ("uint8_t *" if region.is_quantized else "float *", "a->y"),
        ("int32_t", "a->rows"),
        ("int32_t", "a->panel_begin"),
        ("int32_t", "a->panel_end"),
        *((("int32_t", "a->y_columns"), ("int32_t", "a->y_first")) if region.widths else ()),
    ]


def _constants(region: Region, isa: Isa) -> dict[str, int]:
    tile, chunks = w4_tile(isa), chunks_of(region, isa)
    return {
        "tile_rows": tile.rows,
        "tile_vectors": tile.vectors,
        "chunk": chunks.size,
        "chunks": chunks.count,
    }


def _family(anchor: str) -> Family:
    return Family(
        ("K", "N", "G"),
        anchor,
        "qmatmul",
        _parameters,
        _unsupported,
        _generate,
        _constants,
        _ISAS,
    )


def _unsupported_requantized(region: Region) -> str | None:
    return misfit_of_quantized(region) or _unsupported(region)


def _requantizing(anchor: str) -> Family:
    """A product made of its own kernel and a Quantize's."""
    return dataclasses.replace(
        _family(anchor),
        unsupported=_unsupported_requantized,
        generate=None,
        parts=requantizing_kernels,
    )


def _unsupported_sums(region: Region) -> str | None:
    return f"{region.anchor} takes no epilogue" if region.steps or region.extras else None


W4_FAMILIES = {
    "GroupSumsA8": Family(
        ("G",),
        "qc_group_sums",
        "",
        lambda region, isa: [],
        _unsupported_sums,
        None,
        isas=(AVX2,),
    ),
    "QMatMulW4A8": _family("qc_qmatmul_w4a8"),
    "QMatMulW4S8A8": _family("qc_qmatmul_w4s8a8"),
    "RequantizedQMatMulW4A8": _requantizing("qc_requantized_qmatmul_w4a8"),
    "RequantizedQMatMulW4S8A8": _requantizing("qc_requantized_qmatmul_w4s8a8"),
}

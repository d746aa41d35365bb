"""How a matrix multiplication is cut into register tiles.  Imports nothing heavy."""

from __future__ import annotations

import dataclasses

from qcompiler.targets.x86.isa import AVX512_VNNI, AVX_VNNI, Isa

__all__ = ["TileShape", "tile_shape"]

_LANES = 16
_ZMM = 32


@dataclasses.dataclass(frozen=True)
class TileShape:
    """`rows` activations rows by `vectors` vectors of 16 output columns."""

    rows: int
    vectors: int

    @property
    def columns(self) -> int:
        """Columns of y that one panel of weights makes."""
        return self.vectors * _LANES


# Accumulators, one step's weights and one broadcast must fit 32 zmm registers, and vpdpbusd needs 8
# to 10 independent accumulators to hide its latency.  Both keep weight loads under 22 byte/cycle.
_THREE_VECTORS = TileShape(8, 3)
_FOUR_VECTORS = TileShape(6, 4)
# Of 16 ymm, vpdpbusd takes 12 accumulators for its latency, two of weights, one of activations.
# AVX2 only adds to its sums, so that 8 are enough; the other registers hold weights of
# two groups and what is multiplied: 9% faster than 5 rows, whose sums are spilled (5% if widened).
_YMM_VNNI = TileShape(6, 1)
_YMM = TileShape(4, 1)

_WIDE = 128
"""From this many vectors on, one narrow panel at the edge costs less than 1%, and three vectors are
better: they read a third less of the weights per multiplication (8% at 32 x 4096 x 4096)."""


def tile_shape(n: int, isa: Isa = AVX512_VNNI) -> TileShape:
    """The tile for `n` output columns."""
    if isa.vectors < _ZMM:
        return _YMM_VNNI if isa == AVX_VNNI else _YMM
    vectors = -(-n // _LANES)
    missing_of_three, missing_of_four = -vectors % 3, -vectors % 4
    if vectors >= _WIDE or missing_of_three <= missing_of_four:
        return _THREE_VECTORS
    return _FOUR_VECTORS

"""The vector unit of each instruction set."""

from __future__ import annotations

from qcompiler.targets.x86.avx2 import Avx2, AvxVnni
from qcompiler.targets.x86.avx512 import Avx512
from qcompiler.targets.x86.isa import AVX2, AVX512_BF16, AVX512_VNNI, AVX_VNNI, Isa
from qcompiler.targets.x86.vector import VectorUnit

__all__ = ["unit_of"]

_UNITS: dict[str, VectorUnit] = {
    AVX512_BF16.name: Avx512(),
    AVX512_VNNI.name: Avx512(),
    AVX_VNNI.name: AvxVnni(),
    AVX2.name: Avx2(),
}


def unit_of(isa: Isa) -> VectorUnit:
    """The vector unit that kernels for `isa` are written in."""
    return _UNITS[isa.name]

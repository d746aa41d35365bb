"""The instruction sets that x86 kernels are compiled for.  Imports nothing heavy."""

from __future__ import annotations

import dataclasses

__all__ = ["AVX2", "AVX512_BF16", "AVX512_VNNI", "AVX_VNNI", "Isa"]


@dataclasses.dataclass(frozen=True)
class Isa:
    """An instruction set kernels are compiled for.

    `mcpu` is the oldest CPU LLVM knows that has it, but for `features` of LLVM to be added, so that
    the code runs on all of them; `c_name` is its description in targets/native/x86.c.  `vectors`
    counts the vectors of 16 lanes that its registers hold: 32 zmm, or 8 pairs of ymm.
    """

    name: str
    mcpu: str
    c_name: str
    features: tuple[str, ...] = ()
    vectors: int = 32


AVX512_VNNI = Isa("avx512-vnni", "cascadelake", "qc_avx512_vnni")
AVX512_BF16 = Isa("avx512-bf16", "cooperlake", "qc_avx512_bf16")
# No CPU that LLVM knows has AVX-VNNI and nothing else beyond AVX2.
AVX_VNNI = Isa("avx-vnni", "haswell", "qc_avx_vnni", ("+avxvnni",), vectors=8)
AVX2 = Isa("avx2", "haswell", "qc_avx2", vectors=8)

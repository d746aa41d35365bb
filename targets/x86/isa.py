"""The instruction sets that x86 kernels are compiled for.  Imports nothing heavy."""

from __future__ import annotations

import dataclasses

__all__ = ["AVX512_BF16", "AVX512_VNNI", "Isa"]


@dataclasses.dataclass(frozen=True)
class Isa:
    """An instruction set kernels are compiled for.

    `mcpu` is the oldest CPU LLVM knows that has it, so that the code runs on all of them; `c_name`
    is its description in targets/native/x86.c.
    """

    name: str
    mcpu: str
    c_name: str


AVX512_VNNI = Isa("avx512-vnni", "cascadelake", "qc_avx512_vnni")
AVX512_BF16 = Isa("avx512-bf16", "cooperlake", "qc_avx512_bf16")

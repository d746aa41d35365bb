"""The instruction sets that x86 kernels are compiled for.  Imports nothing heavy."""

from __future__ import annotations

import dataclasses

__all__ = ["AVX2", "AVX512_BF16", "AVX512_VNNI", "AVX_VNNI", "Isa"]


@dataclasses.dataclass(frozen=True)
class Isa:
    """An instruction set kernels are compiled for.

    `mcpu` is the oldest CPU LLVM knows that has it, but for `features` of LLVM to be added, so that
    the code runs on all of them; `c_name` is its description in targets/native/x86.c.  `vectors`
    counts the vectors of 16 lanes that its registers hold: 32 zmm, or 8 pairs of ymm; `options` are
    LLVM's own.
    """

    name: str
    mcpu: str
    c_name: str
    features: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    vectors: int = 32


_NO_HOISTING = (
    # It would keep constants of the epilogue in registers through the loop over K, and spill
    # accumulators there instead: a third of the time with a table for GELU in zmm, half of it with
    # Relu or Sigmoid in ymm.
    "-disable-machine-licm:bool=true",
)
_FOR_16_REGISTERS = (
    *_NO_HOISTING,
    # The generators unroll where it gains; what LLVM would add makes a GEMM's code twice as long.
    "-unroll-threshold-default:uint=20",
    "-unroll-threshold-aggressive:uint=20",
)
AVX512_VNNI = Isa("avx512-vnni", "cascadelake", "qc_avx512_vnni", (), _NO_HOISTING)
AVX512_BF16 = Isa("avx512-bf16", "cooperlake", "qc_avx512_bf16", (), _NO_HOISTING)
# No CPU that LLVM knows has AVX-VNNI and nothing else beyond AVX2.
AVX_VNNI = Isa("avx-vnni", "haswell", "qc_avx_vnni", ("+avxvnni",), _FOR_16_REGISTERS, vectors=8)
AVX2 = Isa("avx2", "haswell", "qc_avx2", (), _FOR_16_REGISTERS, vectors=8)

"""Kernels for x86-64: which regions they can compute, and their objects.

Importing this package does not import tvm; asking it for anything but names does.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

from qcompiler.ir.attention import BFLOAT16
from qcompiler.ir.region import HALF, Region
from qcompiler.targets.cache import content_key
from qcompiler.targets.x86.families import FAMILIES
from qcompiler.targets.x86.family import MAX_ELEMENTS
from qcompiler.targets.x86.isa import AVX2, AVX512_BF16, AVX512_VNNI, AVX_VNNI, Isa

__all__ = [
    "ISAS",
    "Isa",
    "best_isa",
    "compile_region",
    "fingerprint",
    "has_own_kernel",
    "isas_of",
    "kernel_symbol",
    "supports",
    "with_parts",
]


ISAS: tuple[Isa, ...] = (AVX512_VNNI, AVX_VNNI, AVX2)
"""In order of preference; a processor that has one has those after it that its ops lack."""


def isas_of(*regions: Region) -> tuple[Isa, ...]:
    """The instruction sets that any of `regions` is compiled for, in order of preference."""
    isas = {isa for region in regions for isa in FAMILIES[region.anchor].isas}
    if any(BFLOAT16 in region.flags for region in regions):
        isas.add(AVX512_BF16)
    return tuple(isa for isa in (AVX512_BF16, *ISAS) if isa in isas)


def best_isa(region: Region, isa: Isa) -> Isa:
    """The one of the instruction sets of `region` that a processor with `isa` would run best."""
    order = (AVX512_BF16, *ISAS)
    found = [one for one in isas_of(region) if order.index(one) >= order.index(isa)]
    return found[0]


def supports(region: Region) -> str | None:
    """Why `region` has no kernel, or None when it has one."""
    family = FAMILIES.get(region.anchor)
    if family is None:
        return f"no kernel for {region.anchor}; there are {', '.join(FAMILIES)}"
    if HALF in region.flags:
        return "x86 kernels compute in float32"
    if tuple(name for name, _ in region.sizes) != family.sizes:
        return f"{region.anchor} takes the sizes {', '.join(family.sizes)}"
    if any(size < 1 for _, size in region.sizes):
        return f"a size of {dict(region.sizes)} is not positive"
    if any(size > MAX_ELEMENTS for _, size in region.sizes):
        return f"a size of {dict(region.sizes)} is more than 2^30"
    return family.unsupported(region)


def with_parts(regions: Iterable[Region]) -> list[Region]:
    """The regions and those whose kernels they are made of, each once, by name."""
    found = {
        part for region in regions for part in (region, *FAMILIES[region.anchor].parts(region))
    }
    return sorted(found, key=lambda region: region.name)


def has_own_kernel(region: Region) -> bool:
    """Whether `region` is compiled, not made of others."""
    return FAMILIES[region.anchor].generate is not None


def kernel_symbol(region: Region, isa: Isa) -> str:
    """The C name of a kernel."""
    return f"{region.name}_{isa.name.replace('-', '_')}"


def compile_region(region: Region, isa: Isa) -> bytes:
    """The ELF object with the kernel of `region` for `isa`."""
    from qcompiler.targets import tir

    reason = supports(region)
    assert reason is None, reason
    family = FAMILIES[region.anchor]
    assert family.generate is not None, f"{region.anchor} is made of other kernels"
    function = family.generate(region, isa)
    functions = {kernel_symbol(region, isa): function}
    return tir.compile_object(functions, isa.mcpu, isa.features, isa.options)


@functools.cache
def fingerprint() -> str:
    """A hash of all that decides what a kernel does: our sources and the version of TVM."""
    targets = Path(__file__).resolve().parents[1]
    sources = [*targets.glob("*.py"), *targets.glob("x86/*.py"), *targets.glob("native/*.[ch]")]
    # The dialect's constants are compiled into kernels, a region's name is an op's.
    sources += [*(targets.parent / "ir").glob("dialect*.py"), targets.parent / "ir" / "region.py"]
    parts: list[str | bytes] = [importlib.metadata.version("apache-tvm")]
    for source in sorted(sources):
        parts += [source.name, source.read_bytes()]
    return content_key(*parts)

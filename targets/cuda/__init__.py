"""Kernels for NVIDIA GPUs: which regions they can compute, and their CUDA source.

Importing this package does not import tvm; asking it for `source` does.
"""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path

from qcompiler.ir.region import Region
from qcompiler.targets.cache import content_key
from qcompiler.targets.cuda import plan
from qcompiler.targets.cuda.families import FAMILIES, unsupported
from qcompiler.targets.cuda.launch import Launch
from qcompiler.targets.cuda.packing import Packing, packing

__all__ = [
    "ARCHS",
    "FAMILIES",
    "Launch",
    "Packing",
    "archs_of",
    "fingerprint",
    "launches",
    "packing",
    "source",
    "supports",
]

ARCHS = ("sm_80", "sm_89", "sm_90a")
"""What cubins are made for; sm_80 also runs on sm_86 and sm_87, sm_89 on nothing else."""


def archs_of(region: Region) -> tuple[str, ...]:
    """The architectures that a region has kernels for."""
    return FAMILIES[region.anchor].archs


def supports(region: Region) -> str | None:
    """Why `region` has no kernel, or None when it has one."""
    return unsupported(region)


def launches(region: Region, arch: str) -> tuple[Launch, ...]:
    """The kernels of `region`, in order of the rows they take."""
    assert arch in archs_of(region), f"{region.anchor} has no kernel for {arch}"
    return plan.launches(region, arch)


def source(region: Region, arch: str) -> str:
    """The CUDA C text that holds the kernels of `launches(region, arch)`."""
    from qcompiler.targets.cuda.generate import source_of

    reason = supports(region)
    assert reason is None, reason
    return source_of(region, arch)


@functools.cache
def fingerprint() -> str:
    """A hash of all that decides what a kernel does: our sources and the version of TVM."""
    targets = Path(__file__).resolve().parents[1]
    sources = [*targets.glob("*.py"), *targets.glob("cuda/*.py")]
    sources += [*(targets.parent / "ir").glob("dialect*.py"), targets.parent / "ir" / "region.py"]
    parts: list[str | bytes] = [importlib.metadata.version("apache-tvm")]
    for path in sorted(sources):
        parts += [path.name, path.read_bytes()]
    return content_key(*parts)

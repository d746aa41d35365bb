"""Kernels for x86-64: which regions they can compute, and their objects.

Importing this package does not import tvm; asking it for anything but names does.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from pathlib import Path

from qcompiler.ir.region import Region
from qcompiler.targets.cache import content_key
from qcompiler.targets.epilogue import unsupported_step
from qcompiler.targets.x86.tile import tile_shape

__all__ = ["ISAS", "Isa", "compile_region", "fingerprint", "kernel_symbol", "supports"]


@dataclasses.dataclass(frozen=True)
class Isa:
    """An instruction set kernels are compiled for.

    `mcpu` is the oldest CPU LLVM knows that has it, so that the code runs on all of them; `c_name`
    is its description in targets/native/x86.c.
    """

    name: str
    mcpu: str
    c_name: str


ISAS: tuple[Isa, ...] = (Isa("avx512-vnni", "cascadelake", "qc_avx512_vnni"),)
"""In order of preference; a library holds every kernel for each."""

_ANCHORS = {"Quantize": ("K",), "QMatMulW8A8": ("K", "N")}
_MAX_EXTRAS = 8
_MAX_ELEMENTS = 1 << 30
"""Kernels index a row, and the packed weights, with int32."""
_MAX_K = (1 << 31) // (128 * 128) - 1
"""The longest sum of int8 products that an int32 surely holds."""


def supports(region: Region) -> str | None:
    """Why `region` has no kernel, or None when it has one."""
    sizes = _ANCHORS.get(region.anchor)
    if sizes is None:
        return f"no kernel for {region.anchor}; there are {', '.join(_ANCHORS)}"
    if tuple(name for name, _ in region.sizes) != sizes:
        return f"{region.anchor} takes the sizes {', '.join(sizes)}"
    if any(size < 1 for _, size in region.sizes):
        return f"a size of {dict(region.sizes)} is not positive"
    if any(size > _MAX_ELEMENTS for _, size in region.sizes):
        return f"a size of {dict(region.sizes)} is more than 2^30"
    if region.anchor == "Quantize":
        return "Quantize takes no epilogue" if region.extras or region.steps else None
    return _unsupported_product(region) or _unsupported_epilogue(region)


def _unsupported_product(region: Region) -> str | None:
    k, n = region.size("K"), region.size("N")
    if k > _MAX_K:
        return f"K={k}: an int32 sum of more than {_MAX_K} products may overflow"
    columns = tile_shape(n).columns
    if -(-n // columns) * columns * -(-k // 4) * 4 > _MAX_ELEMENTS:
        return f"{k} x {n} weights take more than 2^30 bytes"
    return None


def _unsupported_epilogue(region: Region) -> str | None:
    if len(region.extras) > _MAX_EXTRAS:
        return f"{len(region.extras)} extra operands; at most {_MAX_EXTRAS} are supported"
    if not region.steps:
        return None
    for position, step in enumerate(region.steps):
        if not all(-len(region.extras) <= arg <= position for arg in step.args):
            return f"step {position} ({step.op}) reads values that do not exist: {step.args}"
        if reason := unsupported_step(step):
            return reason
    return None


def kernel_symbol(region: Region, isa: Isa) -> str:
    """The C name of a kernel."""
    return f"{region.name}_{isa.name.replace('-', '_')}"


def compile_region(region: Region, isa: Isa) -> bytes:
    """The ELF object with the kernel of `region` for `isa`."""
    from qcompiler.targets import tir
    from qcompiler.targets.x86.qmatmul import qmatmul_function
    from qcompiler.targets.x86.quantize import quantize_function

    reason = supports(region)
    assert reason is None, reason
    function = (
        quantize_function(region.size("K"))
        if region.anchor == "Quantize"
        else qmatmul_function(region)
    )
    return tir.compile_object({kernel_symbol(region, isa): function}, isa.mcpu)


@functools.cache
def fingerprint() -> str:
    """A hash of all that decides what a kernel does: our sources and the version of TVM."""
    targets = Path(__file__).resolve().parents[1]
    sources = [targets / name for name in ("tir.py", "epilogue.py", "kernel_table.py")]
    sources += [*targets.glob("x86/*.py"), *targets.glob("native/*.[ch]")]
    parts: list[str | bytes] = [importlib.metadata.version("apache-tvm")]
    for source in sorted(sources):
        parts += [source.name, source.read_bytes()]
    return content_key(*parts)

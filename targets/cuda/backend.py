"""The kernels of a library for GPUs: a cubin per region and architecture."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from qcompiler.ir.errors import ToolchainError
from qcompiler.ir.region import HALF, Region
from qcompiler.targets import cuda
from qcompiler.targets.backend import Workshop, native_headers, native_text
from qcompiler.targets.cache import content_key
from qcompiler.targets.cubin import CubinCompiler, find_cubin_compiler
from qcompiler.targets.cuda.table import cubin_name, cuda_table

__all__ = ["CudaBackend"]


class CudaBackend:
    """See `targets/backend.py`.

    Args:
        flags: More flags to compile the C code with; tests replace the driver with them.
        compiler: Of cubins; by default the one that this machine has.
    """

    all_isas: tuple[str, ...] = tuple(reversed(cuda.ARCHS))
    glue: tuple[str, ...] = (
        "cpu.c", "cuda_conv.c", "cuda_driver.c", "cuda_find.c", "cuda_node.c", "cuda_ops.c",
        "cuda_pack.c", "ort.c", "qcompiler.c", "twin_conv.c", "twin_norm.c", "twins.c",
    )  # fmt: skip
    # Kernels that were loaded onto a GPU stay there: a library that comes back must know of them.
    link_flags: tuple[str, ...] = ("-Wl,-z,nodelete",)

    def __init__(self, flags: tuple[str, ...] = (), compiler: CubinCompiler | None = None) -> None:
        self.flags, self._given = flags, compiler

    def supports(self, region: Region) -> str | None:
        """Why `region` has no kernel, or None when it has one."""
        if region.anchor in cuda.FAMILIES and HALF not in region.flags:
            return "kernels for GPUs take floats of 16 bits"
        if (reason := cuda.supports(region)) is not None or self._given is not None:
            return reason
        # Looked for once: it starts a process.
        where = os.environ.get("PATH"), os.environ.get("CUDA_HOME")
        return _no_compiler(find_cubin_compiler, *where)

    def fingerprint(self) -> str:
        """A hash of all that decides what kernels and glue do."""
        texts = map(native_text, self.glue)
        return content_key(cuda.fingerprint(), *native_headers().values(), *texts)

    def compiler(self) -> str:
        """The one of cubins."""
        return self._compiler().name

    def complete(self, regions: Iterable[Region]) -> list[Region]:
        """The regions, each once, by name."""
        return sorted(set(regions), key=lambda region: region.name)

    def isas(self, regions: Sequence[Region]) -> tuple[str, ...]:
        """The architectures that any of `regions` is compiled for, best first."""
        found = {arch for region in regions for arch in cuda.archs_of(region)}
        return tuple(arch for arch in self.all_isas if arch in found)

    def objects(self, regions: Sequence[Region], domain: str, workshop: Workshop) -> list[bytes]:
        """The object of the table, with all cubins in it."""
        compiler = self._compiler()
        cubins = self._cubins(regions, compiler, workshop)
        table = cuda_table(regions, domain, cubins, compiler.version)
        return [workshop.compiled("kernels.c", table, cubins)]

    def _cubins(
        self, regions: Sequence[Region], compiler: CubinCompiler, workshop: Workshop
    ) -> dict[str, bytes]:
        """The machine code of all regions and architectures, by `cubin_name`."""
        cubins: dict[str, bytes] = {}
        pending: dict[str, Future[bytes]] = {}
        cache = workshop.cache
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for region, arch in _wanted(regions):
                name = cubin_name(region, arch)
                key = content_key("cubin", cuda.fingerprint(), compiler.name, arch, repr(region))
                if (content := cache.get(key)) is not None:
                    cubins[name] = content
                    continue
                workshop.tell(f"compile {region.name} for {arch} with {compiler.name}")
                # TVM writes the text here, one after the other; the compiler is a process, or C.
                make = partial(compiler.compile, self.source(region, arch), arch)
                pending[name] = pool.submit(cache.get_or_make, key, make)
        return cubins | {name: future.result() for name, future in pending.items()}

    def _compiler(self) -> CubinCompiler:
        return self._given or find_cubin_compiler()

    def source(self, region: Region, arch: str) -> str:
        """The CUDA text of a region's kernels."""
        return cuda.source(region, arch)


@functools.cache
def _no_compiler(find: Callable[[], CubinCompiler], *where: str | None) -> str | None:
    """Why no kernel can be compiled on this machine, if `find` finds nothing in these places."""
    try:
        find()
    except ToolchainError as error:
        return str(error)
    return None


def _wanted(regions: Sequence[Region]) -> list[tuple[Region, str]]:
    return [(region, arch) for region in regions for arch in cuda.archs_of(region)]

"""The kernels of a library for x86: objects that LLVM made, for several instruction sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing

from qcompiler.ir.errors import ToolchainError
from qcompiler.ir.region import Region
from qcompiler.targets import x86
from qcompiler.targets.backend import Workshop
from qcompiler.targets.cache import content_key
from qcompiler.targets.elf import undefined_symbols
from qcompiler.targets.processes import in_processes
from qcompiler.targets.x86.table import x86_table

__all__ = ["X86Backend", "check_self_contained"]

_FROM_LIBC = {"memcpy", "memmove", "memset"}
"""What LLVM may call from a kernel; all else means an op was not lowered to instructions."""


class X86Backend:
    """See `targets/backend.py`."""

    all_isas: tuple[str, ...] = tuple(isa.name for isa in x86.ISAS)
    glue: tuple[str, ...] = (
        "attention.c", "centred_rows.c", "cpu.c", "group_sums.c", "norm.c", "ort.c", "qcompiler.c",
        "qmatmul.c", "qmatmul_bind.c", "qmatmul_w4.c", "qmatmul_work.c", "quantize.c",
        "requantized.c", "split_rows.c", "x86.c",
    )  # fmt: skip
    flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()

    def supports(self, region: Region) -> str | None:
        """Why `region` has no kernel, or None when it has one."""
        return x86.supports(region)

    def fingerprint(self) -> str:
        """A hash of all that decides what kernels and glue do."""
        return x86.fingerprint()

    def compiler(self) -> str:
        """Nothing but TVM, whose version is in the fingerprint."""
        return ""

    def complete(self, regions: Iterable[Region]) -> list[Region]:
        """The regions and those they are made of, each once, by name."""
        return x86.with_parts(regions)

    def isas(self, regions: Sequence[Region]) -> tuple[str, ...]:
        """The instruction sets that any of `regions` is compiled for, best first."""
        return tuple(isa.name for isa in x86.isas_of(*regions))

    def objects(self, regions: Sequence[Region], domain: str, workshop: Workshop) -> list[bytes]:
        """The objects of the kernels and of their table."""
        wanted = [
            (region, isa)
            for region in regions
            if x86.has_own_kernel(region)
            for isa in x86.isas_of(region)
        ]
        kernels = _kernel_objects(wanted, workshop)
        return [*kernels, workshop.compiled("kernels.c", x86_table(regions, domain))]


def _kernel_objects(wanted: Sequence[tuple[Region, x86.Isa]], workshop: Workshop) -> list[bytes]:
    """The kernels, those that were not compiled before by several processes."""
    keys = [content_key("kernel", x86.fingerprint(), repr(isa), repr(r)) for r, isa in wanted]
    found = {key: content for key in keys if (content := workshop.cache.get(key)) is not None}
    jobs = {key: job for key, job in zip(keys, wanted, strict=True) if key not in found}
    with closing(in_processes(x86.compile_region, list(jobs.values()))) as compiled:
        for (key, (region, isa)), content in zip(jobs.items(), compiled, strict=True):
            workshop.tell(f"compiled {region.name} for {isa.name}")
            check_self_contained(region.name, content)
            workshop.cache.put(key, content)
            found[key] = content
    return [found[key] for key in keys]


def check_self_contained(name: str, content: bytes) -> None:
    """Refuse an object that needs TVM's runtime, whose workspaces leak, or libm, which is slow.

    Raises:
        ToolchainError: naming the symbols.
    """
    foreign = sorted(undefined_symbols(content) - _FROM_LIBC)
    if foreign:
        raise ToolchainError(
            f"kernel {name} needs {', '.join(foreign)}, which the library does not have; "
            "please report this region to qcompiler"
        )

"""The kernels of a library for x86: objects that LLVM made, for several instruction sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qcompiler.ir.errors import ToolchainError
from qcompiler.ir.region import Region
from qcompiler.targets import x86
from qcompiler.targets.backend import Workshop
from qcompiler.targets.cache import content_key
from qcompiler.targets.elf import undefined_symbols
from qcompiler.targets.x86.table import x86_table

__all__ = ["X86Backend", "check_self_contained"]

_FROM_LIBC = {"memcpy", "memmove", "memset"}
"""What LLVM may call from a kernel; all else means an op was not lowered to instructions."""


class X86Backend:
    """See `targets/backend.py`."""

    all_isas: tuple[str, ...] = tuple(isa.name for isa in x86.ISAS)
    glue: tuple[str, ...] = (
        "attention.c", "norm.c", "ort.c", "qcompiler.c", "qmatmul.c", "qmatmul_work.c",
        "quantize.c", "x86.c",
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
        kernels = [
            _kernel_object(region, isa, workshop)
            for region in regions
            if x86.has_own_kernel(region)
            for isa in x86.isas_of(region)
        ]
        return [*kernels, workshop.compiled("kernels.c", x86_table(regions, domain))]


def _kernel_object(region: Region, isa: x86.Isa, workshop: Workshop) -> bytes:
    def make() -> bytes:
        workshop.tell(f"compile {region.name} for {isa.name}")
        content = x86.compile_region(region, isa)
        check_self_contained(region.name, content)
        return content

    key = content_key("kernel", x86.fingerprint(), repr(isa), repr(region))
    return workshop.cache.get_or_make(key, make)


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

"""From regions to the ONNX Runtime custom-op library that holds their kernels."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qcompiler.ir.errors import OptionError, ToolchainError
from qcompiler.ir.region import Region
from qcompiler.targets import x86
from qcompiler.targets.cache import KernelCache, content_key, write_atomically
from qcompiler.targets.elf import glibc_version, undefined_symbols
from qcompiler.targets.kernel_table import kernel_table
from qcompiler.targets.toolchain import Linker, find_linker

__all__ = ["KernelCache", "Library", "build_library", "check_self_contained", "kernel_objects"]

_NATIVE = Path(__file__).resolve().parent / "native"
_ENTRY_POINT = "RegisterCustomOps"
_FROM_LIBC = {"memcpy", "memmove", "memset"}
"""What LLVM may call from a kernel; all else means an op was not lowered to instructions."""

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Library:
    """A library that was built: for which instruction sets, by what, and what it needs."""

    path: Path
    isa: tuple[str, ...]
    minimum_glibc: str
    linker: str
    seconds: float


def build_library(
    regions: Sequence[Region],
    domain: str,
    output: Path,
    *,
    cache: KernelCache,
    progress: Progress | None = None,
) -> Library:
    """Write the library with one op per region, named `region.name`, in `domain`.

    The same regions (in any order), domain and tools give the same bytes.

    Args:
        regions: at least one; each must pass `x86.supports`. Equal ones are built once.
        domain: the ONNX domain of the ops, such as "qcompiler.1a2b3c4d".
        output: the path of the library; replaced in one step if it exists.
        cache: where kernels and libraries built before are found.
        progress: called with one line about each slow step.

    Raises:
        ToolchainError: if there is no C compiler, or it fails, or a kernel is not self-contained.
        OptionError: if the disk refuses the library.
    """
    start = time.perf_counter()
    tell = progress or (lambda _: None)
    linker = find_linker()
    unique = x86.with_parts(regions)
    isas = x86.isas_of(*unique)
    key = content_key("library", x86.fingerprint(), linker.identity, domain, repr((unique, isas)))

    def make() -> bytes:
        objects = kernel_objects(unique, cache, tell)
        objects += _glue_objects(kernel_table(unique, domain), linker, cache, tell)
        tell(f"link {len(unique)} kernels with {linker.name}")
        return linker.link(objects, [_ENTRY_POINT])

    image = cache.get_or_make(key, make)
    try:
        write_atomically(output, image, mode=0o755)
    except OSError as error:
        raise OptionError(f"cannot write {output}: {error.strerror}") from error
    return Library(
        path=output,
        isa=tuple(isa.name for isa in isas),
        minimum_glibc=glibc_version(image),
        linker=linker.name,
        seconds=time.perf_counter() - start,
    )


def kernel_objects(
    regions: Sequence[Region], cache: KernelCache, progress: Progress
) -> list[bytes]:
    """The objects of all kernels of `regions`, one per instruction set."""
    return [
        _kernel_object(region, isa, cache, progress)
        for region in regions
        if x86.has_own_kernel(region)
        for isa in x86.isas_of(region)
    ]


def _kernel_object(region: Region, isa: x86.Isa, cache: KernelCache, progress: Progress) -> bytes:
    def make() -> bytes:
        progress(f"compile {region.name} for {isa.name}")
        content = x86.compile_region(region, isa)
        check_self_contained(region.name, content)
        return content

    return cache.get_or_make(
        content_key("kernel", x86.fingerprint(), repr(isa), repr(region)), make
    )


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


def _glue_objects(
    table: str, linker: Linker, cache: KernelCache, progress: Progress
) -> list[bytes]:
    """The library's own C files and the table, compiled."""
    headers = {path.name: path.read_text() for path in sorted(_NATIVE.glob("*.h"))}
    sources = {path.name: path.read_text() for path in sorted(_NATIVE.glob("*.c"))}

    def compiled(name: str, text: str) -> bytes:
        def make() -> bytes:
            progress(f"compile {name} with {linker.name}")
            return linker.compile(text, headers)

        return cache.get_or_make(
            content_key("glue", linker.identity, text, *headers.values()), make
        )

    return [compiled(name, text) for name, text in {**sources, "kernels.c": table}.items()]

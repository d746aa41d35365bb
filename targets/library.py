"""From regions to the ONNX Runtime custom-op library that holds their kernels."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qcompiler.ir.errors import OptionError, ToolchainError
from qcompiler.ir.region import Region
from qcompiler.targets.backend import Backend, Workshop, backend_of, native_text
from qcompiler.targets.cache import KernelCache, content_key, write_atomically
from qcompiler.targets.elf import glibc_version
from qcompiler.targets.toolchain import find_linker

__all__ = ["KernelCache", "Library", "build_library"]

_ENTRY_POINT = "RegisterCustomOps"

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
    arch: str | Backend = "x86",
    progress: Progress | None = None,
) -> Library:
    """Write the library with one op per region, named `region.name`, in `domain`.

    The same regions (in any order), domain and tools give the same bytes.

    Args:
        regions: at least one, all supported by the backend. Equal ones are built once.
        domain: the ONNX domain of the ops, such as "qcompiler.1a2b3c4d".
        output: the path of the library; replaced in one step if it exists.
        cache: where kernels and libraries built before are found.
        arch: the architecture ("x86", "cuda"), or a backend of one's own.
        progress: called with one line about each slow step.

    Raises:
        ToolchainError: if there is no C compiler, or none for GPUs where those are meant, or it
            fails, or a kernel is not self-contained, or nothing is written for the architecture.
        OptionError: if the disk refuses the library.
    """
    start = time.perf_counter()
    backend = backend_of(arch) if isinstance(arch, str) else arch
    if backend is None:
        raise ToolchainError(f"there are no kernels for {arch} yet")
    linker = find_linker()
    workshop = Workshop(linker, cache, progress or (lambda _: None))
    unique = backend.complete(regions)
    isas = backend.isas(unique)
    flags = repr((backend.flags, backend.link_flags))
    key = content_key(
        "library", backend.fingerprint(), backend.compiler(), flags, linker.identity, domain,
        repr((unique, isas)),
    )  # fmt: skip

    def make() -> bytes:
        objects = backend.objects(unique, domain, workshop)
        objects += [
            workshop.compiled(name, native_text(name), flags=backend.flags) for name in backend.glue
        ]
        workshop.tell(f"link {len(unique)} kernels with {linker.name}")
        return linker.link(objects, [_ENTRY_POINT], backend.link_flags)

    image = cache.get_or_make(key, make)
    _write(output, image)
    return Library(
        path=output,
        isa=isas,
        minimum_glibc=glibc_version(image),
        linker=linker.name,
        seconds=time.perf_counter() - start,
    )


def _write(output: Path, image: bytes) -> None:
    try:
        write_atomically(output, image, mode=0o755)
    except OSError as error:
        raise OptionError(f"cannot write {output}: {error.strerror}") from error

"""What a library needs of an architecture, and where each one is.

A backend compiles the kernels of regions and writes the table (`kernels.c`) that tells the C code
in `native/` about them; `library.py` adds that code and links.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from qcompiler.ir.region import Region
from qcompiler.targets.cache import KernelCache, content_key
from qcompiler.targets.toolchain import Linker

__all__ = ["Backend", "Workshop", "backend_of", "native_headers", "native_text"]

_NATIVE = Path(__file__).resolve().parent / "native"

Progress = Callable[[str], None]


class Workshop:
    """Makes objects, each once: the linker, the cache, and who hears of slow steps."""

    def __init__(self, linker: Linker, cache: KernelCache, tell: Progress) -> None:
        self.linker, self.cache, self.tell = linker, cache, tell

    def compiled(
        self, name: str, text: str, files: Mapping[str, bytes] | None = None,
        flags: Sequence[str] = (),
    ) -> bytes:  # fmt: skip
        """The object of a C text.

        Args:
            name: What to call it.
            text: May include the headers of `native/`.
            files: What its assembly includes, by name.
            flags: More of the compiler.

        Raises:
            ToolchainError: It does not compile.
        """
        headers, files = native_headers(), files or {}

        def make() -> bytes:
            self.tell(f"compile {name} with {self.linker.name}")
            return self.linker.compile(text, headers, flags, files)

        key = content_key(
            "glue", self.linker.identity, text, repr(flags), *headers.values(), *files.values()
        )
        return self.cache.get_or_make(key, make)


class Backend(Protocol):
    """The kernels of an architecture.

    Attributes:
        all_isas: The instruction sets that kernels are written for, best first.
        glue: The files of `native/` that run them.
        flags: More flags to compile those with.
        link_flags: The same of the linker.
    """

    all_isas: tuple[str, ...]
    glue: tuple[str, ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]

    def supports(self, region: Region) -> str | None:
        """Why `region` has no kernel, or None when it has one."""

    def fingerprint(self) -> str:
        """A hash of all that decides what kernels and glue do."""

    def compiler(self) -> str:
        """Which compiler is used that `fingerprint` does not tell; it may differ by machine.

        Raises:
            ToolchainError: There is none.
        """

    def complete(self, regions: Iterable[Region]) -> list[Region]:
        """The regions and those they are made of, each once, by name."""

    def isas(self, regions: Sequence[Region]) -> tuple[str, ...]:
        """The instruction sets that any of `regions` is compiled for, best first."""

    def objects(self, regions: Sequence[Region], domain: str, workshop: Workshop) -> list[bytes]:
        """The objects of the kernels and of their table.

        Args:
            regions: From `complete`.
            domain: Of the ops.
            workshop: Makes what was not made before.

        Raises:
            ToolchainError: A kernel cannot be compiled, or is not self-contained.
        """


def backend_of(arch: str) -> Backend | None:
    """The backend of "x86", "arm" or "cuda"; None where no kernels are written yet."""
    if arch == "x86":
        from qcompiler.targets.x86.backend import X86Backend

        return X86Backend()
    if arch == "cuda":
        from qcompiler.targets.cuda.backend import CudaBackend

        return CudaBackend()
    return None


def native_text(name: str) -> str:
    """A C file of ours."""
    return (_NATIVE / name).read_text()


@functools.cache
def native_headers() -> dict[str, str]:
    """The headers of all C files."""
    return {path.name: path.read_text() for path in sorted(_NATIVE.glob("*.h"))}

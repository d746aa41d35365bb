"""Cubins for `cuda.py`: compiled where they are needed, or beforehand, for a machine that is lent.

python benchmarks/cuda.py --prepare prepared           anywhere; needs TVM and a CUDA compiler
python benchmarks/cuda.py --prepared prepared          on the GPU's machine; needs neither
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from qcompiler.ir.region import Region
from qcompiler.targets import cuda
from qcompiler.targets.cache import KernelCache, content_key
from qcompiler.targets.cubin import CubinCompiler

__all__ = ["Compiled", "Cubins", "PackError", "Packed", "prepare"]

_ABOUT = "about.json"


class PackError(Exception):
    """A file of cubins that does not fit; the message says why."""


class Cubins(Protocol):
    """What has the machine code of regions.

    Attributes:
        name: The compiler that made it.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    def cubin(self, region: Region, arch: str) -> bytes:
        """That of all kernels of a region."""


class Compiled:
    """Compiled when they are asked for, and kept in the cache."""

    def __init__(self, compiler: CubinCompiler) -> None:
        self.compiler, self.name = compiler, compiler.name

    def cubin(self, region: Region, arch: str) -> bytes:
        """See `Cubins`."""
        key = content_key("cubin", cuda.fingerprint(), self.name, arch, repr(region))
        return KernelCache().get_or_make(
            key, lambda: self.compiler.compile(cuda.source(region, arch), arch)
        )


class Packed:
    """Those of a file.

    Raises:
        PackError: It is no such file, or was made of other sources than these.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = zipfile.ZipFile(path)
            about = json.loads(self._file.read(_ABOUT))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            what = f"{path} is no file of cubins ({error})"
            raise PackError(f"{what}: make it with --prepare") from error
        if about["sources"] != _sources():
            raise PackError(f"{path} was made of other sources than these: --prepare it again")
        self._path, self.name = path, str(about["compiler"])

    def cubin(self, region: Region, arch: str) -> bytes:
        """See `Cubins`."""
        try:
            return self._file.read(_name(region, arch))
        except KeyError:
            raise PackError(f"{self._path} has no kernels of {region.name} for {arch}") from None


def prepare(
    path: Path, regions: Iterable[Region], archs: Iterable[str], compiler: CubinCompiler,
    tell: Callable[[str], None],
) -> None:  # fmt: skip
    """Compile the regions into a file that `Packed` reads."""
    compiled = Compiled(compiler)
    wanted = [(r, a) for r in dict.fromkeys(regions) for a in archs if a in cuda.archs_of(r)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(_ABOUT, json.dumps({"sources": _sources(), "compiler": compiler.name}))
        for region, arch in wanted:
            cubin = compiled.cubin(region, arch)
            file.writestr(_name(region, arch), cubin)
            tell(f"{region.name} for {arch}: {len(cubin) // 1024} KiB")


def _name(region: Region, arch: str) -> str:
    return f"{arch}/{content_key(repr(region))}"


def _sources() -> str:
    """A hash of what writes and runs kernels, without TVM, which may be missing here."""
    folder = Path(cuda.__file__).parent
    sources = [*folder.glob("*.py"), *folder.parent.glob("native/*.[ch]")]
    return content_key(*(path.read_bytes() for path in sorted(sources)))

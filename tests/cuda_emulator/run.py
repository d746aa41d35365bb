"""Compiles a translated source, and runs the launches of a region as the library would."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_emulator.translate import translate
from qcompiler.targets.cuda import Launch

__all__ = ["Emulated", "EmulatorError", "kernels_of", "needs_compiler"]

Array = NDArray[Any]
_HERE = Path(__file__).resolve().parent
_PATIENCE = 300
_FLAGS = [
    "-fno-strict-aliasing", "-fno-sanitize=undefined", "-U_FORTIFY_SOURCE", f"-I{_HERE}",
    # Of a thread's stack, which is 192 KiB.
    "-Werror=frame-larger-than=131072",
]  # fmt: skip


def _compiler() -> list[str] | None:
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    return None


needs_compiler = pytest.mark.skipif(
    _compiler() is None, reason="no C++ compiler: g++, clang++, zig"
)


class EmulatorError(Exception):
    """A kernel did what it must not do; the message says which thread, and what."""


@dataclasses.dataclass(frozen=True)
class _Way:
    numbers: Mapping[str, int]
    backwards: bool
    fault: int


def _build(folder: Path, *words: str) -> None:
    command = [*(_compiler() or []), *_FLAGS, *words]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=_PATIENCE
    )
    assert done.returncode == 0, done.stderr[:4000]


def kernels_of(*launches: Launch) -> tuple[str, ...]:
    """The names of all kernels that launches need."""
    both = [name for launch in launches for name in (launch.symbol, launch.combine)]
    return tuple(dict.fromkeys(name for name in both if name is not None))


@functools.cache
def _runtime() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    """What all kernels share, compiled once and optimized; and its folder, which lives as long."""
    folder = tempfile.TemporaryDirectory(prefix="cuda_emulator_")
    path = Path(folder.name, "runtime.o")
    _build(path.parent, "-std=c++17", "-O2", "-c", str(_HERE / "runtime.cpp"), "-o", path.name)
    return path, folder


class Emulated:
    """The kernels of a CUDA source, to be run on the CPU."""

    def __init__(
        self,
        source: str,
        folder: Path,
        results: Collection[str] = (),
        only: Collection[str] | None = None,
    ) -> None:
        """Compile.

        Args:
            source: As TVM writes it.
            folder: For the program, and for what it reads and writes.
            results: The parameters that kernels write, where these are several.
            only: The names of the kernels that will run; all without.
        """
        self._results = frozenset(results)
        self._folder, self._program = folder, folder / "kernels"
        (folder / "kernels.cpp").write_text(translate(source, only))
        runtime, _ = _runtime()
        # Unoptimized: the runtime is what takes time.  Hexadecimal floats are GNU's before C++17,
        # whose headers take longer than a kernel.
        _build(folder, "-std=gnu++14", "-O0", "kernels.cpp", str(runtime), "-o", "kernels")

    def run(
        self,
        launch: Launch,
        columns: int,
        arrays: Mapping[str, Array],
        rows: int,
        backwards: bool = False,
        fault: int = 0,
        **sizes: int,
    ) -> None:
        """One launch and, if K is split, the sum of its parts; results are written to `arrays`.

        Warps and lanes take turns in the order of their numbers, or `backwards`.  `fault` is the
        number of the planted one that is to happen.  `sizes` are what kernels take beside `rows`.

        Raises:
            EmulatorError: A thread misbehaved.
        """
        grid = (-(-columns // launch.block_columns), max(1, -(-rows // launch.block_rows)))

        def of(parameters: Collection[str]) -> dict[str, Array]:
            return {name: every[name] for name in parameters if name not in how.numbers}

        every, how = dict(arrays), _Way({"rows": rows, **sizes}, backwards, fault)
        if launch.combine is not None:
            every["workspace"] = np.full((launch.splits, rows, columns), np.nan, np.float32)
        self._kernel(
            launch.symbol, (*grid, launch.splits), launch.threads, launch.shared_bytes,
            of(launch.parameters), how,
        )  # fmt: skip
        if launch.combine is not None:
            blocks = -(-rows * columns // (launch.threads * 4))
            self._kernel(
                launch.combine, (blocks, 1, 1), launch.threads, 0,
                of(launch.combine_parameters), how,
            )  # fmt: skip

    def kernel(
        self,
        symbol: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arrays: Mapping[str, Array],
        rows: int,
        **sizes: int,
    ) -> None:
        """One launch, as it was asked for.

        Raises:
            EmulatorError: A thread misbehaved.
        """
        self._kernel(symbol, grid, threads, shared, arrays, _Way({"rows": rows, **sizes}, False, 0))

    def _kernel(
        self,
        symbol: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arrays: Mapping[str, Array],
        how: _Way,
    ) -> None:
        words = [symbol, *map(str, (*grid, threads, shared, int(how.backwards)))]
        paths = {name: self._folder / f"{name}.bin" for name in arrays}
        results = self._results or {name for name in arrays if name[0] == "y" or name == "made"}
        written = results or arrays.keys() & {"q", "s", "workspace"}
        for name, array in arrays.items():
            paths[name].write_bytes(array.tobytes())
            words.append(f"{'=' if name in written else ''}{name}:{paths[name]}")
        numbers = [f"#{name}:{number}" for name, number in sorted(how.numbers.items())]
        done = subprocess.run(
            [str(self._program), *words, *numbers], capture_output=True, text=True, check=False,
            timeout=_PATIENCE, env={**os.environ, "FAULT": str(how.fault)},
        )  # fmt: skip
        if done.returncode != 0:
            raise EmulatorError(f"{symbol}: {done.stderr.strip() or done.returncode}")
        for name in written:
            array = arrays[name]
            array[...] = np.fromfile(paths[name], array.dtype).reshape(array.shape)

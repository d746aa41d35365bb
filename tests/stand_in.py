"""A machine with GPUs that are not there: the driver of `native/stand_in_cuda.c`.

Launches are noted, and may run a Python function in the place of the kernel; the memory of the
device is that of the process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qcompiler.ir.region import Region
from qcompiler.targets import cuda, toolchain
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.cuda.backend import CudaBackend
from qcompiler.targets.library import build_library
from qcompiler.targets.toolchain import find_linker

SOURCE = Path(__file__).resolve().parent / "native" / "stand_in_cuda.c"
STAND_IN = "-DQC_STAND_IN"
"""The driver is the one that the variable QC_STAND_IN names."""
RUNTIME = SOURCE.with_name("stand_in_ort.c")

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Gpu:
    major: int = 9
    minor: int = 0
    name: str = "Stand-in"
    shared_bytes: int = 227 * 1024


@dataclasses.dataclass(frozen=True)
class Launched:
    """What the driver was asked for; `arguments` are numbers, `rows` the last of them."""

    symbol: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    shared_limit: int
    stream: int | None
    context: int
    arguments: tuple[int, ...]


class _Device(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
    )


_Run = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_uint))


class _Symbol(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 160),
        ("arguments", ctypes.c_int),
        ("numbers", ctypes.c_int),
        ("run", _Run),
    )


class _Record(ctypes.Structure):
    _fields_ = (
        ("symbol", ctypes.c_char * 160),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("shared_limit", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("arguments", ctypes.c_uint64 * 16),
    )


class Driver:
    """One driver, loaded by a test and by the library that it registers."""

    def __init__(self, path: Path, gpus: Sequence[Gpu]) -> None:
        self.path, self._loaded = path, ctypes.CDLL(str(path))
        self._kept: list[Any] = []
        self.problems: list[Exception] = []
        devices = (_Device * 4).in_dll(self._loaded, "stand_in_devices")
        for device, gpu in zip(devices, gpus, strict=False):
            device.name, device.shared_bytes = gpu.name.encode(), gpu.shared_bytes
            device.major, device.minor = gpu.major, gpu.minor
        self.set("device_count", len(gpus))

    def set(self, name: str, value: int) -> None:
        kind = ctypes.c_size_t if name in ("memory", "used") else ctypes.c_int
        kind.in_dll(self._loaded, f"stand_in_{name}").value = value

    def get(self, name: str) -> int:
        kind = ctypes.c_size_t if name in ("memory", "used") else ctypes.c_int
        return int(kind.in_dll(self._loaded, f"stand_in_{name}").value)

    def let_fail(self, function: str, code: int) -> None:
        (ctypes.c_char * 64).in_dll(self._loaded, "stand_in_failing").value = function.encode()
        self.set("failing_code", code)

    def know(
        self,
        symbol: str,
        arguments: int,
        run: Callable[..., None] | None = None,
        numbers: int = 1,
    ) -> None:
        """A kernel, how many arguments it takes, what it does with their values and the grid.

        The last `numbers` of them are int32, the others pointers.
        """

        def call(values: Any, grid: Any) -> None:
            assert run is not None
            kinds = [ctypes.c_uint64] * (arguments - numbers) + [ctypes.c_int32] * numbers
            given = [ctypes.cast(values[i], ctypes.POINTER(k))[0] for i, k in enumerate(kinds)]
            try:
                run(given, tuple(grid[:3]))
            except Exception as error:  # it would be lost in C
                self.problems.append(error)

        symbols = (_Symbol * 256).in_dll(self._loaded, "stand_in_symbols")
        callback = _Run(call) if run is not None else _Run()
        self._kept.append(callback)
        symbols[self.get("symbol_count")] = _Symbol(symbol.encode(), arguments, numbers, callback)
        self.set("symbol_count", self.get("symbol_count") + 1)

    def know_all(
        self, region: Region, arch: str, runs: Mapping[str, Callable[..., None]] | None = None
    ) -> None:
        """All kernels of a region, which do nothing but for those of `runs`."""
        for launch in cuda.launches(region, arch):
            kernels = {launch.symbol: launch.parameters}
            if launch.combine is not None:
                kernels[launch.combine] = launch.combine_parameters
            for symbol, parameters in kernels.items():
                numbers = len({"height", "rows", "width"}.intersection(parameters))
                self.know(symbol, len(parameters), (runs or {}).get(symbol), numbers)

    def launched(self) -> list[Launched]:
        """The launches since this was asked last."""
        records = (_Record * 256).in_dll(self._loaded, "stand_in_launches")
        found = [
            Launched(
                record.symbol.decode(), tuple(record.grid), record.threads, record.shared_bytes,
                record.shared_limit, record.stream, record.context, tuple(record.arguments),
            )
            for record in records[: self.get("launch_count")]
        ]  # fmt: skip
        self.set("launch_count", 0)
        return found


@functools.cache
def _compiled(folder: Path, *flags: str) -> Path:
    path = folder / f"stand_in_{next(_numbers)}.so"
    command = [*find_linker().command, "-std=c11", "-shared", "-fPIC", *flags, str(SOURCE)]
    subprocess.run([*command, "-o", str(path)], check=True, capture_output=True, text=True)
    return path


class Bench:
    """Makes machines, each a driver and a library of its own: both remember what they saw."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, shared: Path) -> None:
        self.folder, self._patch, self._shared = folder, patch, shared
        self._drivers: list[Driver] = []

    def driver(self, *gpus: Gpu, flags: tuple[str, ...] = ()) -> Driver:
        """The driver that a library finds from now on."""
        path = self.folder / f"libcuda_{next(_numbers)}.so"
        shutil.copy(_compiled(self._shared, *flags), path)
        self._patch.setenv("QC_STAND_IN", str(path))
        self._drivers.append(Driver(path, gpus))
        return self._drivers[-1]

    def check(self) -> None:
        """Raise what functions in the place of kernels raised."""
        for driver in self._drivers:
            for problem in driver.problems:
                raise problem

    def library(self, path: Path) -> Path:
        """A copy of a library that has seen no driver yet."""
        copy = Path(shutil.copy(path, self.folder / f"library_{next(_numbers)}.so"))
        if _inner(path).exists():
            shutil.copy(_inner(path), _inner(copy))
        return copy


def _inner(path: Path) -> Path:
    return path.with_name(f"{path.name}.inner")


def build_for_cpu(path: Path, regions: Sequence[Region], domain: str, cache: KernelCache) -> None:
    """A library whose ops for GPUs the CPU provider runs, see `native/stand_in_ort.c`."""
    build_library(regions, domain, _inner(path), cache=cache, arch=StandInBackend())
    headers = Path(toolchain.__file__).resolve().parent / "native"
    flags = ["-std=c11", "-O1", "-shared", "-fPIC", f"-I{headers}"]
    command = [*find_linker().command, *flags, str(RUNTIME), "-o", str(path), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)


class Runtime:
    """The ONNX Runtime that a library of `build_for_cpu` meets."""

    def __init__(self, library: Path) -> None:
        self._loaded = ctypes.CDLL(str(library))

    def set_device(self, ordinal: int) -> None:
        """The GPU of sessions from now on."""
        ctypes.c_int.in_dll(self._loaded, "stand_in_device").value = ordinal

    def set_stream(self, stream: int) -> None:
        """The stream of runs from now on in this thread."""
        self._loaded.stand_in_set_stream(ctypes.c_void_p(stream))

    def let_scratch(self, what: str) -> None:
        """Scratch buffers are given "as ort" does, or it "gives null", or "fails"."""
        ways = ("as ort", "gives null", "fails")
        ctypes.c_int.in_dll(self._loaded, "stand_in_scratch").value = ways.index(what)

    @property
    def buffers(self) -> int:
        """Scratch buffers that were given and not taken back."""
        return ctypes.c_int.in_dll(self._loaded, "stand_in_buffers").value

    @property
    def freed_nulls(self) -> int:
        """How often a null pointer was given back."""
        return ctypes.c_int.in_dll(self._loaded, "stand_in_freed_nulls").value


class NoCompiler:
    """Writes files in which the names of kernels can be found, and nothing that runs."""

    name = "no compiler"
    version = (13, 0)

    def compile(self, source: str, arch: str) -> bytes:
        """An ELF file whose one section is the source."""
        content = source.encode()
        header = struct.pack(
            "<4s12xHHIQQQIHHHHHH", b"\x7fELF", 2, 190, 1, 0, 0, 64, 0, 64, 0, 0, 64, 1, 0
        )
        section = struct.pack("<IIQQQQIIQQ", 0, 1, 0, 0, 128, len(content), 0, 0, 1, 0)
        return header + section + content

    def explain(self, source: str, arch: str) -> tuple[bytes, str]:
        """No kernel, no word."""
        return self.compile(source, arch), ""


class StandInBackend(CudaBackend):
    """Kernels that are names alone (see `conftest.py`), for the driver of this file."""

    def __init__(self) -> None:
        super().__init__((STAND_IN,), NoCompiler())


def names_of_kernels(_: CudaBackend, region: Region, arch: str) -> str:
    """In the place of `CudaBackend.source`: what `NoCompiler` compiles."""
    return "\0" + "\0".join(_symbols(region, arch)) + "\0"


def _symbols(region: Region, arch: str) -> Iterator[str]:
    for launch in cuda.launches(region, arch):
        yield launch.symbol
        if launch.combine is not None:
            yield launch.combine

"""CUDA source to cubins: by the nvcc of this machine, else by NVRTC from the extra `[nvrtc]`.

A cubin is machine code for one architecture: the driver loads it as it is, so that neither a
compiler nor a CUDA toolkit is needed where a bundle runs.  No GPU is needed here.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Protocol

from qcompiler.ir.errors import ToolchainError

__all__ = ["CubinCompiler", "Nvcc", "Nvrtc", "find_cubin_compiler"]

_PATIENCE = 600
"""Seconds that one file may take to compile."""

_FLAGS = ("-std=c++17",)
_VERBOSE = "--ptxas-options=-v"
_OLDEST = (12, 0)
"""The first CUDA whose compilers know sm_89 and sm_90a, and whose kernels need no newer driver."""

_WAY_OUT = "install the CUDA toolkit, or: pip install 'qcompiler[nvrtc]'"


class CubinCompiler(Protocol):
    """What turns the text of a CUDA file into a cubin.

    Attributes:
        name: Which it is, and of what version, so that it can key caches.
        version: The CUDA it belongs to, such as (13, 0).
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def version(self) -> tuple[int, int]: ...  # noqa: D102

    def compile(self, source: str, arch: str) -> bytes:
        """The cubin of a CUDA text for an architecture, such as "sm_90a".

        Raises:
            ToolchainError: The text does not compile, or the compiler does not run.
        """

    def explain(self, source: str, arch: str) -> tuple[bytes, str]:
        """The same, and what ptxas says of each kernel: registers, stack, spills.

        Raises:
            ToolchainError: The text does not compile, or the compiler does not run.
        """


@dataclasses.dataclass(frozen=True)
class Nvcc:
    """The compiler of a CUDA toolkit; it needs a C++ compiler beside it."""

    path: str
    version: tuple[int, int]
    build: str

    @property
    def name(self) -> str:
        """Such as "nvcc V13.0.88"."""
        return f"nvcc {self.build}"

    def compile(self, source: str, arch: str) -> bytes:
        """See `CubinCompiler`."""
        return self._made(source, arch)[0]

    def explain(self, source: str, arch: str) -> tuple[bytes, str]:
        """See `CubinCompiler`."""
        return self._made(source, arch, _VERBOSE)

    def _made(self, source: str, arch: str, *flags: str) -> tuple[bytes, str]:
        # Relative names in a fresh folder, so that no path of this machine reaches the output.
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "kernel.cu").write_text(source)
            command = [self.path, "-cubin", f"-arch={arch}", *_FLAGS, *flags, "-o", "kernel.cubin"]
            try:
                done = subprocess.run(
                    [*command, "kernel.cu"], cwd=folder, capture_output=True, text=True,
                    check=False, timeout=_PATIENCE,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as error:
                raise ToolchainError(f"cannot run {self.path}: {error}; {_WAY_OUT}") from error
            if done.returncode != 0:
                log = (done.stderr + done.stdout).strip()
                raise ToolchainError(f"{self.name} cannot compile for {arch}:\n{log}")
            return Path(folder, "kernel.cubin").read_bytes(), done.stdout + done.stderr


@dataclasses.dataclass(frozen=True)
class Nvrtc:
    """NVIDIA's compiler as a library, from its wheel, with the headers of other wheels."""

    path: Path
    includes: tuple[Path, ...]
    version: tuple[int, int]
    build: str

    @property
    def name(self) -> str:
        """Such as "NVRTC 13.5.37"."""
        return f"NVRTC {self.build}"

    def compile(self, source: str, arch: str) -> bytes:
        """See `CubinCompiler`."""
        return self._made(source, arch)[0]

    def explain(self, source: str, arch: str) -> tuple[bytes, str]:
        """See `CubinCompiler`."""
        return self._made(source, arch, _VERBOSE)

    def _made(self, source: str, arch: str, *flags: str) -> tuple[bytes, str]:
        nvrtc, program = _library(self.path), ctypes.c_void_p()
        _check(nvrtc, nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))  # fmt: skip
        try:
            options = [f"--gpu-architecture={arch}", *_FLAGS, *flags]
            options += [f"-I{folder}" for folder in self.includes]
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
            log = _text(nvrtc, "ProgramLog", program).decode(errors="replace").strip("\0\n ")
            if failed:
                raise ToolchainError(f"{self.name} cannot compile for {arch}:\n{log}")
            return _text(nvrtc, "CUBIN", program), log
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def find_cubin_compiler() -> CubinCompiler:
    """The compiler to make cubins with.

    nvcc of $CUDA_HOME, on the PATH or in /usr/local/cuda, if it is new enough and there is a C++
    compiler for it; else NVRTC, if its wheels are installed.

    Raises:
        ToolchainError: There is neither; says what was found, and what to install.
    """
    problems = []
    for find in (_find_nvcc, _find_nvrtc):
        found = find()
        if not isinstance(found, str):
            return found
        problems.append(found)
    raise ToolchainError(f"no CUDA compiler: {'; '.join(problems)}; {_WAY_OUT}")


def _find_nvcc() -> Nvcc | str:
    """The first nvcc found, or why it will not do."""
    home = os.environ.get("CUDA_HOME")
    # Who sets CUDA_HOME means it; a PATH often has whatever came with the system.
    places = (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")
    path = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if path is None:
        return "no nvcc in $CUDA_HOME, on the PATH or in /usr/local/cuda"
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{path} cannot be run ({error.strerror})"
    found = re.search(r"V(\d+)\.(\d+)\.\d+", done.stdout)
    if found is None:
        return f"{path} does not say which version it is"
    version = int(found[1]), int(found[2])
    if version < _OLDEST:
        return f"{path} is of CUDA {version[0]}.{version[1]}, 12.0 or newer is needed"
    if not shutil.which("g++"):
        return f"{path} needs a C++ compiler, and there is no g++"
    return Nvcc(path, version, found[0])


def _find_nvrtc() -> Nvrtc | str:
    """NVRTC of the newest CUDA whose wheel is installed, or why there is none."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    # nvidia/cu13/lib since CUDA 13, nvidia/cuda_nvrtc/lib before.
    libraries = [path for root in roots for path in root.glob("*/lib/libnvrtc.so.*")]
    if not libraries:
        return "no NVRTC"
    path = max(libraries, key=lambda path: int(path.suffix[1:]))
    includes = _folders_with("cuda_fp16.h", roots) | _folders_with("cuda/std/cstdint", roots)
    if len(includes) < 2:
        return f"{path.name} has no headers (nvidia-cuda-runtime, nvidia-cuda-cccl)"
    major, minor = ctypes.c_int(), ctypes.c_int()
    try:
        nvrtc = _library(path)
        _check(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    except (OSError, ToolchainError) as error:
        return f"{path.name} cannot be loaded ({error})"
    version = major.value, minor.value
    if version < _OLDEST:
        return f"{path.name} is of CUDA {version[0]}.{version[1]}, 12.0 or newer is needed"
    return Nvrtc(path, tuple(sorted(includes)), version, _nvrtc_build(version))


def _folders_with(header: str, roots: list[Path]) -> set[Path]:
    """The folders of wheels that a header is included from."""
    folders = [folder for root in roots for folder in root.glob("*/include")]
    folders += [folder / "cccl" for folder in folders]
    return {folder for folder in folders if (folder / header).is_file()}


def _nvrtc_build(version: tuple[int, int]) -> str:
    for name in ("nvidia-cuda-nvrtc", f"nvidia-cuda-nvrtc-cu{version[0]}"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.startswith(f"{version[0]}."):
            return found
    return f"{version[0]}.{version[1]}"


@functools.cache
def _library(path: Path) -> ctypes.CDLL:
    # NVRTC itself looks for it by name only, which fails for a wheel's folder.
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))
    nvrtc = ctypes.CDLL(str(path))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return nvrtc


def _text(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    """What `nvrtcGet<what>` gives."""
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        raise ToolchainError(f"NVRTC: {nvrtc.nvrtcGetErrorString(result).decode()}; {_WAY_OUT}")

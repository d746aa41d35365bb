"""CUDA source to cubins, without a GPU."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from registry import package

from qcompiler.ir.errors import ToolchainError
from qcompiler.targets import cubin
from qcompiler.targets.cubin import Nvcc, Nvrtc, find_cubin_compiler

SOURCE = """
#ifdef __CUDACC_RTC__
#include <cuda/std/cstdint>
#else
#include <cstdint>
#endif
#include <cuda_fp16.h>
extern "C" __global__ void twice(const __half *x, __half *y) {
    y[threadIdx.x] = __hadd(x[threadIdx.x], x[threadIdx.x]);
}
"""
EM_CUDA = 190
WHEELS = ("nvidia-cuda-nvrtc==13.0.88", "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cccl==13.0.85")


@pytest.fixture
def nvcc() -> Nvcc:
    found = cubin._find_nvcc()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def wheels() -> list[Path]:
    return [package(wheel) for wheel in WHEELS]


@pytest.fixture
def nvrtc(wheels: list[Path], monkeypatch: pytest.MonkeyPatch) -> Nvrtc:
    for folder in wheels:
        monkeypatch.syspath_prepend(folder)
    found = cubin._find_nvrtc()
    assert isinstance(found, Nvrtc), found
    return found


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with neither compiler."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def is_cubin(image: bytes) -> bool:
    return image[:4] == b"\x7fELF" and int.from_bytes(image[18:20], "little") == EM_CUDA


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_nvcc(nvcc: Nvcc, arch: str) -> None:
    image = nvcc.compile(SOURCE, arch)
    assert is_cubin(image)
    assert b"twice" in image
    assert arch != "sm_80" or nvcc.compile(SOURCE, arch) == image


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_nvrtc(nvrtc: Nvrtc, arch: str) -> None:
    image = nvrtc.compile(SOURCE, arch)
    assert is_cubin(image)
    assert b"twice" in image


@pytest.mark.parametrize("kind", ["nvcc", "nvrtc"])
def test_what_does_not_compile(kind: str, request: pytest.FixtureRequest) -> None:
    compiler = request.getfixturevalue(kind)
    with pytest.raises(ToolchainError, match=r"cannot compile for sm_80:\n(?s:.*)unknown_name"):
        compiler.compile(SOURCE + "\nint x = unknown_name;", "sm_80")
    with pytest.raises(ToolchainError, match="cannot compile for sm_1:\n"):
        compiler.compile(SOURCE, "sm_1")


def test_a_compiler_that_does_not_run(nvcc: Nvcc) -> None:
    broken = Nvcc("/nowhere/nvcc", nvcc.version, nvcc.build)
    with pytest.raises(ToolchainError, match="cannot run /nowhere/nvcc"):
        broken.compile(SOURCE, "sm_89")


def test_nvcc_goes_first(nvcc: Nvcc) -> None:
    assert find_cubin_compiler() == nvcc


def test_neither(nothing: None) -> None:
    with pytest.raises(
        ToolchainError,
        match=r"no CUDA compiler: no nvcc .*; no NVRTC; .* pip install 'qcompiler\[nvrtc\]'",
    ):
        find_cubin_compiler()


def fake_nvcc(folder: Path, version: str) -> None:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("Cuda compilation tools, release 11.8, V11.8.89", "is of CUDA 11.8, 12.0 or newer"),
        ("hello", "does not say which version"),
    ],
)
def test_nvcc_that_will_not_do(
    version: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvcc(tmp_path, version)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin:/usr/bin")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match=f"{tmp_path}/bin/nvcc {message}"):
        find_cubin_compiler()


def test_cuda_home_goes_before_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("home", "path"):
        (tmp_path / name).mkdir()
        fake_nvcc(tmp_path / name, "V13.0.88")
    monkeypatch.setenv("CUDA_HOME", f"{tmp_path}/home")
    monkeypatch.setenv("PATH", f"{tmp_path}/path/bin:/bin:/usr/bin")
    monkeypatch.setattr(cubin.shutil, "which", lambda name: f"{tmp_path}/path/bin/{name}")
    found = find_cubin_compiler()
    assert isinstance(found, Nvcc)
    assert found.path == f"{tmp_path}/home/bin/nvcc"


def test_nvcc_that_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(tmp_path, "")
    (tmp_path / "bin" / "nvcc").write_text("no program")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin:/usr/bin")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match=r"nvcc cannot be run \(Exec format error\); no NVRTC"):
        find_cubin_compiler()


def test_nvcc_without_a_cxx_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(tmp_path, "V13.0.88")
    clang = tmp_path / "bin" / "clang++"  # nvcc asks for g++ alone
    clang.write_text("")
    clang.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match="needs a C.. compiler"):
        find_cubin_compiler()


def test_nvrtc_without_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing: None
) -> None:
    (tmp_path / "nvidia" / "cu13" / "lib").mkdir(parents=True)
    (tmp_path / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13").write_bytes(b"")
    spec = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "nvidia")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ToolchainError, match=r"libnvrtc.so.13 has no headers"):
        find_cubin_compiler()

"""Building a library: self-contained, the same bytes twice, caches that may break, compilers."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_avx512_vnni
from feed_forward import (
    DOMAIN,
    FEED_FORWARD,
    REGIONS,
    UP,
    K,
    feed_forward,
    make_constants,
    model,
    session,
)
from onnx import TensorProto

from qcompiler.ir.errors import ToolchainError
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.elf import glibc_version, undefined_symbols
from qcompiler.targets.library import Library, build_library, check_self_contained
from qcompiler.targets.toolchain import Linker, find_linker


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> KernelCache:
    return KernelCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def library(cache: KernelCache, tmp_path_factory: pytest.TempPathFactory) -> Library:
    path = tmp_path_factory.mktemp("library") / "libqcompiler.so"
    return build_library(REGIONS, DOMAIN, path, cache=cache)


def test_a_library_needs_only_libc(library: Library) -> None:
    needed = undefined_symbols(library.path.read_bytes())
    assert "malloc" in needed
    assert not {name for name in needed if name.startswith(("TVM", "__TVM", "Py"))}
    version = tuple(int(part) for part in library.minimum_glibc.split("."))
    if library.linker.startswith("ziglang"):
        assert version <= (2, 17)


def test_only_the_entry_point_is_exported(library: Library) -> None:
    loaded = ctypes.CDLL(str(library.path))
    assert loaded.RegisterCustomOps
    with pytest.raises(AttributeError):
        _ = loaded.qc_specs


def test_a_kernel_that_needs_a_runtime_is_refused() -> None:
    source = "void TVMBackendAllocWorkspace(void); void f(void) { TVMBackendAllocWorkspace(); }"
    with pytest.raises(ToolchainError, match="kernel f needs TVMBackendAllocWorkspace"):
        check_self_contained("f", find_linker().compile(source, {}))


def test_the_same_inputs_give_the_same_bytes(library: Library, tmp_path: Path) -> None:
    again = build_library(
        REGIONS[::-1] + REGIONS,
        DOMAIN,
        tmp_path / "elsewhere" / "other.so",
        cache=KernelCache(tmp_path / "cache"),
    )
    assert again.path.read_bytes() == library.path.read_bytes()


def test_a_damaged_cache_is_rebuilt(library: Library, cache: KernelCache, tmp_path: Path) -> None:
    entries = [path for path in cache.folder.rglob("*") if path.is_file()]
    assert entries
    for i, entry in enumerate(entries):
        content = entry.read_bytes()
        entry.write_bytes(content[: len(content) // 2] if i % 2 else b"\0" + content[1:])
    lines: list[str] = []
    target = tmp_path / "rebuilt.so"
    build_library(REGIONS, DOMAIN, target, cache=cache, progress=lines.append)
    assert any(UP.name in line for line in lines)
    assert target.read_bytes() == library.path.read_bytes()
    build_library(REGIONS, DOMAIN, target, cache=cache, progress=lambda line: pytest.fail(line))


def test_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QCOMPILER_CACHE", raising=False)
    assert KernelCache().folder == tmp_path / "qcompiler"
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "mine"))
    assert KernelCache().folder == tmp_path / "mine"


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ToolchainError, match=r"kernel cache .*file.*set QCOMPILER_CACHE"):
        KernelCache(tmp_path / "file").put("00key", b"content")


def without_ziglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_no_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ziglang(monkeypatch)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolchainError, match=r"pip install qcompiler\[zig\]"):
        find_linker()


def test_a_missing_cc_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ziglang(monkeypatch)
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(ToolchainError, match="CC=no-such-compiler -m64 does not exist"):
        find_linker()


def test_a_failing_compiler_shows_its_message() -> None:
    with pytest.raises(ToolchainError, match="error: "):
        find_linker().compile("int f(void) { return }", {})


def system_compiler(monkeypatch: pytest.MonkeyPatch) -> Linker:
    without_ziglang(monkeypatch)
    try:
        return find_linker()
    except ToolchainError as error:
        pytest.skip(str(error))


@needs_avx512_vnni
def test_a_system_compiler_works_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    linker = system_compiler(monkeypatch)
    built = build_library(
        REGIONS, DOMAIN, tmp_path / "lib.so", cache=KernelCache(tmp_path / "cache")
    )
    assert built.linker == linker.name
    assert built.minimum_glibc == glibc_version(built.path.read_bytes())
    constants = make_constants()
    proto = model(FEED_FORWARD, {"y": TensorProto.FLOAT}, constants)
    x = np.random.default_rng(3).standard_normal((1, 4, K)).astype(np.float32)
    (y,) = session(proto, built).run(None, {"x": x})
    np.testing.assert_allclose(y, feed_forward(x, constants), atol=0.2)

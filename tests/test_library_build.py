"""Building a library: self-contained, the same bytes twice, caches that may break, compilers."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from feed_forward import (
    DOMAIN,
    FEED_FORWARD,
    QUANTIZE_K,
    REGIONS,
    UP,
    K,
    feed_forward,
    make_constants,
    model,
    session,
)
from instruction_sets import needs_kernels
from onnx import TensorProto

from qcompiler.ir.errors import ToolchainError
from qcompiler.ir.region import Region
from qcompiler.targets import x86
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.elf import glibc_version, undefined_symbols
from qcompiler.targets.library import Library, build_library
from qcompiler.targets.toolchain import Linker, find_linker
from qcompiler.targets.x86.backend import check_self_contained
from qcompiler.targets.x86.isa import AVX2, AVX_VNNI, Isa

STATIC = Region("QMatMulU8S8", UP.sizes)
KINDS = [
    QUANTIZE_K,
    UP,
    Region("AddLayerNorm", (("K", 70),), outputs=("x", "q", "s"), attributes=(("epsilon", 1e-5),)),
    Region("Attention", (("D", 20),), flags=("hhhh",)),
]


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


@needs_kernels
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


def disassembly(region: Region, isa: Isa, folder: Path) -> list[tuple[str, str]]:
    """Bytes and text of each instruction of a kernel."""
    if not shutil.which("objdump"):
        pytest.skip("no objdump here")
    path = folder / "kernel.o"
    path.write_bytes(x86.compile_region(region, isa))
    done = subprocess.run(
        ["objdump", "-d", "-w", "-M", "intel", path], check=True, capture_output=True, text=True
    )
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return [(line[1].strip(), line[2]) for line in lines if len(line) == 3]


@pytest.mark.parametrize("isa", [AVX_VNNI, AVX2], ids=lambda isa: isa.name)
@pytest.mark.parametrize("region", KINDS, ids=lambda region: region.anchor)
def test_kernels_for_ymm_need_no_avx512(region: Region, isa: Isa, tmp_path: Path) -> None:
    """EVEX, AVX-512's encoding, begins with 62; only with it are there zmm, 32 ymm and masks."""
    instructions = disassembly(region, isa, tmp_path)
    assert sum("ymm" in text for _, text in instructions) > 10
    assert not [text for code, text in instructions if code.startswith("62 ") or "zmm" in text]


@pytest.mark.parametrize(
    ("region", "isa", "used"),
    [
        (UP, AVX_VNNI, {"vpdpbusd"}),
        (STATIC, AVX2, {"vpmaddubsw", "vpmaddwd"}),
        (UP, AVX2, {"vpmaddubsw", "vpmaddwd"}),
    ],
    ids=["avx-vnni", "avx2, one scale", "avx2"],
)
def test_only_split_rows_meet_instructions_that_saturate(
    region: Region, isa: Isa, used: set[str], tmp_path: Path
) -> None:
    texts = [text.removeprefix("{vex} ") for _, text in disassembly(region, isa, tmp_path)]
    products = {"vpdpbusd", "vpdpbusds", "vpmaddwd", "vpmaddubsw"}
    assert products & {text.split()[0] for text in texts} == used

"""The packing of int8 weights in the library against numpy's, byte for byte."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from instruction_sets import each_raw_isa
from raw_kernels import (
    FEW,
    SIZES,
    Guarded,
    int8,
    pack,
    pointer,
)

from qcompiler.targets import toolchain
from qcompiler.targets.toolchain import find_linker
from qcompiler.targets.x86 import ISAS, Isa
from qcompiler.targets.x86.tile import tile_shape

NATIVE = Path(toolchain.__file__).resolve().parent / "native"
PACK = """
#define EXPORT(name, pack)                                                                         \
    __attribute__((visibility("default"))) void pack_##name(                                       \
        const int8_t *w, int64_t k, int64_t n, int vectors, int8_t *packed, int32_t *init) {       \
        pack(w, k, n, vectors, packed, init);                                                      \
    }
"""


@pytest.fixture(scope="session")
def packer(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library's own packing, which is private to x86.c."""
    headers = {path.name: path.read_text() for path in NATIVE.glob("*.h")}
    source = (NATIVE / "cpu.c").read_text() + (NATIVE / "x86.c").read_text() + PACK
    source += "\n".join(f"EXPORT({isa.c_name}, {isa.c_name}.pack_w8)" for isa in ISAS)
    path = tmp_path_factory.mktemp("packer") / "pack.so"
    linker = find_linker()
    exports = [f"pack_{isa.c_name}" for isa in ISAS]
    path.write_bytes(linker.link([linker.compile(source, headers)], exports))
    return ctypes.CDLL(str(path))


@each_raw_isa("QMatMulW8A8")
@FEW
@given(k=SIZES, n=SIZES)
@example(k=1, n=1)
@example(k=129, n=129)
def test_packing(isa: Isa, k: int, n: int, packer: ctypes.CDLL) -> None:
    guarded = Guarded()
    w = guarded(int8(np.random.default_rng(k), k, n))
    w[:, 0] = -128
    expected = pack(w, isa)
    packed, init = (guarded(np.full_like(part, 77)) for part in expected)
    sizes = ctypes.c_int64(k), ctypes.c_int64(n)
    pack_w8 = getattr(packer, f"pack_{isa.c_name}")
    pack_w8(pointer(w), *sizes, tile_shape(n, isa).vectors, pointer(packed), pointer(init))
    np.testing.assert_array_equal(packed, expected[0])
    np.testing.assert_array_equal(init, expected[1])

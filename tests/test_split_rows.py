"""Activations for AVX2: what `native/split_rows.c` makes of them, and that nothing can saturate."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs
from raw_kernels import Array, Guarded, centres, pointer, split_rows

from qcompiler.targets import toolchain
from qcompiler.targets.toolchain import find_linker
from qcompiler.targets.x86 import AVX2
from qcompiler.targets.x86.tile import tile_shape
from qcompiler.targets.x86.w8_family import most_lacking

NATIVE = Path(toolchain.__file__).resolve().parent / "native"
ANCHORS = "QMatMulW8A8", "QMatMulU8S8"
TILE_ROWS = tile_shape(1, AVX2).rows

CALL = """
OrtStatus *qc_parallel(OrtKernelContext *c, void (*task)(void *, size_t), size_t count, void *a) {
    (void)c;
    for (size_t i = count; i-- > 0;) task(a, i);
    return NULL;
}
int64_t qc_task_count(double nanoseconds) { return nanoseconds > 500 ? 4 : 1; }
__attribute__((visibility("default"))) int64_t split(
    const uint8_t *q, int64_t rows, int64_t k, int64_t block_rows, int64_t tile_rows,
    uint8_t zero_point, int64_t most, char *memory, void *context, void **parts) {
    struct split_rows split = {.q = q, .zero_point = zero_point, .rows = rows, .k = k,
                               .block_rows = block_rows, .tile_rows = tile_rows,
                               .most_lacking = most, .is_centred = most > 3};
    size_t bytes = qc_plan_split(&split);
    if (!memory) return (int64_t)bytes;
    qc_place_split(&split, memory);
    (void)qc_split(&split, context);
    void *found[] = {split.split, split.starts, split.offsets,
                     split.counts, split.groups, split.values};
    for (int i = 0; i < 6; i++) parts[i] = found[i];
    return (int64_t)split.tiles;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    headers = {path.name: path.read_text() for path in NATIVE.glob("*.h")}
    source = (NATIVE / "split_rows.c").read_text() + CALL
    path, linker = tmp_path_factory.mktemp("split") / "split.so", find_linker()
    path.write_bytes(linker.link([linker.compile(source, headers)], ["split"]))
    loaded = ctypes.CDLL(str(path))
    loaded.split.restype = ctypes.c_int64
    return loaded


def split(
    library: ctypes.CDLL, q: Array, z: int, most: int, block_rows: int, context: bool
) -> list[Array]:
    """Rows, starts, offsets, counts, groups and values, from memory that ends at a guard page."""
    (rows, k), guarded = q.shape, Guarded()
    numbers = [ctypes.c_int64(n) for n in (rows, k, block_rows, TILE_ROWS)]
    numbers += [ctypes.c_uint8(z), ctypes.c_int64(most)]
    source, parts = guarded(q), (ctypes.c_void_p * 6)()
    bytes_ = library.split(pointer(source), *numbers, None, None, None)
    memory = guarded(np.full(bytes_, 0x5A, np.uint8))
    some = ctypes.c_void_p(1 if context else None)
    tiles = library.split(pointer(source), *numbers, pointer(memory), some, parts)
    lacking = (tiles, most * -(-k // 8), TILE_ROWS)
    forms: list[tuple[tuple[int, ...], type]] = [
        ((rows, -(-k // 4) * 4), np.int8), ((rows,), np.int32), ((rows,), np.int32),
        ((tiles,), np.int32), (lacking, np.uint16), (lacking, np.int32),
    ]  # fmt: skip
    found = []
    for part, (shape, dtype) in zip(parts, forms, strict=True):
        start = int(part or 0) - memory.ctypes.data
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        found.append(memory[start : start + size].view(dtype).reshape(shape).copy())
    return found


def activations(rng: np.random.Generator, m: int, k: int) -> Array:
    """Rows of which some lack little, some much, some everything."""
    deviation = rng.choice([10.0, 40.0, 400.0], (m, 1))
    values = np.rint(
        rng.standard_normal((m, k)) * deviation + rng.choice([0, 0, 120, -120], (m, 1))
    )
    return np.clip(values + 128, 0, 255).astype(np.uint8)


@needs("avx2")
@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 140),
    block=st.integers(1, 41),
    context=st.booleans(),
    z=st.sampled_from([128, 128, 0, 1, 100, 254, 255]),
    seed=st.integers(0, 2**32 - 1),
)
def test_splitting(
    library: ctypes.CDLL, m: int, k: int, block: int, context: bool, z: int, seed: int
) -> None:
    q, most = activations(np.random.default_rng(seed), m, k), most_lacking(ANCHORS[z != 128], AVX2)
    rows, starts, offsets, counts, groups, values = split(library, q, z, most, block, context)
    at = centres(q, z) if most > 3 else np.full((m, 1), z)
    np.testing.assert_array_equal(offsets, z - at[:, 0])
    np.testing.assert_array_equal(starts, -128 * (q.astype(np.int32) - at).sum(1))
    tile = 0
    for first in range(0, m, block):
        part = q[first : first + block]
        expected = split_rows(part, AVX2, at[first : first + block], most)
        np.testing.assert_array_equal(rows[first : first + block].view(np.uint8), expected[0])
        tiles = len(expected[2])
        height = -(-len(part) // tiles)
        for index in range(tiles):
            np.testing.assert_equal(counts[tile], expected[2][index])
            count, start = counts[tile], first + min(index * height, len(part) - height)
            whole = np.zeros((height, rows.shape[1] // 4, 4), np.int32)
            for i in range(height):
                lacking = values[tile, :count, i].copy().view(np.int8).reshape(-1, 4)
                assert_fits(lacking.reshape(-1, 2))
                np.add.at(whole[i], groups[tile, :count, i], lacking)
            whole = whole.reshape(height, -1) + rows[start : start + height]
            np.testing.assert_array_equal(whole[:, :k], (q - at)[start : start + height])
            tile += 1
    assert tile == len(counts)


def assert_fits(elements: Array) -> None:
    """Each row of int8 times uint8 adds up to an int16."""
    wide = elements.astype(np.int64)
    assert (255 * np.maximum(wide, 0).sum(1)).max(initial=0) <= 32767
    assert (255 * np.minimum(wide, 0).sum(1)).min(initial=0) >= -32768


@needs("avx2")
@pytest.mark.parametrize("z", [128, 0, 3, 127, 200, 255])
def test_nothing_saturates(library: ctypes.CDLL, z: int) -> None:
    """Fours of all corners, and of what is just at the limit, in both places of eight."""
    values = [0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 254, 255]
    corners = np.stack(np.meshgrid(*4 * [values]), axis=-1).reshape(-1, 4)
    q = corners[:, [0, 1, 3, 2, 2, 3, 0, 1]].astype(np.uint8)  # fours 0, 1, 2, 3 and 3, 2, 0, 1
    most, worst = most_lacking(ANCHORS[z != 128], AVX2), 0
    for start in range(0, len(q), 4096):
        part = q[start : start + 4096]
        rows, _, offsets, counts, groups, values_of = split(
            library, part, z, most, len(part), context=False
        )
        fours = rows.reshape(-1, 2, 2, 2).swapaxes(1, 2).reshape(-1, 4)
        assert_fits(fours)
        lacking = values_of.view(np.int8).reshape(*values_of.shape, 4)
        for tile, count in enumerate(counts):
            assert_fits(lacking[tile, :count].reshape(-1, 2))
        worst = max(worst, counts.max())
        assert groups.dtype == np.uint16
        assert not offsets.any() or z != 128
    assert worst == 3 if z == 128 else worst <= most


@needs("avx2")
def test_the_most_that_eight_lack(library: ctypes.CDLL) -> None:
    q, most = np.zeros((1, 800), np.uint8), most_lacking("QMatMulU8S8", AVX2)
    q[0, 8:16] = 255
    *_, counts, _, _ = split(library, q, 0, most, 1, context=False)
    assert counts[0] == most == 9

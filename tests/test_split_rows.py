"""Activations for AVX2: what `native/split_rows.c` makes of them, and that nothing can saturate."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs
from raw_kernels import Array, Guarded, pointer, split_rows

from qcompiler.targets import toolchain
from qcompiler.targets.toolchain import find_linker
from qcompiler.targets.x86 import AVX2
from qcompiler.targets.x86.tile import tile_shape

NATIVE = Path(toolchain.__file__).resolve().parent / "native"
TILE_ROWS = tile_shape(1, AVX2).rows

CALL = """
OrtStatus *qc_parallel(OrtKernelContext *c, void (*task)(void *, size_t), size_t count, void *a) {
    (void)c;
    for (size_t i = count; i-- > 0;) task(a, i);
    return NULL;
}
int64_t qc_task_count(double nanoseconds) { return nanoseconds > 500 ? 4 : 1; }
__attribute__((visibility("default"))) int64_t split(
    const uint8_t *q, int64_t rows, int64_t k, int64_t block_rows, int64_t tile_rows, char *memory,
    void *context, void **parts) {
    struct split_rows split = {.q = q, .rows = rows, .k = k, .block_rows = block_rows,
                               .tile_rows = tile_rows};
    size_t bytes = qc_plan_split(&split);
    if (!memory) return (int64_t)bytes;
    qc_place_split(&split, memory);
    (void)qc_split(&split, context);
    void *found[] = {split.split, split.starts, split.counts, split.groups, split.values};
    for (int i = 0; i < 5; i++) parts[i] = found[i];
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


def split(library: ctypes.CDLL, q: Array, block_rows: int, context: bool) -> list[Array]:
    """Rows, starts, counts, groups and values, from memory that ends at a guard page."""
    (rows, k), guarded = q.shape, Guarded()
    numbers = [ctypes.c_int64(n) for n in (rows, k, block_rows, TILE_ROWS)]
    source, parts = guarded(q), (ctypes.c_void_p * 5)()
    bytes_ = library.split(pointer(source), *numbers, None, None, None)
    memory = guarded(np.full(bytes_, 0x5A, np.uint8))
    some = ctypes.c_void_p(1 if context else None)
    tiles = library.split(pointer(source), *numbers, pointer(memory), some, parts)
    groups = -(-k // 4)
    shapes = [(rows, groups), (rows,), (tiles,), (tiles, groups), (tiles, groups, TILE_ROWS)]
    starts = [int(part or 0) - memory.ctypes.data for part in parts]
    return [
        memory[start:][: 4 * int(np.prod(shape))].view(np.int32).reshape(shape).copy()
        for start, shape in zip(starts, shapes, strict=True)
    ]


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
    seed=st.integers(0, 2**32 - 1),
)
def test_splitting(
    library: ctypes.CDLL, m: int, k: int, block: int, context: bool, seed: int
) -> None:
    q = activations(np.random.default_rng(seed), m, k)
    rows, starts, counts, groups, values = split(library, q, block, context)
    tile = 0
    for first in range(0, m, block):
        part = slice(first, first + block)
        expected = split_rows(q[part], AVX2)
        np.testing.assert_array_equal(rows[part].view(np.uint8), expected[0])
        np.testing.assert_array_equal(starts[part], expected[1])
        for count, numbers, lacking in zip(*expected[2:], strict=True):
            height = -(-len(q[part]) // len(expected[2]))
            assert counts[tile] == count
            np.testing.assert_array_equal(np.sort(groups[tile, :count]), numbers[:count])
            found = values[tile, numbers[:count], :height]
            np.testing.assert_array_equal(found, lacking[numbers[:count], :height])
            tile += 1
    assert tile == len(counts)


def test_nothing_saturates() -> None:
    """Each pair of int8, and what it lacks, times uint8: vpmaddubsw's sums fit int16."""
    one, other = np.meshgrid(np.arange(256), np.arange(256))
    q = np.stack([one.ravel(), other.ravel()], axis=1).astype(np.uint8)
    for start in range(0, len(q), 4096):
        rows, _, _, _, _ = split_rows(q[start : start + 4096], AVX2)
        pair = rows.view(np.int8)[:, :2].astype(np.int64)
        lacking = q[start : start + 4096].astype(np.int64) - 128 - pair
        assert (lacking[:, 1] == 0).all()
        for part in (pair, lacking):
            largest = 255 * np.maximum(part, 0).sum(1)
            smallest = 255 * np.minimum(part, 0).sum(1)
            assert largest.max() <= 32767
            assert smallest.min() >= -32768
        assert lacking.min() >= -128
        assert lacking.max() <= 127

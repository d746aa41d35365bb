"""Attention as one kernel: it computes what its body does, for every shape, order and mask."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np
import pytest
from attention_models import DOMAIN, mask_of, session
from golden import sqnr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from instruction_sets import compiled_for_here, each_isa, each_raw_isa, needs
from raw_kernels import Guarded, load, pointer

from qcompiler.ir.attention import group_of, grouped
from qcompiler.ir.region import Region
from qcompiler.targets.library import KernelCache, build_library
from qcompiler.targets.x86.isa import AVX2, AVX512_BF16, AVX512_VNNI, Isa

LAYOUTS = ("hhhh", "ssss", "hshs")


def region(d: int, layout: str, masked: bool, zero: bool, group: int = 1) -> Region:
    flags = (layout, *grouped(group), *(("zero",) if zero else ()))
    return Region("MaskedAttention" if masked else "Attention", (("D", d),), flags=flags)


REGIONS = [
    region(1, "ssss", True, False),
    region(16, "hhhh", True, True),
    region(20, "hshs", True, False),
    region(32, "ssss", True, True),
    region(64, "ssss", False, False),
    region(80, "hshs", True, True),
    region(20, "hhhs", True, True, 3),
    region(32, "ssss", False, False, 2),
    region(16, "hshs", True, False, 12),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attention") / "kernels.so"
    with compiled_for_here():
        build_library(REGIONS, DOMAIN, path, cache=KernelCache())
    return path


def by(layout: str, *by_head: int) -> list[int]:
    batch, heads, tokens, d = by_head
    return [batch, tokens, heads, d] if layout == "s" else [batch, heads, tokens, d]


def check(region: Region, feeds: dict[str, np.ndarray], library: Path, isa: Isa) -> np.ndarray:
    """The kernel's result with one and two threads, after comparing it with the body's."""
    rank = feeds["mask"].ndim if "mask" in feeds else 0
    with np.errstate(all="ignore"):
        (expected,) = session(region, rank, 1, None).run(None, feeds)
    for threads in (1, 2):
        (native,) = session(region, rank, threads, library, isa).run(None, feeds)
        assert native.shape == expected.shape
        np.testing.assert_array_equal(np.isnan(native), np.isnan(expected))
        if np.nan_to_num(expected).any():
            assert sqnr(np.nan_to_num(expected), np.nan_to_num(native)) >= 60
        np.testing.assert_allclose(native, expected, rtol=1e-3, atol=1e-4)
    return native  # type: ignore[no-any-return]


@each_isa("Attention")
@settings(deadline=None, max_examples=150)
@example(REGIONS[3], (1, 2, 1), 1, 4, 0, (), "random").via("one row, one key")
@example(REGIONS[3], (1, 2, 5), 600, 4, 0, (), "random").via("two blocks of keys")
@example(REGIONS[4], (1, 2, 140), 300, 4, 0, (), "random").via("two blocks of rows")
@example(REGIONS[3], (2, 2, 9), 33, 4, 0, (1, 2), "nothing").via("rows that see nothing")
@example(REGIONS[2], (2, 2, 9), 1030, 4, 0, (0, 1), "nothing").via("undefined rows")
@example(REGIONS[3], (2, 2, 9), 700, 4, 0, (1,), "lowest").via("rows that see little")
@example(REGIONS[3], (2, 2, 9), 1030, 4, 0, (0,), "half").via("a first block without keys")
@example(REGIONS[3], (2, 0, 9), 33, 4, 0, (), "random").via("no heads")
@example(REGIONS[3], (2, 1, 9), 0, 4, 0, (), "random").via("no keys")
@example(REGIONS[3], (2, 3, 9), 33, 4, 0, (3,), "random").via("a mask of one value per row")
@example(REGIONS[3], (2, 3, 9), 33, 1, 0, (0, 1, 2), "random").via("a mask of rank 1")
@example(REGIONS[6], (2, 2, 1), 40, 4, 0, (1,), "random").via("one row of grouped queries")
@example(REGIONS[7], (2, 3, 140), 300, 4, 0, (), "random").via("blocks of grouped queries")
@example(REGIONS[8], (2, 1, 9), 33, 4, 0, (0,), "half").via("all queries in one group")
@example(REGIONS[8], (0, 1, 9), 33, 4, 0, (), "random").via("no grouped queries")
@example(REGIONS[6], (2, 3, 9), 0, 4, 0, (), "random").via("no keys of grouped queries")
@given(
    st.sampled_from(REGIONS),
    st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 40)),
    st.integers(1, 150),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
    st.sets(st.integers(0, 3)).map(tuple),
    st.sampled_from(["random", "padding", "nothing", "lowest", "half"]),
)
def test_kernel_is_its_body(library, isa, region, sizes, keys, mask_rank, seed, ones, kind):
    rng, d = np.random.default_rng(seed), region.size("D")
    batch, heads, rows = sizes
    layout, all_heads = region.flags[0], heads * group_of(region.flags)
    counts = ((all_heads, rows), (heads, keys), (heads, keys))
    feeds = {
        name: rng.standard_normal(by(letter, batch, some, tokens, d), np.float32)
        for name, letter, (some, tokens) in zip("qkv", layout, counts, strict=False)
    }
    if region.anchor == "MaskedAttention":
        shape = [1 if i in ones else n for i, n in enumerate((batch, all_heads, rows, keys))]
        feeds["mask"] = mask_of(kind, rng, shape[4 - mask_rank :])
    check(region, feeds, library, isa)


@each_isa("Attention")
@pytest.mark.parametrize("repeated", ["q", "k", "v", "kv", "qk"])
def test_batch_and_heads_broadcast(library, isa, repeated):
    rng, chosen = np.random.default_rng(0), REGIONS[1]
    feeds = {
        name: rng.standard_normal([1, 1, 7, 16] if name in repeated else [2, 3, 7, 16], np.float32)
        for name in "qkv"
    }
    feeds["mask"] = rng.standard_normal((2, 1, 1, 7), np.float32)
    assert check(chosen, feeds, library, isa).shape == (2, 3, 7, 16)


@each_isa("Attention")
def test_a_mask_may_repeat_rows_and_keys(library, isa):
    rng = np.random.default_rng(0)
    shapes = {"q": (1, 2, 1, 16), "k": (1, 2, 1, 16), "v": (1, 2, 40, 16), "mask": (2, 1, 5, 40)}
    feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    assert check(REGIONS[1], feeds, library, isa).shape == (2, 2, 5, 16)


@each_isa("Attention")
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"v": (1, 2, 6, 16)}, "do not fit"),
        ({"k": (3, 2, 5, 16), "v": (2, 2, 5, 16)}, "do not fit"),
        ({"mask": (1, 1, 5, 4)}, "do not fit"),
    ],
)
def test_kernel_names_shapes_that_do_not_fit(library, isa, shapes, message):
    usual = {"q": (1, 2, 5, 16), "k": (1, 2, 5, 16), "v": (1, 2, 5, 16), "mask": (1, 1, 5, 5)}
    feeds = {name: np.zeros(shape, np.float32) for name, shape in (usual | shapes).items()}
    with pytest.raises(Exception, match=message):
        session(REGIONS[1], 4, 1, library, isa).run(None, feeds)


@pytest.fixture(scope="module")
def raw_kernel(tmp_path_factory: pytest.TempPathFactory):
    from qcompiler.targets.x86.attention import attention_function

    folder = tmp_path_factory.mktemp("raw")
    return functools.cache(
        lambda d, isa, masked: (
            load({"f": attention_function(d, isa=isa, is_masked=masked)}, folder, isa).f
        )
    )


@each_raw_isa("Attention")
@pytest.mark.parametrize(
    ("d", "rows", "keys"), [(20, 3, 5), (20, 1, 33), (20, 9, 17), (32, 13, 1), (32, 2, 1040)]
)
@pytest.mark.parametrize("masked", [True, False])
def test_kernel_never_reads_or_writes_too_far(raw_kernel, isa, d, rows, keys, masked):
    """Every tensor ends where its last vector does, at a page that faults."""
    kernel = raw_kernel(d, isa, masked)
    rng, guarded, gap = np.random.default_rng(0), Guarded(), 3
    stride = d + gap

    def tensor(count: int) -> np.ndarray:
        return guarded(rng.standard_normal(count * stride - gap, np.float32))

    def vectors(flat: np.ndarray) -> np.ndarray:
        return np.append(flat, np.zeros(gap, np.float32)).reshape(-1, stride)[:, :d]

    q, k, v, y = (tensor(n) for n in (rows, keys, keys, rows))
    mask = guarded(rng.standard_normal((rows, keys) if masked else (1, 1), np.float32) * masked)
    strides = (keys, 1) if masked else (0, 0)
    untouched = np.delete(y, [i * stride + j for i in range(rows) for j in range(d)])
    kernel(*map(pointer, (q, k, v, mask, y)), *[stride] * 4, *strides, rows, keys, 0,
           ctypes.c_float(0.5))  # fmt: skip
    scores = vectors(q).astype(np.float64) @ vectors(k).T / 2 + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ vectors(v)
    np.testing.assert_allclose(vectors(y), expected, rtol=1e-4, atol=1e-5)
    left = np.delete(y, [i * stride + j for i in range(rows) for j in range(d)])
    np.testing.assert_array_equal(left, untouched)


def has_avx512_bf16() -> bool:
    path = Path("/proc/cpuinfo")
    return path.exists() and "avx512_bf16" in path.read_text()


@needs("avx512-vnni")
@pytest.mark.skipif(not has_avx512_bf16(), reason="this CPU has no AVX512-BF16")
@pytest.mark.parametrize("d", [20, 64])
def test_bfloat16_is_close_to_its_body(d, tmp_path):
    chosen = Region("MaskedAttention", (("D", d),), flags=("ssss", "zero", "bf16"))
    path = tmp_path / "kernels.so"
    assert build_library([chosen], DOMAIN, path, cache=KernelCache()).isa == (
        "avx512-bf16",
        "avx512-vnni",
        "avx2",
    )
    rng = np.random.default_rng(d)
    for rows, keys in ((1, 33), (2, 1), (9, 33), (40, 300), (5, 1031)):
        feeds = {
            name: rng.standard_normal((1, tokens, 2, d), np.float32)
            for name, tokens in zip("qkv", (rows, keys, keys), strict=True)
        }
        feeds["mask"] = mask_of("padding", rng, [1, 1, rows, keys])
        feeds["mask"][..., 0, :] = -np.inf
        (expected,) = session(chosen, 4, 1, None).run(None, feeds)
        for isa, floor_db in ((None, 45), (AVX512_BF16, 45), (AVX512_VNNI, 60), (AVX2, 60)):
            (native,) = session(chosen, 4, 2, path, isa).run(None, feeds)
            np.testing.assert_array_equal(native[:, 0], 0)
            if expected.any():
                assert sqnr(expected, native) >= floor_db

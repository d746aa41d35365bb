"""Attention in int8: the kernel computes its definition, and that is close to its body."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
from attention_models import DOMAIN, mask_of, session
from golden import sqnr
from instruction_sets import needs
from raw_kernels import Array, Guarded, load, pointer

from qcompiler.ir.region import Region
from qcompiler.targets.library import KernelCache, build_library
from qcompiler.targets.x86.attention_shape import int8_attention_shape
from qcompiler.targets.x86.isa import AVX2, AVX512_VNNI
from qcompiler.targets.x86.running_softmax import LOWEST

pytestmark = needs("avx512-vnni")

FLOOR_DB = 30
"""Against the float body, of normal numbers: 32 to 36 dB, as 8 bits of q, k and v leave."""


def quantize(x: Array, axis: int) -> tuple[Array, Array]:
    amax = np.maximum(np.abs(x).max(axis, keepdims=True), np.float32(1e-20))
    return np.rint(x * (np.float32(127) / amax)).astype(np.int64), amax * np.float32(1 / 127)


def weights_of(scores: Array, top: Array) -> Array:
    """The bytes, from the 16-bit arithmetic that `softmax_int8.py` describes."""
    from qcompiler.targets.x86.softmax_int8 import EXP2_TERMS, POINT

    with np.errstate(invalid="ignore"):
        power = (scores - top).astype(np.float64) * np.float32(math.log2(math.e) * 2**POINT) - 1
    t = np.rint(np.maximum(power, -(2**15))).astype(np.int64)
    fraction, shift = (t << 16 - POINT) & 0xFFFF, ~t >> POINT
    constant, linear, square = EXP2_TERMS
    series = (fraction * ((fraction * square >> 16) + linear) >> 16) + constant
    return ((series >> shift) + 64) >> 7


def definition(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    """One head: q [rows, d], k and v [keys, d], mask [rows, keys]; NaN where nothing is seen."""
    block = int8_attention_shape(q.shape[1]).keys
    q8, q_scale = quantize(q, -1)
    top, total, context = np.full((len(q), 1), np.float32(LOWEST)), 0, 0
    for first in range(0, len(k), block):
        part = slice(first, first + block)
        (k8, k_scale), (v8, v_scale) = quantize(k[part], -1), quantize(v[part], 0)
        steps = k_scale.T * (q_scale * np.float32(scale))
        scores = ((q8 @ k8.T).astype(np.float32) * steps + mask[:, part]).astype(np.float32)
        highest = np.maximum(scores.max(-1, keepdims=True), np.float32(LOWEST))
        weights, new = weights_of(scores, highest), np.maximum(top, highest)
        kept, added = (np.exp((old - new).astype(np.float64)) for old in (top, highest))
        total = total * kept + weights.sum(-1, keepdims=True) * added
        context = context * kept + (weights @ v8) * v_scale * added
        top = new
    with np.errstate(invalid="ignore"):
        result: Array = np.asarray(context / total)
    return result


@pytest.fixture(scope="module", params=[8, 20, 128])
def kernel(request, tmp_path_factory):
    from qcompiler.targets.x86.attention_int8 import attention_int8_function

    d = request.param
    functions = {
        "plain": attention_int8_function(d, is_masked=False),
        "masked": attention_int8_function(d, is_masked=True),
    }
    return d, load(functions, tmp_path_factory.mktemp("raw"), AVX512_VNNI)


@pytest.mark.parametrize(
    ("rows", "keys"), [(2, 1), (3, 5), (9, 33), (13, 64), (16, 96), (17, 100), (40, 300), (2, 1040)]
)
@pytest.mark.parametrize("kind", ["random", "padding", "lowest", "half", "none"])
def test_kernel_is_its_definition_and_touches_nothing_else(kernel, rows, keys, kind):
    """Every tensor ends where its last vector does, at a page that faults."""
    d, functions = kernel
    rng, guarded, gap = np.random.default_rng(rows), Guarded(), 3
    stride = d + gap

    def tensor(count: int) -> Array:
        return guarded(rng.standard_normal(count * stride - gap, np.float32))

    def vectors(flat: Array) -> Array:
        return np.append(flat, np.zeros(gap, np.float32)).reshape(-1, stride)[:, :d]

    q, k, v, y = (tensor(n) for n in (rows, keys, keys, rows))
    if kind == "none":
        function, mask, mask_strides = (
            functions.plain,
            guarded(np.zeros((1, 1), np.float32)),
            (0, 0),
        )
    else:
        function, mask = functions.masked, guarded(mask_of(kind, rng, [rows, keys]))
        mask_strides = keys, 1
    inside = [i * stride + j for i in range(rows) for j in range(d)]
    untouched, scale = np.delete(y, inside), 2 * d**-0.5
    function(*map(pointer, (q, k, v, mask, y)), *[stride] * 4, *mask_strides, rows, keys, 0,
             ctypes.c_float(scale))  # fmt: skip
    whole_mask = np.broadcast_to(mask, (rows, keys))
    expected, found = definition(*map(vectors, (q, k, v)), whole_mask, scale), vectors(y)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    if np.nan_to_num(expected).any():
        # A score next to the middle of two steps may be rounded to the other.
        assert sqnr(np.nan_to_num(expected), np.nan_to_num(found)) >= 60
    np.testing.assert_array_equal(np.delete(y, inside), untouched)


@pytest.mark.parametrize("kind", ["plain", "masked"])
@pytest.mark.parametrize("scale", [1e3, 1e7, -1e3, -0.3, 0.0])
def test_scores_may_be_large_and_scales_negative(kernel, kind, scale):
    """The largest score of a row is subtracted exactly, however large: its weight is 255."""
    d, functions = kernel
    rng, rows, keys = np.random.default_rng(1), 13, 300
    q, k, v = (rng.standard_normal((n, d), np.float32) for n in (rows, keys, keys))
    mask, y = np.zeros((1, 1), np.float32), np.zeros((rows, d), np.float32)
    getattr(functions, kind)(*map(pointer, (q, k, v, mask, y)), *[d] * 4, 0, 0, rows, keys, 0,
                             ctypes.c_float(scale))  # fmt: skip
    assert sqnr(definition(q, k, v, np.broadcast_to(mask, (rows, keys)), scale), y) >= 40


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "kernels.so"
    report = build_library([REGION], DOMAIN, path, cache=KernelCache())
    assert report.isa == ("avx512-vnni", "avx2")
    return path


REGION = Region("MaskedAttention", (("D", 64),), flags=("ssss", "zero", "int8"))


def feeds_of(batch: int, rows: int, keys: int, mask_rows: int) -> dict[str, Array]:
    rng = np.random.default_rng(rows)
    feeds = {
        name: rng.standard_normal((batch, tokens, 2, 64), np.float32)
        for name, tokens in zip("qkv", (rows, keys, keys), strict=True)
    }
    return feeds | {"mask": mask_of("padding", rng, [1, 1, mask_rows, keys])}


@pytest.mark.parametrize(
    ("isa", "floor_db"), [(None, FLOOR_DB), (AVX512_VNNI, FLOOR_DB), (AVX2, 60)]
)
@pytest.mark.parametrize(("rows", "keys"), [(2, 1), (9, 33), (40, 300), (5, 1031), (600, 70)])
def test_kernel_is_close_to_its_body(library, isa, floor_db, rows, keys):
    for mask_rows in (1, rows):
        feeds = feeds_of(2, rows, keys, mask_rows)
        feeds["mask"][..., 0] = 0
        if mask_rows > 1:
            feeds["mask"][..., 0, :] = -np.inf
        (expected,) = session(REGION, 4, 1, None).run(None, feeds)
        for threads in (1, 2):
            (native,) = session(REGION, 4, threads, library, isa).run(None, feeds)
            assert sqnr(expected, native) >= floor_db
            if mask_rows > 1:
                np.testing.assert_array_equal(native[:, 0], 0)


def test_a_single_row_stays_float32(library):
    feeds = feeds_of(2, 1, 77, 1)
    (expected,) = session(REGION, 4, 1, None).run(None, feeds)
    (native,) = session(REGION, 4, 1, library, AVX512_VNNI).run(None, feeds)
    assert sqnr(expected, native) >= 60


def test_an_empty_batch(library):
    (native,) = session(REGION, 4, 1, library, AVX512_VNNI).run(None, feeds_of(0, 5, 7, 1))
    assert native.shape == (0, 5, 2, 64)

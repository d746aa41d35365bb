"""The int8 product that torchao writes out arrives as DequantizeLinear and MatMul."""

import collections

import numpy as np
import pytest
from golden import model_of, run

pytest.importorskip("torch", reason="torch is not installed")

from qcompiler.from_torch.integer_products import integer_products

RNG = np.random.default_rng(0)
W = RNG.integers(-128, 128, (16, 4)).astype(np.int8)
WEIGHTS = {
    "w": W,
    "t": RNG.uniform(0.01, 0.02, 4).astype(np.float32),
    "middle": np.int32(128),
    "sums": (128 * W.sum(0, dtype=np.int32))[None],
    "others": (128 * W.sum(0, dtype=np.int32) + 1)[None],
    "axes": np.int64([0]),
}
HEAD = "g (int8[m,16] q, float[m,1] s) => (float[m,4] y) {"
SHIFTED = "i = Cast<to=6>(q) a = Add (i, middle) u = Cast<to=2>(a) p = MatMulInteger (u, w) "
SCALED = "f = Cast<to=1>(d) r = Mul (f, s) y = Mul (r, t) }"
FOLDED = HEAD + SHIFTED + "d = Sub (p, sums) " + SCALED
SUMS = "j = Cast<to=6>(w) c = ReduceSum<keepdims=1>(j, axes) z = Mul (c, middle) "
WRITTEN = HEAD + SHIFTED + SUMS + "d = Sub (p, z) " + SCALED
OTHER = HEAD + SHIFTED + "d = Sub (p, others) " + SCALED


def ops(model):
    return collections.Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("text", [FOLDED, WRITTEN])
def test_int8_tokens_times_an_int8_weight(text):
    model = model_of(text, WEIGHTS)
    feeds = {
        "q": RNG.integers(-128, 128, (3, 16)).astype(np.int8),
        "s": RNG.uniform(0.01, 0.02, (3, 1)).astype(np.float32),
    }
    before = run(model, feeds)[0]
    integer_products(model)
    assert ops(model) == {"DequantizeLinear": 2, "MatMul": 1}
    np.testing.assert_allclose(run(model, feeds)[0], before, rtol=1e-5, atol=1e-5)


BATCH = "g (int8[b,3,16] q, float[b,3,1] s) => (float[m,4] y) {"
FLAT = "a = Reshape (q, tokens) c = Reshape (s, scales) p = MatMulInteger (a, w) "
PLAIN = BATCH + FLAT + "f = Cast<to=1>(p) r = Mul (f, c) y = Mul (r, t) }"
SHAPES = {"tokens": np.int64([-1, 16]), "scales": np.int64([-1, 1])}


def test_tokens_of_all_batches_as_one_matrix():
    model = model_of(PLAIN, WEIGHTS | SHAPES)
    feeds = {
        "q": RNG.integers(-128, 128, (5, 3, 16)).astype(np.int8),
        "s": RNG.uniform(0.01, 0.02, (5, 3, 1)).astype(np.float32),
    }
    before = run(model, feeds)[0]
    integer_products(model)
    found = ops(model)
    assert not found["MatMulInteger"]
    assert found["DequantizeLinear"] == 2
    np.testing.assert_allclose(run(model, feeds)[0], before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float[b,3,1] s", "float[b,1,1] s"),
        ("float[b,3,1] s", "float[k,3,1] s"),
        ("float[b,3,1] s", "float[3,1] s"),
        ("int8[b,3,16] q", "uint8[b,3,16] q"),
    ],
)
def test_tokens_without_a_scale_each_stay(old, new):
    model = model_of(PLAIN.replace(old, new), WEIGHTS | SHAPES)
    integer_products(model)
    assert ops(model)["MatMulInteger"] == 1


def test_what_takes_off_something_else_stays():
    model = model_of(OTHER, WEIGHTS)
    before = ops(model)
    integer_products(model)
    assert ops(model) == before

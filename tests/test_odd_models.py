"""Legal and unusual models: every target answers like FP32, natively and from its bodies."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of, run, sqnr

import qcompiler
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


W, V = normal(64, 16), normal(16, 64)
X = normal(5, 64)
CONV_W = normal(4, 2, 3, 3)
IMAGE = normal(2, 2, 8, 8)

FLOOR = {"int8": 26, "int4": 15, "-fp8": 20}
"""SQNR in dB that a scheme keeps on these small random models."""

# name: (text, weights, feeds)
MODELS = {
    "an input has the name of a generated scale": (
        "g (float[m,64] x, float[16] w_scale) => (float[m,16] y) "
        "{ p = MatMul (x, w) y = Mul (p, w_scale) }",
        {"w": W},
        {"x": X, "w_scale": np.abs(normal(16))},
    ),
    "a value has the name of a generated one": (
        "g (float[m,64] x) => (float[m,16] y) "
        "{ x_q = Neg (x) x_s = MatMul (x_q, w) p = MatMul (x, w) y = Sub (x_s, p) }",
        {"w": W},
        {"x": X},
    ),
    "a weight is an output too": (
        "g (float[m,64] x) => (float[m,16] y, float[64,16] w) { y = MatMul (x, w) }",
        {"w": W},
        {"x": X},
    ),
    "the input is an output too": (
        "g (float[m,64] x) => (float[m,16] y, float[m,64] x) { y = MatMul (x, w) }",
        {"w": W},
        {"x": X},
    ),
    "one weight, three readers": (
        "g (float[m,64] x) => (float[m,16] y, float[m,16] z) "
        "{ y = MatMul (x, w) t = Neg (x) z = MatMul (t, w) }",
        {"w": W},
        {"x": X},
    ),
    "a weight on the left": (
        "g (float[64,m] x) => (float[16,m] y) { y = MatMul (l, x) }",
        {"l": np.ascontiguousarray(W.T)},
        {"x": np.ascontiguousarray(X.T)},
    ),
    "a branch and the main graph share an activation": (
        "g (float[m,64] x, bool c) => (float[m,16] y) { y1 = If (c) "
        "<then_branch = a () => (float[m,16] p) { p = MatMul (x, w) }, "
        "else_branch = b () => (float[m,16] n) { t = MatMul (x, w) n = Neg (t) }> "
        "z = MatMul (x, w) y = Add (y1, z) }",
        {"w": W},
        {"x": X, "c": np.array(True)},
    ),
    "a loop with a product inside": (
        "g (float[m,64] x, int64 n, bool c) => (float[m,64] y) { y = Loop (n, c, x) "
        "<body = b (int64 i, bool go, float[m,64] state) => (bool more, float[m,64] next) "
        "{ more = Identity (go) p = MatMul (state, w) h = Tanh (p) q = MatMul (h, v) "
        "next = Tanh (q) }> }",
        {"w": W / 16, "v": V / 16},
        {"x": X, "n": np.array(2), "c": np.array(True)},
    ),
    "a convolution in a branch": (
        "g (float[n,2,8,8] x, bool c) => (float[n,4,6,6] y) { y = If (c) "
        "<then_branch = a () => (float[n,4,6,6] p) { s = Conv (x, k) p = Relu (s) }, "
        "else_branch = b () => (float[n,4,6,6] q) { q = Conv (x, k) }> }",
        {"k": CONV_W},
        {"x": IMAGE, "c": np.array(True)},
    ),
    "float64": (
        "g (double[m,64] x) => (double[m,16] y) { y = MatMul (x, w) }",
        {"w": W.astype(np.float64)},
        {"x": X.astype(np.float64)},
    ),
    "float16": (
        "g (float16[m,64] x) => (float16[m,16] y) { y = MatMul (x, w) }",
        {"w": W.astype(np.float16)},
        {"x": X.astype(np.float16)},
    ),
    "a vector": (
        "g (float[64] x) => (float[16] y) { y = MatMul (x, w) }",
        {"w": W},
        {"x": X[0]},
    ),
    "five dimensions": (
        "g (float[a,b,2,1,64] x) => (float[a,b,2,1,16] y) { y = MatMul (x, w) }",
        {"w": W},
        {"x": normal(2, 3, 2, 1, 64)},
    ),
    "a batch of none": (
        "g (float[m,64] x) => (float[m,16] y) { y = MatMul (x, w) }",
        {"w": W},
        {"x": X[:0]},
    ),
    "no columns": (
        "g (float[m,64] x) => (float[m,0] y) { y = MatMul (x, w) }",
        {"w": W[:, :0]},
        {"x": X},
    ),
    "a ragged product": (
        "g (float[m,61] x) => (float[m,7] y) { p = MatMul (x, w) y = Add (p, b) }",
        {"w": normal(61, 7), "b": normal(7)},
        {"x": normal(3, 61)},
    ),
    "a clipped product": (
        "g (float[m,64] x) => (float[m,16] y) { p = MatMul (x, w) y = Clip (p, lo, hi) }",
        {"w": W, "lo": np.float32(0), "hi": np.float32(6)},
        {"x": X},
    ),
    "a product clipped below": (
        "g (float[m,64] x) => (float[m,16] y) { p = MatMul (x, w) y = Clip (p, lo) }",
        {"w": W, "lo": np.float32(0)},
        {"x": X},
    ),
    "a convolution without a Relu before the output": (
        "g (float[n,2,8,8] x) => (float[n,4,6,6] y) { y = Conv (x, k) }",
        {"k": CONV_W},
        {"x": IMAGE},
    ),
    "a rectified convolution before the output": (
        "g (float[n,2,8,8] x) => (float[n,4,6,6] y) { c = Conv (x, k) y = Relu (c) }",
        {"k": CONV_W},
        {"x": IMAGE},
    ),
    "a convolution with a dead channel": (
        "g (float[n,2,8,8] x) => (float[n,4,6,6] y) { c = Conv (x, k, b) y = Neg (c) }",
        {"k": CONV_W * np.array([1, 0, 1, 1e-9], np.float32)[:, None, None, None],
         "b": np.array([0.1, 0.7, -1, 2], np.float32)},
        {"x": IMAGE},
    ),
    "an attention of itself": (
        "g (float[b,h,16,16] q, float[b,h,16,16] k) => (float[b,h,16,16] y) "
        "{ t = Transpose <perm = [0,1,3,2]> (k) p = MatMul (q, t) w = Softmax (p) "
        "y = MatMul (w, w) }",
        {},
        {"q": normal(1, 2, 16, 16), "k": normal(1, 2, 16, 16)},
    ),
    "an RMSNorm that adds dimensions": (
        "g (float[b,s,32] x) => (float[o,p,q,32] y) { s2 = Pow (x, two) "
        "m = ReduceMean (s2, last) a = Add (m, e) r = Sqrt (a) u = Div (x, r) y = Mul (u, g) }",
        {"two": np.float32(2), "last": np.array([-1]), "g": normal(32),
         "e": np.full((1, 1, 1, 1), 1e-5, np.float32)},
        {"x": normal(2, 3, 32)},
    ),
    "a long name": (
        "g (float[m,64] x) => (float[m,16] y) { y = MatMul (x, " + "w" * 300 + ") }",
        {"w" * 300: W},
        {"x": X},
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_answers_like_float(name, target, tmp_path):
    text, weights, feeds = MODELS[name]
    model = model_of(text, weights)
    expected = run(model, feeds)
    np.savez(tmp_path / "sample.npz", **feeds)
    report = qcompiler.compile(model, target, tmp_path / "b", calibration=tmp_path / "sample.npz")
    for native in (True, False):
        results = qcompiler.load(report.bundle, native=native).run(None, feeds)
        for got, want in zip(results, expected, strict=True):
            assert got.shape == want.shape
            assert not want.size or sqnr(want, got) > FLOOR[target[-4:]]


def test_what_stays_float_says_so(tmp_path):
    text, weights, feeds = MODELS["a rectified convolution before the output"]
    np.savez(tmp_path / "sample.npz", **feeds)
    report = qcompiler.compile(
        model_of(text, weights), "arm-int8", tmp_path / "b", calibration=tmp_path / "sample.npz"
    )
    assert {d.action for d in report.decisions} == {"float"}
    assert any("not used" in warning for warning in report.warnings)


def test_a_bundles_own_model_starts_over(tmp_path):
    """Decisions that came with the input were about another compilation."""
    text, weights, _ = MODELS["a ragged product"]
    first = qcompiler.compile(model_of(text, weights), "x86-int8", tmp_path / "a").bundle
    again = qcompiler.compile(first / "model.onnx", "arm-int8", tmp_path / "b")
    assert again.count("kernel") == 0


def test_a_weight_inside_a_branch_is_not_kept_twice(tmp_path):
    model = model_of(MODELS["a branch and the main graph share an activation"][0], {"w": W})
    report = qcompiler.compile(model, "arm-int8", tmp_path / "b")
    saved = ir.load(report.bundle / "model.onnx")
    stored = [v.const_value for g in saved.graphs() for v in g.initializers.values()]
    assert not any(t.dtype is ir.DataType.FLOAT and t.size >= W.size for t in stored)

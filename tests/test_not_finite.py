"""What kernels make of rows with NaN, infinity and huge values, beside what bodies make of them."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import model_of, sqnr
from instruction_sets import needs_kernels

import qcompiler

pytestmark = needs_kernels

RNG = np.random.default_rng(0)
K = 100
W = RNG.standard_normal((K, 48), dtype=np.float32) * 0.05
NAN, INF = np.float32(np.nan), np.float32(np.inf)

# `own` quantizes its operand itself, `shared` reads one Quantize with `wide`, `normed` and `added`
# what norms quantize, `next` what a product does.
MODEL = model_of(
    "g (float[m,100] x) => (float[m,48] own, float[m,48] shared, float[m,1200] wide, "
    "float[m,48] normed, float[m,48] added, float[m,48] next) { h = Neg (x) own = MatMul (h, w) "
    "shared = MatMul (x, w) wide = MatMul (x, v) "
    "n = LayerNormalization <axis = -1> (x, g, b) normed = MatMul (n, w) "
    "t = MatMul (x, u) next = MatMul (t, w) "
    "r = Add (x, h) s = LayerNormalization <axis = -1> (r, g, b) added = MatMul (s, w) }",
    {
        "w": W,
        "v": RNG.standard_normal((K, 1200), dtype=np.float32),
        "u": RNG.standard_normal((K, K), dtype=np.float32) * 0.1,
        "g": np.ones(K, np.float32),
        "b": RNG.standard_normal(K, dtype=np.float32),
    },
)
OUTPUTS = [value.name for value in MODEL.graph.outputs]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    return qcompiler.compile(MODEL, "x86-int8", folder, timing=False).bundle


def answers(bundle, rows, *, native):
    found = qcompiler.load(bundle, native=native).run(None, {"x": np.stack(rows)})
    return dict(zip(OUTPUTS, found, strict=True))


def plain():
    return RNG.standard_normal(K, dtype=np.float32)


def with_one(value):
    row = plain()
    row[7] = value
    return row


def test_every_way_to_quantize_is_there(bundle):
    ops = {node.op_type for node in onnx.load(bundle / "model.onnx").graph.node}
    begins = ("Dynamic", "Quantize", "LayerNorm", "AddLayerNorm", "Requantized")
    assert all(any(op.startswith(begin) for op in ops) for begin in begins), ops


@pytest.mark.parametrize("native", [True, False])
def test_rows_of_nan_stay_nan(bundle, native):
    rows = [plain(), np.full(K, NAN), np.zeros(K, np.float32), plain(), np.full(K, NAN)]
    for name, found in answers(bundle, rows, native=native).items():
        assert np.isnan(found[[1, 4]]).all(), name
        assert np.isfinite(found[[0, 2, 3]]).all(), name
        if name in ("own", "shared", "wide", "next"):
            assert not found[2].any(), name


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_norms_spread_what_is_not_finite_over_a_row(bundle, value, native):
    found = answers(bundle, [plain(), with_one(value)], native=native)
    for name in ("normed", "added"):
        assert np.isnan(found[name][1]).all(), name
        assert np.isfinite(found[name][0]).all(), name


def test_a_single_nan_is_passed_over(bundle):
    """It becomes the lowest integer; in bodies all depends on where in the row it is."""
    row = with_one(NAN)
    found = answers(bundle, [row], native=True)["shared"][0]
    row[7] = np.nanmax(np.abs(row)) * np.float32(-128 / 127)
    assert sqnr(row @ W, found) > 35


def test_infinity_does_not_become_a_number(bundle):
    for native in (True, False):
        found = answers(bundle, [with_one(INF), with_one(-INF)], native=native)
        for name in ("own", "shared", "wide", "next"):
            assert not np.isfinite(found[name]).any(), (name, native)


def test_huge_rows_overflow_in_bodies_before_they_do_in_kernels(bundle):
    """Bodies multiply sums by the scale of the token first, kernels by both scales at once."""
    rows = [plain() * np.float32(1e30), plain() * np.float32(1e37)]
    native, body = (answers(bundle, rows, native=native)["shared"] for native in (True, False))
    for found, row in zip(native, rows, strict=True):
        assert sqnr((row / 1e30) @ W, found / 1e30) > 35
    assert sqnr(native[0] / 1e30, body[0] / 1e30) > 60
    assert np.isinf(body[1]).any()


@pytest.mark.parametrize("size", [1e18, 1e20, 1e25, 1e28, 1e33, 1e36])
def test_norms_of_huge_rows_are_beta_as_in_onnxruntime(bundle, size):
    rows = [plain(), plain() * np.float32(size)]
    float_model = ort.InferenceSession(ir.to_proto(MODEL).SerializeToString())
    exact = dict(zip(OUTPUTS, float_model.run(None, {"x": np.stack(rows)}), strict=True))
    for native in (True, False):
        found = answers(bundle, rows, native=native)
        for row in (0, 1):
            assert sqnr(exact["normed"][row], found["normed"][row]) > 35, (row, native)


def test_norms_whose_sum_overflows_are_nan_in_kernels(bundle):
    rows = [np.full(K, np.float32(3e37)), plain(), np.full(K, np.float32(3e38))]
    found = answers(bundle, rows, native=True)["normed"]
    assert np.isnan(found[[0, 2]]).all() and np.isfinite(found[1]).all()


@pytest.mark.parametrize(
    "steps", ["Relu", "Clip", "Sigmoid", "Tanh", "Gelu", "HardSwish", "LeakyRelu"]
)
def test_rows_of_nan_stay_nan_behind_activations(steps, tmp_path):
    clip = "(h, low, high)" if steps == "Clip" else "(h)"
    model = model_of(
        f"g (float[m,100] x) => (float[m,48] y) {{ h = MatMul (x, w) y = {steps} {clip} }}",
        {"w": W, "low": np.float32(-1), "high": np.float32(1)},
    )
    compiled = qcompiler.compile(model, "x86-int8", tmp_path / "b", timing=False).bundle
    ops = [node.op_type for node in onnx.load(compiled / "model.onnx").graph.node]
    assert len(ops) == 1, ops
    x = np.stack([plain(), np.full(K, NAN), plain()])
    for native in (True, False):
        (found,) = qcompiler.load(compiled, native=native).run(None, {"x": x})
        assert np.isnan(found[1]).all(), native
        assert np.isfinite(found[[0, 2]]).all(), native

"""Sums of int8 weights are exact on every processor; those here saturate without VNNI."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import ORT_HEAD, assert_rewrites, model_of
from saturating_weights import HEAD, LARGE, PAIR, QUANTIZED, X, plainly

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decision_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.shift_weights import ShiftWeights
from qcompiler.session_options import new_session_options

RNG = np.random.default_rng(1)
IMAGE = {"x": RNG.uniform(2, 5, (1, 64, 4, 4)).astype(np.float32)}


def with_options(model: ir.Model, feeds, options):
    dialect.declare(model)
    options.log_severity_level = 4
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, feeds)


def assert_exact(model: ir.Model, feeds, expected) -> None:
    """With the option that sessions of bundles ask for and without it, optimized or not."""
    off = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for options in (ort.SessionOptions(), new_session_options()):
        for level in (options.graph_optimization_level, off):
            options.graph_optimization_level = level
            for got, want in zip(with_options(model, feeds, options), expected, strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.parametrize(
    ("weight", "attributes"),
    [("(w, wr)", ""), ("<axis = 1> (w, ws)", "{'axis': '1'}")],
)
def test_pairs(weight, attributes):
    model = model_of(f"{HEAD}{{ {PAIR}f = DequantizeLinear {weight} y = MatMul (d, f) }}", LARGE)
    expected = plainly(model, X)
    assert_rewrites(ShiftWeights(), model, f"""
        inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v5 = DequantizeLinear  (v4, v2, v3)
        v9 = DequantizeLinear {attributes} (v6, v7, v8)
        y = MatMul  (v5, v9)
        outputs y""", X, exact=False, floor_db=100)  # fmt: skip
    dequantize = model.graph[2]
    points = dequantize.inputs[2].const_value.numpy()
    assert points.dtype == np.uint8
    assert points.shape == tuple(dequantize.inputs[1].shape)
    assert decision_of(dequantize).why.endswith("saturate without VNNI")
    assert_exact(model, X, expected)


@pytest.mark.parametrize("weight", ["(w, wr, wzs)", "<axis = 1> (w, ws, wz)"])
def test_zero_points_are_shifted_too(weight):
    model = model_of(f"{HEAD}{{ {PAIR}f = DequantizeLinear {weight} y = MatMul (d, f) }}", LARGE)
    expected, before = plainly(model, X), model.graph[2].inputs[2].const_value.numpy()
    assert ShiftWeights()(model).modified
    assert not ShiftWeights()(model).modified
    points = model.graph[2].inputs[2].const_value.numpy()
    np.testing.assert_array_equal(points, before.astype(np.int16) + 128)
    assert_exact(model, X, expected)


OPS = {
    "MatMulInteger": "i = MatMulInteger (q, w, xz) y = Cast <to = 1> (i)",
    "MatMulInteger, zero points": "i = MatMulInteger (q, w, xz, wz) y = Cast <to = 1> (i)",
    "QLinearMatMul": "r = QLinearMatMul (q, xs, xz, w, ws, wz, ys, yz) "
    "y = DequantizeLinear (r, ys, yz)",
    "DynamicQuantizeMatMul": "y = com.microsoft.DynamicQuantizeMatMul (x, w, ws, wz)",
    "DynamicQuantizeMatMul, none": "y = com.microsoft.DynamicQuantizeMatMul (x, w, ws)",
    "MatMulIntegerToFloat": "y = com.microsoft.MatMulIntegerToFloat (q, w, xs, ws, xz)",
    "QGemm": "y = com.microsoft.QGemm (q, xs, xz, w, ws, wz)",
}


@pytest.mark.parametrize("op", OPS)
def test_integer_ops(op):
    model = model_of(f"{HEAD}{{ {QUANTIZED}{OPS[op]} }}", LARGE, ORT_HEAD)
    x = np.clip(np.rint(X["x"] / 0.02) + 3, 0, 255) - 3
    sums = x @ LARGE["w"].astype(np.float64)
    if op.startswith("QLinear"):
        real = sums * 0.02 * LARGE["ws"]
        expected = (np.clip(np.rint(real / 90) + 7, 0, 255) - 7) * 90
    else:
        expected = sums if "Integer," in op or op == "MatMulInteger" else sums * 0.02 * LARGE["ws"]
    assert ShiftWeights()(model).modified
    assert not ShiftWeights()(model).modified
    (product,) = (node for node in model.graph if node.op_type == op.partition(",")[0])
    kinds = {value.dtype for value in product.inputs if value is not None}
    assert ir.DataType.INT8 not in kinds
    tolerance = 2e-2 if op.startswith("Dynamic") else 1e-5
    for options in (ort.SessionOptions(), new_session_options()):
        (y,) = with_options(model, X, options)
        np.testing.assert_allclose(y, expected, rtol=tolerance)


def test_attention_and_lstm():
    """Both weights of an LSTM; each keeps its zero point."""
    text = (
        "g (uint8[1,2,64] a, float[2,1,4] z) => (float[1,2,8] y, float[2,1,1,2] h) { "
        "y = com.microsoft.QAttention <num_heads = 2> (a, aw, ab, xs, wr, , xz, wzs) "
        "h = com.microsoft.DynamicQuantizeLSTM <hidden_size = 2> "
        "(z, lw, lr, , , , , , ls, lz, ls, lz) }"
    )
    weights = LARGE | {
        "aw": RNG.integers(90, 128, (64, 24)).astype(np.int8), "ab": np.zeros(24, np.float32),
        "lw": RNG.integers(-128, 128, (1, 4, 8)).astype(np.int8),
        "lr": RNG.integers(-128, 128, (1, 2, 8)).astype(np.int8),
        "ls": np.full(1, 0.01, np.float32), "lz": np.full(1, 2, np.int8),
    }  # fmt: skip
    model = model_of(text, weights, ORT_HEAD)
    feeds = {
        "a": RNG.integers(0, 60, (1, 2, 64)).astype(np.uint8),
        "z": RNG.standard_normal((2, 1, 4)).astype(np.float32),
    }
    few = {name: value if value.dtype != np.int8 else np.clip(value, -64, 64).astype(np.int8)
           for name, value in weights.items()}  # fmt: skip
    exact = model_of(text, few, ORT_HEAD)
    expected = with_options(exact, feeds, ort.SessionOptions())
    assert ShiftWeights()(exact).modified
    assert ShiftWeights()(model).modified
    attention, lstm = model.graph
    for node, places in ((attention, (1, 7)), (lstm, (1, 2, 9, 11))):
        assert {node.inputs[place].dtype for place in places} == {ir.DataType.UINT8}
    for got, want in zip(with_options(exact, feeds, new_session_options()), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    with_options(model, feeds, new_session_options())


@pytest.mark.parametrize(("second", "kind"), [("z", ir.DataType.INT8), ("lw", ir.DataType.UINT8)])
def test_an_lstm_of_a_bundle_keeps_its_weights_for_sessions_to_shift(second, kind):
    """By uint8 ORT takes 1.7 times as long with VNNI; it cannot shift what two nodes share."""
    lstm = (
        "com.microsoft.DynamicQuantizeLSTM <hidden_size = 2> (z, {}, lr, , , , , , ls, lz, ls, lz)"
    )
    other = "u = Neg (z)" if second == "z" else f"u = {lstm.format('lw')}"
    model = model_of(
        "g (float[2,1,4] z) => (float[a,b,c,d] h, float[e,f,g,i] u) "
        f"{{ h = {lstm.format('lw')} {other} }}",
        {"lw": RNG.integers(-60, 60, (1, 4, 8)).astype(np.int8),
         "lr": RNG.integers(-60, 60, (1, 2, 8)).astype(np.int8),
         "ls": np.full(1, 0.01, np.float32), "lz": np.full(1, 2, np.int8)},
        ORT_HEAD,
    )  # fmt: skip
    assert ShiftWeights(sessions_ask=True)(model).modified == (kind is ir.DataType.UINT8)
    assert {model.graph[0].inputs[place].dtype for place in (1, 2, 9, 11)} == {kind}
    assert decision_of(model.graph[0]).why.count("stored as uint8") == (kind is ir.DataType.UINT8)
    feeds = {"z": RNG.standard_normal((2, 1, 4)).astype(np.float32)}
    asked = ort.SessionOptions()
    asked.add_session_config_entry("session.x64quantprecision", "1")
    for options in (ort.SessionOptions(), asked):
        with_options(model, feeds, options)


@pytest.mark.parametrize(
    ("inputs", "body"),
    [
        ("int8[3,64] q", "i = MatMulInteger (q, w) y = Cast <to = 1> (i)"),
        ("uint8[3,64] q, int8[64,8] v", "i = MatMulInteger (q, v) y = Cast <to = 1> (i)"),
        ("uint8[3,64] q, int8 p", "i = MatMulInteger (q, w, xz, p) y = Cast <to = 1> (i)"),
        ("int8[3,8] q", "y = DequantizeLinear (q, wr)"),
        ("float[n] s", "y = DequantizeLinear <axis = 1> (w, s)"),
        ("float[64,8] x", "y = Mul (x, x)"),
    ],
)
def test_leaves(inputs, body):
    """Int8 activations, what is computed, zero points of a number that nobody knows."""
    model = model_of(f"g ({inputs}) => (float[a,b] y) {{ {body} }}", LARGE)
    assert not ShiftWeights()(model).modified


def test_a_shared_weight_is_stored_once():
    model = model_of(
        "g (float[3,64] x) => (float[3,8] y, float[3,8] v, int8[64,8] w) "
        f"{{ {PAIR}f = DequantizeLinear <axis = 1> (w, ws) y = MatMul (d, f) "
        "e = Neg (x) r = QuantizeLinear (e, xs, xz) h = DequantizeLinear (r, xs, xz) "
        "o = DequantizeLinear (w, wr) v = MatMul (h, o) }",
        LARGE,
    )
    expected = plainly(model, X)
    assert ShiftWeights()(model).modified
    stored = [v for v in model.graph.initializers.values() if v.shape == ir.Shape([64, 8])]
    assert sorted(value.dtype.name for value in stored) == ["INT8", "UINT8"]  # an output, too
    assert_exact(model, X, expected)


def test_weights_of_branches():
    numbers = ", ".join(["127"] * 8)
    model = model_of(
        f"g (float[3,64] x, bool c) => (float[3,8] y) {{ {QUANTIZED} y = If (c) <"
        f"then_branch = a () => (float[3,8] p) <int8[1,8] u = {{{numbers}}}> "
        "{ i = MatMulInteger (q, w, xz) f = DequantizeLinear (u, wr) "
        "r = Cast <to = 1> (i) p = Add (r, f) }, "
        "else_branch = e () => (float[3,8] n) "
        "{ h = DequantizeLinear (v, wr) n = Add (h, h) }> }",
        LARGE | {"v": LARGE["w"][:3]},
    )
    assert ShiftWeights()(model).modified
    verify(model, Stage.QUANTIZED, "shift-weights")
    dtypes = {v.dtype for graph in model.graphs() for v in graph.initializers.values()}
    assert ir.DataType.INT8 not in dtypes
    x = np.clip(np.rint(X["x"] / 0.02) + 3, 0, 255) - 3
    expected = x @ LARGE["w"].astype(np.float64) + 1.27
    (y,) = with_options(model, X | {"c": np.array(True)}, new_session_options())
    np.testing.assert_allclose(y, expected, rtol=1e-6)


CONVOLUTION = (
    "{p}q = QuantizeLinear ({x}, xs, xz) {p}d = DequantizeLinear ({p}q, xs, xz) "
    "{p}f = DequantizeLinear <axis = 0> (k, ws) {p}c = Conv ({p}d, {f}) "
    "{p}r = QuantizeLinear ({p}c, ys, yz) {y} = DequantizeLinear ({p}r, ys, yz) "
)


def convolved(model: ir.Model, feeds):
    """The results after folding; each convolution's weights are its own, in its own graph."""
    expected = plainly(model, feeds)
    FoldQDQ()(model)
    verify(model, Stage.QUANTIZED, "fold-qdq")
    convolutions = [node for node in model.graph.all_nodes() if node.op_type == "QConv"]
    for node in convolutions:
        for value in (node.inputs[3], node.inputs[5]):
            assert value.graph is node.graph
            assert [use.node for use in value.uses()] == [node]
    for got, want in zip(with_options(model, feeds, new_session_options()), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=90.1)  # a tie may fall either way: one step
        assert np.abs(got - want).mean() < 3
    return len(convolutions)


@pytest.mark.parametrize("shares", ["weight", "dequantize"])
def test_convolutions_that_share_a_weight(shares):
    """ONNX Runtime would make no session of that with exact sums."""
    both = CONVOLUTION.format(p="a", x="x", f="af", y="y") + "m = Neg (x) n = Neg (m) "
    both += CONVOLUTION.format(p="b", x="n", f="bf" if shares == "weight" else "af", y="z")
    outputs = "float[a,b,c,e] y, float[l,m,n,o] z"
    model = model_of(f"g (float[1,64,4,4] x) => ({outputs}) {{ {both} }}", LARGE)
    assert convolved(model, IMAGE) == 2


@pytest.mark.parametrize("flag", [True, False])
def test_convolutions_in_branches(flag):
    """There, ONNX Runtime stores none of the weights of the graph around as uint8."""
    model = model_of(
        "g (float[1,64,4,4] x, bool c) => (float[a,b,h,w] y) { y = If (c) "
        "<then_branch = t () => (float[a,b,h,w] p) { "
        f"{CONVOLUTION.format(p='a', x='x', f='af', y='p')} }}, "
        "else_branch = e () => (float[a,b,h,w] n) { m = Neg (x) u = Neg (m) "
        f"{CONVOLUTION.format(p='b', x='u', f='bf', y='n')} }}> }}",
        LARGE,
    )
    assert convolved(model, IMAGE | {"c": np.array(flag)}) == 2

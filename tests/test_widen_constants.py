"""Weights of ops that compute in float stay as small as they came, and cost nothing at run time."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import assert_rewrites, model_of, run

from qcompiler.ir.decisions import decision_of
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.lift_qoperators import LiftQOperators
from qcompiler.pipeline import Pipeline
from qcompiler.targets.catalog import get_target

RNG = np.random.default_rng(0)
HIDDEN, INPUT = 48, 24
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FEEDS = {"x": RNG.standard_normal((5, 2, INPUT)).astype(np.float32)}


def recurrent(op: str, weights: str, *, activations: str = "", bias: bool = False) -> ir.Model:
    rows = GATES[op] * HIDDEN
    values = {
        "w": RNG.integers(-127, 128, (1, rows, INPUT)).astype(np.int8),
        "r": RNG.integers(-127, 128, (1, rows, HIDDEN)).astype(np.int8),
        "wu": RNG.integers(0, 256, (1, rows, INPUT)).astype(np.uint8),
        "wf": RNG.standard_normal((1, rows, INPUT)).astype(np.float32) / 8,
        "b": RNG.integers(-127, 128, (1, 2 * rows)).astype(np.int8),
        "s": np.float32(0.003), "z": np.int8(0), "xs": np.float32(0.03), "xz": np.uint8(128),
        "sc": RNG.uniform(0.001, 0.003, rows).astype(np.float32),
        "zc": RNG.integers(100, 140, rows).astype(np.uint8),
    }  # fmt: skip
    x, tail = "d" if activations else "x", ", bf" if bias else ""
    if bias:
        weights = f"{weights} bf = DequantizeLinear (b, s)"
    return model_of(
        f"g (float[5,2,{INPUT}] x) => (float[5,1,2,{HIDDEN}] y) {{ {activations} {weights} "
        f"y = {op} <hidden_size = {HIDDEN}> ({x}, p, q{tail}) }}",
        values,
    )


PER_TENSOR = "p = DequantizeLinear (w, s) q = DequantizeLinear (r, s)"
PER_ROW = "p = DequantizeLinear <axis = 1> (wu, sc, zc) q = DequantizeLinear <axis = 1> (r, sc)"
FROM_FLOATS = "c = QuantizeLinear (wf, s, z) p = DequantizeLinear (c, s, z) " \
              "q = DequantizeLinear (r, s)"  # fmt: skip
ROUNDED = "i = QuantizeLinear (x, xs, xz) d = DequantizeLinear (i, xs, xz)"


def test_golden():
    subject = recurrent("LSTM", PER_ROW)
    assert_rewrites(
        FoldQDQ(),
        subject,
        """inputs x
        v3 = Cast {'to': '1'} (v2)
        v5 = Sub  (v3, v4)
        v7 = Mul  (v5, v6)
        v9 = Cast {'to': '1'} (v8)
        v11 = Mul  (v9, v10)
        y = LSTM {'hidden_size': '48'} (x, v7, v11)
        outputs y""",
        FEEDS,
    )
    assert decision_of(subject.graph[0]).action == "qdq"


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("weights", [PER_TENSOR, PER_ROW, FROM_FLOATS])
@pytest.mark.parametrize("activations", ["", ROUNDED])
def test_recurrent_weights_stay_stored(op: str, weights: str, activations: str) -> None:
    model = recurrent(op, weights, activations=activations, bias=True)
    plain, fused = run(model, FEEDS, plainly=True)[0], run(model, FEEDS)[0]
    stored = GATES[op] * HIDDEN * (INPUT + HIDDEN)
    model = Pipeline.default(get_target("x86-int8")).run(model)
    np.testing.assert_array_equal(run(model, FEEDS, plainly=True)[0], plain)
    # Weights that are known floats are packed, and so summed in another order.
    np.testing.assert_allclose(run(model, FEEDS)[0], fused, rtol=1e-5, atol=1e-5)
    (node,) = (node for node in model.graph if node.op_type == op)
    assert "its weights stay INT8" in decision_of(node).why
    assert "computes what was dequantized" in decision_of(node).why
    large = [v.const_value for v in model.graph.initializers.values() if v.const_value.size > 1024]
    assert sum(tensor.nbytes for tensor in large) == stored


def test_onnx_runtime_makes_floats_of_them_once(tmp_path) -> None:
    model = recurrent("LSTM", PER_ROW)
    FoldQDQ()(model)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    assert [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node] == ["LSTM"]


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("f = DequantizeLinear (k, s) y = Conv (x, f)", ["Cast", "Mul", "Conv"]),
        ("f = DequantizeLinear <axis = 1> (k, sk, zk) y = ConvTranspose (x, f)",
         ["Cast", "Sub", "Mul", "ConvTranspose"]),
        ("f = DequantizeLinear (small, s) y = Conv (x, f)", ["Conv"]),
        ("f = DequantizeLinear (k, s) y = Conv (x, f) z = Add (f, s)",  # what else reads it
         ["Conv", "Add"]),
        ("f = DequantizeLinear (four, s) y = Conv (x, f)", ["Cast", "Mul", "Conv"]),
    ],
)  # fmt: skip
def test_float_convolutions(body: str, ops: list[str]) -> None:
    values = {
        "k": RNG.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8), "s": np.float32(0.003),
        "small": RNG.integers(-127, 128, (16, 16, 1, 1)).astype(np.int8),
        "four": RNG.integers(-8, 8, (16, 16, 3, 3)).astype(ir.DataType.INT4.numpy()),
        "sk": RNG.uniform(0.001, 0.003, 16).astype(np.float32),
        "zk": RNG.integers(-9, 9, 16).astype(np.int8),
    }  # fmt: skip
    results = "float[1,16,n,m] y" + (", float[16,16,3,3] z" if "z =" in body else "")
    model = model_of(f"g (float[1,16,9,9] x) => ({results}) {{ {body} }}", values)
    feeds = {"x": RNG.standard_normal((1, 16, 9, 9)).astype(np.float32)}
    plain, fused = run(model, feeds, plainly=True), run(model, feeds)
    FoldQDQ()(model)
    for got, want in zip(run(model, feeds, plainly=True), plain, strict=True):
        np.testing.assert_array_equal(got, want)
    for got, want in zip(run(model, feeds), fused, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert [node.op_type for node in model.graph] == ops


SIXTEEN = "q = QuantizeLinear (x, sx, zx) d = DequantizeLinear (q, sx, zx) "
AFTER = " r = QuantizeLinear (p, sy, zx) y = DequantizeLinear (r, sy, zx)"


@pytest.mark.parametrize(
    ("body", "op"),
    [
        ("f = DequantizeLinear <axis = 1> (w, sw) y = MatMul (d, f)", "MatMul"),
        ("f = DequantizeLinear <axis = 0> (wt, sw) y = Gemm <transB = 1> (d, f, b)", "Add"),
        ("f = DequantizeLinear <axis = 1> (w, sw) y = Gemm (d, f, b)", "Add"),
        (
            "f = DequantizeLinear <axis = 1> (w, sw) m = MatMul (d, f) p = Add (b, m)" + AFTER,
            "Sub",
        ),
        (
            "f = DequantizeLinear <axis = 0> (wt, sw) p = Gemm <transB = 1> (d, f, b)" + AFTER,
            "Sub",
        ),
    ],
)
def test_activations_of_16_bits_keep_them(body: str, op: str) -> None:
    """ONNX Runtime's MatMulNBits would round them to 8."""
    stored = RNG.integers(-60, 60, (64, 32)).astype(np.int8)
    values = {
        "sx": np.float32(1e-4), "zx": np.uint16(32768), "w": stored, "wt": stored.T.copy(),
        "sw": np.linspace(0.01, 0.03, 32, dtype=np.float32), "sy": np.float32(0.01),
        "b": RNG.standard_normal(32).astype(np.float32),
    }  # fmt: skip
    model = model_of(f"g (float[5,64] x) => (float[5,32] y) {{ {SIXTEEN} {body} }}", values)
    outlying = np.where(np.arange(64) % 13 == 0, 1, 0.05)
    feeds = {"x": (RNG.standard_normal((5, 64)) * outlying).astype(np.float32)}
    want = run(model, feeds, plainly=True)[0]
    compiled = Pipeline.default("x86-int8").run(model)
    (product,) = (node for node in compiled.graph if node.op_type == "MatMul")
    assert "have 16 bits, of which ORT's MatMulNBits would keep 8" in decision_of(product).why
    assert op in {node.op_type for node in compiled.graph}
    atol = 0.0101 if AFTER in body else 1e-5  # a step of the result
    for plainly in (True, False):
        np.testing.assert_allclose(run(compiled, feeds, plainly=plainly)[0], want, atol=atol)
    assert (run(compiled, feeds)[0] != want).mean() < 0.02 or AFTER not in body


def test_groups_under_16_bits_stay_and_say_what_it_costs() -> None:
    values = {
        "sx": np.float32(1e-4), "zx": np.uint16(32768),
        "w": RNG.integers(-8, 8, (64, 32)).astype(ir.DataType.INT4.numpy()),
        "sw": RNG.uniform(0.01, 0.03, (2, 32)).astype(np.float32),
    }  # fmt: skip
    body = "f = DequantizeLinear <axis = 0, block_size = 32> (w, sw) y = MatMul (d, f)"
    model = model_of(f"g (float[5,64] x) => (float[5,32] y) {{ {SIXTEEN} {body} }}", values)
    compiled = Pipeline.default("x86-int8").run(model)
    (product,) = (node for node in compiled.graph if node.op_type == "MatMul")
    assert "its activations rounded to 8 bits" in decision_of(product).why


def test_a_weight_inside_a_branch() -> None:
    model = model_of(
        "g (float[1,16,9,9] x, bool c) => (float[1,16,7,7] y) { y = If (c) <then_branch = a () => "
        "(float[1,16,7,7] p) { f = DequantizeLinear (k, s) p = Conv (x, f) }, else_branch = b () "
        "=> (float[1,16,7,7] n) { h = DequantizeLinear (k, s) t = Conv (x, h) n = Neg (t) }> }",
        {"k": RNG.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8), "s": np.float32(0.003)},
    )
    feeds = {"x": RNG.standard_normal((1, 16, 9, 9)).astype(np.float32), "c": np.array(True)}
    want = run(model, feeds)[0]
    FoldQDQ()(model)
    assert [node.op_type for node in model.graph.all_nodes()].count("Cast") == 2
    np.testing.assert_allclose(run(model, feeds)[0], want, rtol=1e-5, atol=1e-5)


def test_a_table_that_leaves_the_graph_stays() -> None:
    model = model_of(
        "g (float[1,16,9,9] x) => (float[1,16,7,7] y, float[16,16,3,3] f) "
        "{ f = DequantizeLinear (k, s) y = Conv (x, f) }",
        {"k": np.ones((16, 16, 3, 3), np.int8), "s": np.float32(0.003)},
    )
    assert not FoldQDQ()(model).modified


def test_an_lstm_of_integers_stays_and_says_why() -> None:
    values = {
        "w": RNG.integers(-60, 60, (1, INPUT, 4 * HIDDEN)).astype(np.int8),
        "r": RNG.integers(-60, 60, (1, HIDDEN, 4 * HIDDEN)).astype(np.int8),
        "s": np.array([0.003], np.float32), "z": np.array([0], np.int8),
    }  # fmt: skip
    model = model_of(
        f"g (float[5,2,{INPUT}] x) => (float[5,1,2,{HIDDEN}] y) "
        f"{{ y = com.microsoft.DynamicQuantizeLSTM <hidden_size = {HIDDEN}> "
        "(x, w, r, , , , , , s, z, s, z) }",
        values,
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n',
    )
    expected = run(model, FEEDS)[0]
    assert not LiftQOperators()(model).modified
    model = Pipeline.default(get_target("x86-int8")).run(model)
    np.testing.assert_array_equal(run(model, FEEDS)[0], expected)
    (node,) = model.graph
    assert "it quantizes its state anew in each step" in decision_of(node).why

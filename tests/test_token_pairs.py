"""Products of tokens that others quantized, by scales that Quantize does not compute."""

import numpy as np
import pytest
from golden import model_of, run

from qcompiler.ir.decisions import decision_of
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.pipeline import Pipeline
from qcompiler.targets.catalog import get_target

RNG = np.random.default_rng(0)
K, N = 32, 8
WEIGHTS = {
    "w": RNG.integers(-127, 128, (K, N)).astype(np.int8),
    "v": RNG.integers(-127, 128, (K, N)).astype(np.int8),
    "ws": RNG.uniform(0.01, 0.02, N).astype(np.float32),
    "tiny": np.float32(1e-5), "top": np.float32(127.5), "zeros": np.zeros((5, 1), np.int8),
    "axis": np.array([-1]), "from": np.array([0]), "to": np.array([1]), "one": np.float32(0.02),
}  # fmt: skip
X = {"x": RNG.standard_normal((5, K), dtype=np.float32)}
SCALE = (
    "a = Abs (x) r = ReduceMax <keepdims = 1> (a, axis) c = Slice (r, from, to, axis) "
    "b = Max (c, tiny) s = Div (b, top) "
)
PAIR = (
    f"q = QuantizeLinear <axis = -1, block_size = {K}, output_dtype = 3> (x, s) "
    f"d = DequantizeLinear <axis = -1, block_size = {K}> (q, s) "
)
PRODUCT = "f = DequantizeLinear <axis = 1> (w, ws) y = MatMul (d, f) "
GRAPH = f"g (float[m,{K}] x) => (float[m,{N}] y) {{ {SCALE}{PAIR}{PRODUCT} }}"


def ops(model):
    return [node.op_type for node in model.graph]


def same(model, expected):
    for got, want in zip(run(model, X), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_token_keeps_its_scale_and_the_product_is_one_of_integers():
    model = model_of(GRAPH, WEIGHTS)
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == "q"))
    expected = run(model, X, plainly=True)
    assert expected[1].min() < -126 and 127 in expected[1]  # 127.5 steps, saturated
    assert FoldQDQ()(model).modified
    assert "QMatMulW8A8" in ops(model) and "Quantize" not in ops(model)
    (product,) = (node for node in model.graph if node.op_type == "QMatMulW8A8")
    (stored,) = (n for n in model.graph if len(n.inputs) == 3 and n.op_type == "QuantizeLinear")
    assert product.inputs[0] is stored.outputs[0]
    assert "a scale that Quantize does not compute" in decision_of(stored).why
    model.graph.outputs.append(stored.outputs[0])
    signed, unsigned = run(model, X)[1:]
    np.testing.assert_array_equal(signed.astype(np.int16) + 128, unsigned)
    model.graph.outputs.pop()
    same(model, expected)


def test_products_share_it():
    text = GRAPH.replace(f"(float[m,{N}] y) {{", f"(float[m,{N}] y, float[m,{N}] z) {{").replace(
        PRODUCT, f"{PRODUCT} h = DequantizeLinear <axis = 1> (v, ws) z = MatMul (d, h) "
    )
    model = model_of(text, WEIGHTS)
    expected = run(model, X, plainly=True)
    FoldQDQ()(model)
    assert ops(model).count("QMatMulW8A8") == 2
    assert ops(model).count("QuantizeLinear") == 1
    same(model, expected)


def test_kernels_take_it():
    model = model_of(GRAPH, WEIGHTS)
    expected = run(model, X, plainly=True)
    compiled = Pipeline.default(get_target("x86-int8")).run(model)
    (product,) = (node for node in compiled.graph if "QMatMul" in node.op_type)
    assert decision_of(product).action == "kernel"
    same(compiled, expected)


HALVES = SCALE.replace("b = Max (c, tiny)", "e = Concat <axis = 1> (c, c) b = Max (e, tiny)")
ONE_SCALE = "q = QuantizeLinear <output_dtype = 3> (x, one) d = DequantizeLinear (q, one) "


@pytest.mark.parametrize(
    ("scale", "pair"),
    [
        (SCALE, PAIR.replace("(x, s) d", "(x, s, zeros) d")),  # that are 0, but who knows
        (HALVES, PAIR.replace(f"block_size = {K}", f"block_size = {K // 2}")),
        (SCALE, ONE_SCALE),
    ],
)
def test_another_form_is_no_pair_of_tokens(scale, pair):
    model = model_of(GRAPH.replace(SCALE, scale).replace(PAIR, pair), WEIGHTS)
    FoldQDQ()(model)
    assert "QMatMulW8A8" not in ops(model)

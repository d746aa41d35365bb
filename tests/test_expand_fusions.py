"""canonicalize: ops that ONNX Runtime's optimizers fused, taken apart, beside ORT's own."""

import numpy as np
import pytest
from golden import model_of, run, text_of

from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.pipeline import Pipeline
from qcompiler.targets.catalog import get_target

RNG = np.random.default_rng(0)
K, HEADS = 16, 2


def floats(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


W = {
    "w": floats(K, K) / 4, "g": 1 + floats(K) / 8, "b": floats(K), "c": floats(K),
    "qkv": floats(K, 3 * K) / 4, "qkv_b": floats(3 * K), "words": floats(9, K),
    "places": floats(7, K), "kinds": floats(2, K), "cw": floats(4, 3, 3, 3) / 5, "cb": floats(4),
}  # fmt: skip
X = {"x": floats(2, 5, K), "s": floats(2, 5, K)}
IMAGE = {"x": floats(1, 3, 6, 6), "z": floats(1, 4, 6, 6)}
TOKENS = {
    "ids": RNG.integers(0, 9, (2, 5)).astype(np.int32),
    "mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32),
}
TWO = f"(float[m,n,{K}] x, float[m,n,{K}] s)"
ONE = f"(float[m,n,{K}] x)"
ONE_RESULT = f"(float[m,n,{K}] y)"
MASKED = f"(float[m,n,{K}] x, int32[m,n] mask)"
PICTURES = "(float[1,3,6,6] x, float[1,4,6,6] z) => (float[1,4,6,6] y)"
EMBEDDED = (
    f"(int32[m,n] ids, int32[m,n] mask) => {ONE_RESULT} "
    "{ h, lengths = com.microsoft.EmbedLayerNormalization (ids, , words, places, , g, b, mask) "
    f"y = com.microsoft.Attention <num_heads = {HEADS}> (h, qkv, qkv_b, lengths) }}"
)
GRAPHS = {
    "SkipLayerNormalization": f"{TWO} => {ONE_RESULT} "
    "{ n, , , t = com.microsoft.SkipLayerNormalization <epsilon = 0.001> (x, s, g, b, c) "
    "y = Add (n, t) }",
    "SkipSimplifiedLayerNormalization": f"{TWO} => {ONE_RESULT} "
    "{ n, , , t = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.001> (x, s, g, c) "
    "y = Add (n, t) }",
    "SimplifiedLayerNormalization": f"{ONE} => {ONE_RESULT} "
    "{ y = SimplifiedLayerNormalization <axis = -1, epsilon = 0.001> (x, g) }",
    "BiasGelu": f"{ONE} => {ONE_RESULT} {{ y = com.microsoft.BiasGelu (x, b) }}",
    "FastGelu": f"{ONE} => {ONE_RESULT} {{ y = com.microsoft.FastGelu (x, b) }}",
    "QuickGelu": f"{ONE} => {ONE_RESULT} {{ y = com.microsoft.QuickGelu (x) }}",
    "FusedMatMul": f"{TWO} => (float[m,n,n] y) "
    "{ y = com.microsoft.FusedMatMul <transB = 1, alpha = 0.25> (x, s) }",
    "Gelu": f"{ONE} => {ONE_RESULT} {{ y = com.microsoft.Gelu (x) }}",
    "FusedMatMul, both turned": f"{TWO} => (float[m,k,l] y) "
    "{ y = com.microsoft.FusedMatMul <transA = 1> (x, s) }",
    "EmbedLayerNormalization, segments": f"(int32[m,n] ids, int32[m,n] mask) => {ONE_RESULT} "
    "{ y, lengths = com.microsoft.EmbedLayerNormalization "
    "(ids, mask, words, places, kinds, g, b) }",
    "FusedConv": f"{PICTURES} "
    '{ y = com.microsoft.FusedConv <activation = "LeakyRelu", activation_params = [0.25], '
    "pads = [1, 1, 1, 1]> (x, cw, cb, z) }",
    "Attention": f"{MASKED} => {ONE_RESULT} "
    f"{{ y = com.microsoft.Attention <num_heads = {HEADS}> (x, qkv, qkv_b, mask) }}",
    "EmbedLayerNormalization": EMBEDDED,
}


def fused(text, opset=21):
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    return model_of(f"g {text}", W, head)


def feeds_of(model):
    known = (IMAGE if model.graph.inputs[0].shape[1] == 3 else X) | TOKENS
    return {value.name: known[value.name] for value in model.graph.inputs}


@pytest.mark.parametrize("name", GRAPHS)
def test_taken_apart_it_computes_the_same(name):
    model = fused(GRAPHS[name])
    feeds = feeds_of(model)
    (expected,) = run(model, feeds)
    assert Canonicalize()(model).modified
    assert {node.domain for node in model.graph} == {""}, text_of(model)
    assert not any("Simplified" in node.op_type for node in model.graph)
    (result,) = run(model, feeds)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("num_heads = 2", "num_heads = 2, unidirectional = 1"),  # a causal mask
        ("qkv_b, mask)", "qkv_b, mask, past)"),
    ],
)
def test_what_has_no_such_form_stays(before, after):
    text = GRAPHS["Attention"].replace(before, after)
    text = text.replace("int32[m,n] mask", "int32[m,n] mask, float[2,m,2,p,8] past")
    model = fused(text)
    Canonicalize()(model)
    assert [node.op_type for node in model.graph] == ["Attention"]


@pytest.mark.parametrize(
    "text",
    [
        f"(int32[m,n] ids, int32[m,n] mask) => (float[m,n,{K}] y, float[m,n,{K}] t) "
        "{ h, lengths, t = com.microsoft.EmbedLayerNormalization "
        "(ids, , words, places, , g, b, mask) "
        f"y = com.microsoft.Attention <num_heads = {HEADS}> (h, qkv, qkv_b, lengths) }}",
        f"{ONE} => {ONE_RESULT} {{ y = SimplifiedLayerNormalization <axis = 1> (x, g2) }}",
    ],
    ids=["a sum that is a result", "a norm of two axes"],
)
def test_what_is_refused_late_is_left_as_it_was(text):
    weights = W | {"g2": floats(5, K)}
    head = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'
    model = model_of(f"g {text}", weights, head)
    feeds = {value.name: (X | TOKENS)[value.name] for value in model.graph.inputs}
    expected = run(model, feeds)
    Canonicalize()(model)
    assert {"com.microsoft", ""} >= {node.domain for node in model.graph}
    for got, want in zip(run(model, feeds), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_product_of_a_fused_one_keeps_its_name():
    model = fused(
        GRAPHS["FusedMatMul"].replace("(x, s)", "(x, w)").replace("[m,n,n]", f"[m,n,{K}]")
    )
    model.graph.node(0).name = "mine"
    Canonicalize()(model)
    assert [node.op_type for node in model.graph if node.name == "mine"] == ["MatMul"]


def test_a_norm_that_is_no_op_of_the_models_opset_yet():
    """ONNX Runtime's optimizers write LayerNormalization into models of any opset."""
    text = f"{ONE} => {ONE_RESULT} {{ y = LayerNormalization <axis = -1> (x, g, b) }}"
    model = fused(text, 11)
    expected = run(model, {"x": X["x"]})
    Canonicalize()(model)
    assert model.graph.opset_imports[""] == 21
    np.testing.assert_allclose(run(model, {"x": X["x"]}), expected, rtol=1e-6)


def test_products_behind_them_are_quantized():
    text = (
        f"{TWO} => {ONE_RESULT} {{ n = com.microsoft.SkipLayerNormalization (x, s, g, b) "
        "m = MatMul (n, w) y = com.microsoft.BiasGelu (m, b) }"
    )
    model = Pipeline.default(get_target("x86-int8")).run(fused(text, 17))
    assert any("QMatMul" in node.op_type for node in model.graph), text_of(model)


def test_a_norm_of_halves_by_a_scale_of_floats():
    """ONNX Runtime lets them differ, and computes in floats."""
    text = (
        f"(float16[m,n,{K}] x) => (float[m,n,{K}] y) {{ y = SimplifiedLayerNormalization (x, g) }}"
    )
    model = fused(text)
    feeds = {"x": X["x"].astype(np.float16)}
    Canonicalize()(model)
    (result,) = run(model, feeds)
    wide = feeds["x"].astype(np.float32)
    expected = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-5) * W["g"]
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3)

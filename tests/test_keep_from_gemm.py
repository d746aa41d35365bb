"""keep-from-gemm: products by few bits that something is added to, and ONNX Runtime's Gemm."""

import collections
import json

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import model_of, run, sqnr

import qcompiler
from qcompiler.passes.keep_from_gemm import KeepFromGemm

K, N = 64, 48
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.integers(-8, 8, (K, N)).astype(ir.DataType.INT4.numpy()),
    "s": RNG.uniform(0.1, 1, (K // 32, N)).astype(np.float32),
    "c": RNG.uniform(0.1, 1, N).astype(np.float32),
    "b": RNG.standard_normal(N).astype(np.float32),
}
GROUPS = "d = DequantizeLinear <axis = 0, block_size = 32> (w, s) "
FEEDS = {
    "x": RNG.standard_normal((3, K)).astype(np.float32),
    "z": RNG.standard_normal((3, N)).astype(np.float32),
}


def of(body, result="y", shape="n"):
    """With the shape of the product, as passes before know it."""
    text = f"g (float[{shape},{K}] x, float[{shape},{N}] z) => (float[{shape},{N}] {result})"
    model = model_of(f"{text} {{ {body} }}", WEIGHTS)
    for node in model.graph:
        if node.op_type in ("MatMul", "Exp"):
            node.outputs[0].shape = ir.Shape([*shape.split(","), N])
    return model


def ops(model):
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("add", ["Add (m, z)", "Add (z, m)"])
def test_a_product_by_groups(add):
    model = of(f"{GROUPS} m = MatMul (x, d) y = {add}")
    expected = run(model, FEEDS, plainly=True)[0]
    assert KeepFromGemm()(model).modified and not KeepFromGemm()(model).modified
    assert ops(model) == ["DequantizeLinear", "MatMul", "Sum"]
    np.testing.assert_allclose(run(model, FEEDS, plainly=True)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "shape", "result"),
    [
        (f"{GROUPS} m = MatMul (x, d) y = Add (m, z)", "2,n", "y"),  # more than two axes
        (f"{GROUPS} m = MatMul (x, d) y = Add (m, b)", "n", "y"),  # a vector
        ("d = DequantizeLinear <axis = 1> (w, c) m = MatMul (x, d) y = Add (m, z)", "n", "y"),
        (f"{GROUPS} m = MatMul (x, d) y = Mul (m, z)", "n", "y"),
        (f"{GROUPS} m = MatMul (x, d) y = Add (m, z)", "n", f"y, float[n,{N}] m"),
        (f"{GROUPS} m = MatMul (x, d) e = Exp (m) y = Add (m, e)", "n", "y"),
    ],
)
def test_what_becomes_no_gemm_of_groups(body, shape, result):
    model = of(body, result, shape)
    assert not KeepFromGemm()(model).modified


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("zero_points", ["none", "float"])
def test_a_bundle_is_fast_in_onnx_runtime(tmp_path, precision, zero_points):
    if (precision, zero_points) == ("int8", "float"):
        pytest.skip("8 bits have no zero points")
    weights = {"v": RNG.standard_normal((K, N)).astype(np.float32), "b": WEIGHTS["b"]}
    text = f"g (float[n,{K}] x, float[n,{N}] z) => (float[n,{N}] y) "
    text += "{ m = MatMul (x, v) r = Add (m, z) y = Add (r, b) }"
    rule = {"op": "MatMul", "precision": precision, "activation": "float", "group_size": 32,
            "zero_points": zero_points}  # fmt: skip
    bundle = qcompiler.compile(
        model_of(text, weights), "x86-int4", tmp_path / "b", timing=False,
        recipe=qcompiler.Recipe(nodes=[rule]),
    ).bundle  # fmt: skip
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = ort.InferenceSession(bundle / "model.onnx", options)
    expected = run(model_of(text, weights), FEEDS)[0]
    assert sqnr(expected, session.run(None, FEEDS)[0]) > 15
    with open(session.end_profiling()) as file:
        ran = collections.Counter(event.get("args", {}).get("op_name") for event in json.load(file))
    assert ran["MatMulNBits"] and not ran["DequantizeLinear"]

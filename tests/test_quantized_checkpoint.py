"""Weights of GPTQ and AWQ checkpoints: files made here, by the layouts as they are documented."""

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import FEEDS, GROUP, LAYER, K, N, W, awq, gptq, model, pack_rows, write
from golden import model_of, run

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import ModelError, OptionError
from qcompiler.passes.widen_constants import dequantized_constant
from qcompiler.quantized_checkpoint import take_over_weights
from qcompiler.safetensors import SafeTensors

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path, bits):
    file, floats = gptq(tmp_path, bits)
    made = model()
    assert take_over_weights(made, file) == [LAYER]
    (node,) = [node for node in made.graph if node.op_type == "MatMul"]
    np.testing.assert_array_equal(dequantized_constant(node.inputs[1]), floats)
    assert node.inputs[1].producer().attributes.get_int("block_size") == GROUP
    assert node.inputs[1].producer().inputs[0].dtype is (
        ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
    )
    assert decision_of(node).why == "weights of gptq as model.safetensors has them"
    got = run(made, FEEDS, plainly=True)[0]
    np.testing.assert_allclose(got, FEEDS["x"] @ floats, rtol=1e-4, atol=1e-4)


def test_gptq_in_activation_order(tmp_path):
    file, floats = gptq(tmp_path, 4, RNG.permutation(K))
    made = model(f"g (float[m,{K}] x) => (float[m,{N}] y) {{ y = MatMul (x, w) }}")
    take_over_weights(made, file)
    assert [node.op_type for node in made.graph] == ["DequantizeLinear", "Gather", "MatMul"]
    got = run(made, FEEDS, plainly=True)[0]
    np.testing.assert_allclose(got, FEEDS["x"] @ floats, rtol=1e-4, atol=1e-4)


def test_a_last_group_that_is_shorter(tmp_path):
    """64 inputs in groups of 24: only g_idx says so."""
    groups, scales = (np.arange(K) // 24).astype(np.int32), np.full((3, N), 0.5, np.float16)
    codes, zeros = RNG.integers(0, 16, (K, N)), RNG.integers(1, 16, (3, N))
    change = {"qweight": pack_rows(codes, 4), "scales": scales,
              "qzeros": np.ascontiguousarray(pack_rows((zeros - 1).T, 4).T)}  # fmt: skip
    file, _ = gptq(tmp_path, 4, g_idx=groups, **change)
    made = model()
    take_over_weights(made, file)
    (node,) = [node for node in made.graph if node.op_type == "MatMul"]
    floats = (codes - zeros[groups]) * np.float32(0.5)
    np.testing.assert_array_equal(dequantized_constant(node.inputs[1]), floats)
    file, _ = gptq(tmp_path, 4, g_idx=None, **change)
    with pytest.raises(ModelError, match="3 groups of 64 inputs together, .* no g_idx that says"):
        take_over_weights(model(), file)


NORM = (
    f"g (float[m,{K}] x) => (float[m,{N}] y) "
    "{ t = LayerNormalization <axis = -1> (x, gamma) y = MatMul (t, w) }"
)


ROUTED = (
    f"g (float[m,{K}] x) => (float[m,{N}] y, float[m,4] r) "
    "{ t = LayerNormalization <axis = -1> (x, gamma) y = MatMul (t, w) r = MatMul (t, router) }"
)


def test_awq_with_its_norm(tmp_path):
    gamma = RNG.uniform(0.5, 2, K).astype(np.float16)
    file, floats = awq(tmp_path, **{"model.norm.weight": gamma})
    made = model(NORM)
    take_over_weights(made, file)
    x = FEEDS["x"] - FEEDS["x"].mean(1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(1, keepdims=True) + 1e-5)
    expected = x * gamma.astype(np.float32) @ floats
    np.testing.assert_allclose(run(made, FEEDS, plainly=True)[0], expected, rtol=1e-3, atol=1e-3)


def test_a_router_beside_layers_of_awq(tmp_path):
    """It reads the norm that was scaled for the experts, and stays float."""
    gamma = RNG.uniform(0.5, 2, K).astype(np.float16)
    router = RNG.standard_normal((4, K)).astype(np.float16)
    more = {"model.norm.weight": gamma, "model.layers.0.mlp.gate.weight": router,
            "model.embed_tokens.weight": np.ones((9, K), np.float16)}  # fmt: skip
    file, _ = awq(tmp_path, **more)
    made = model(ROUTED)
    made.graph[2].name = "/model/layers.0/mlp/gate/MatMul"
    take_over_weights(made, file)
    x = FEEDS["x"] - FEEDS["x"].mean(1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(1, keepdims=True) + 1e-5)
    expected = x * gamma.astype(np.float32) @ router.T.astype(np.float32)
    np.testing.assert_allclose(run(made, FEEDS, plainly=True)[1], expected, rtol=1e-3, atol=1e-3)
    file, _ = awq(tmp_path, **more | {"model.layers.0.mlp.gate.weight": router[:3]})
    made = model(ROUTED)
    made.graph[2].name = "/model/layers.0/mlp/gate/MatMul"
    with pytest.raises(ModelError, match=r"gate.weight' is \[3, 64\], in the model \[4, 64\]"):
        take_over_weights(made, file)


def test_factors_of_an_activation(tmp_path):
    """AWQ divides what GELU makes by them, in a node of its own."""
    file, _ = awq(tmp_path, **{"model.layers.0.mlp.act.scales": np.ones(K, np.float16)})
    with pytest.raises(ModelError, match="'model.layers.0.mlp.act.scales' divides an activation"):
        take_over_weights(model(), file)


def test_what_does_not_fit(tmp_path):
    file, _ = awq(tmp_path, **{"model.final_norm.weight": np.ones(K, np.float16)})
    with pytest.raises(ModelError, match="'model.final_norm.weight' is no constant of the model"):
        take_over_weights(model(NORM), file)
    file, _ = gptq(tmp_path, 4, qzeros=None)
    with pytest.raises(ModelError, match=f"has no {LAYER}.qzeros beside its qweight"):
        take_over_weights(model(), file)
    file, _ = gptq(tmp_path, 4, qweight=np.zeros((5, 7), np.int32))
    with pytest.raises(ModelError, match=r"qweight is int32 \[5, 7\], which is no packed .*64, 32"):
        take_over_weights(model(), file)
    file, _ = gptq(tmp_path, 4, g_idx=np.zeros(K, np.int32))
    with pytest.raises(ModelError, match="up_proj.*: 4 groups of 64 inputs, not all alike"):
        take_over_weights(model(), file)
    file, _ = gptq(tmp_path, 4, g_idx=np.full(K, -1, np.int32))
    with pytest.raises(ModelError, match="scales, qzeros and g_idx of .* do not fit each other"):
        take_over_weights(model(), file)
    file, _ = gptq(tmp_path, 4, g_idx=np.zeros(3, np.int32))
    with pytest.raises(ModelError, match="scales, qzeros and g_idx of .* do not fit each other"):
        take_over_weights(model(), file)


@pytest.mark.parametrize(("change", "why"), [
    ({"qweight": np.zeros(8, np.int32)}, r"up_proj.qweight is int32 \[8\], which is no packed"),
    ({"qweight": np.ones((8, N), np.float32)}, "up_proj.qweight is float32 .* no packed form"),
    ({"scales": np.zeros((0, N), np.float16)}, "qzeros and scales of .* are no packed tables"),
    ({"qzeros": np.ones(4, np.int32)}, "qzeros and scales of .* are no packed tables"),
    ({"scales": np.full((K // GROUP, N), np.nan, np.float16)}, "scales of .* hold NaN or Inf"),
    ({"scales": np.ones((K // GROUP, 16), np.float16),
      "qzeros": np.ones((K // GROUP, 2), np.int32)},
     "scales, qzeros and g_idx of .* do not fit each other"),
])  # fmt: skip
def test_damaged_parts_of_a_layer(tmp_path, change, why):
    file, _ = gptq(tmp_path, 4, **change)
    with pytest.raises(ModelError, match=why):
        take_over_weights(model(), file)


def test_two_layers_are_not_one_product(tmp_path):
    file, _ = gptq(tmp_path, 4)
    held = SafeTensors(file)
    write(file, {f"{layer}.{part}": held[f"{LAYER}.{part}"]
                 for layer in "ab" for part in ("qweight", "qzeros", "scales")})  # fmt: skip
    made = model()
    made.graph[0].name = "n"
    with pytest.raises(ModelError, match="layers 'a' and 'b' would both be n; .*--name b=NODE"):
        take_over_weights(made, file, {"a": "n", "b": "n"})


def test_all_products_of_a_weight(tmp_path):
    file, floats = gptq(tmp_path, 4, order=RNG.permutation(K))
    made = model(
        f"g (float[m,{K}] x) => (float[m,{N}] y, float[m,{N}] z) "
        "{ y = MatMul (x, w) n = Neg (x) z = MatMul (n, w) }"
    )
    take_over_weights(made, file, {LAYER: "w"})
    y, z = run(made, FEEDS, plainly=True)
    np.testing.assert_allclose(y, FEEDS["x"] @ floats, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(y, -z)


def test_a_model_in_float16(tmp_path):
    file, floats = gptq(tmp_path, 4)
    made = model_of(
        f"g (float16[m,{K}] x) => (float16[m,{N}] y) {{ y = MatMul (x, w) }}",
        {"w": W.astype(np.float16)},
    )
    take_over_weights(made, file, {LAYER: "w"})
    x = FEEDS["x"].astype(np.float16)
    y = run(made, {"x": x}, plainly=True)[0]
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, x.astype(np.float32) @ floats, rtol=0.01, atol=0.05)


def test_awq_has_no_zero_points_less_one(tmp_path):
    file, _ = awq(tmp_path)
    with pytest.raises(OptionError, match="zeros_less_one=False .--zeros.: .* is of AWQ"):
        take_over_weights(model(), file, zeros_less_one=False)


@pytest.mark.parametrize(
    ("name", "weight"),
    [("/model/layers.0/mlp/up_proj/Gemm", "onnx_7"), ("", f"{LAYER}.weight")],
)
@pytest.mark.parametrize(
    "call",
    ["y = Gemm <transB = 1> (x, wt, b)", "w = Transpose (wt) p = MatMul (x, w) y = Add (p, b)"],
)
def test_a_weight_that_is_turned_over(tmp_path, call, name, weight):
    """As torch's exporters write a Linear of two dimensions."""
    file, floats = gptq(tmp_path, 4)
    made = model_of(
        f"g (float[m,{K}] x) => (float[m,{N}] y) {{ {call} }}",
        {"wt": np.ascontiguousarray(W.T), "b": np.ones(N, np.float32)},
    )
    for node in made.graph:
        if node.op_type in ("Gemm", "MatMul"):
            node.name = name
    made.graph.initializers["wt"].name = weight
    take_over_weights(made, file)
    got = run(made, FEEDS, plainly=True)[0]
    np.testing.assert_allclose(got, FEEDS["x"] @ floats + 1, rtol=1e-4, atol=1e-4)


def test_a_layer_of_another_name(tmp_path):
    file, floats = gptq(tmp_path, 4)
    made = model()
    made.graph[0].name = "up"
    with pytest.raises(ModelError, match=f"no MatMul of the model has the name of layer {LAYER!r}"):
        take_over_weights(made, file)
    take_over_weights(made, file, {LAYER: "up"})
    (node,) = [node for node in made.graph if node.op_type == "MatMul"]
    np.testing.assert_array_equal(dequantized_constant(node.inputs[1]), floats)

"""lift-qoperators: each operator-oriented dialect in text, and its numbers in stock ORT."""

import numpy as np
import pytest
from golden import ORT_HEAD, assert_rewrites, model_of, run, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.lift_qoperators import LiftQOperators

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (2, 6)).astype(np.uint8)
FLOATS = RNG.standard_normal((2, 6)).astype(np.float32)
IMAGE = RNG.integers(0, 256, (1, 3, 8, 8)).astype(np.uint8)
WEIGHTS = {
    "xs": np.float32(0.03), "xz": np.uint8(120), "ys": np.float32(0.07), "yz": np.uint8(130),
    "w": RNG.integers(-127, 128, (6, 4)).astype(np.int8), "ws": np.float32(0.02),
    "wz": np.int8(0), "wsc": RNG.uniform(0.01, 0.03, 4).astype(np.float32),
    "wzc": np.zeros(4, np.int8), "b": RNG.standard_normal(4).astype(np.float32),
    "bi": RNG.integers(-900, 900, 4).astype(np.int32),
    "k": RNG.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
    "xs1": np.array([0.03], np.float32), "xz1": np.array([120], np.uint8),
}  # fmt: skip


def foreign(text, weights=WEIGHTS):
    model = model_of(text, weights, ORT_HEAD)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    return model


def assert_lifts(model, after, feeds):
    """As text; integers equal but for ties, floats to rounding, fused by ORT and as it stands."""
    expected = run(model, feeds, plainly=True)
    assert_rewrites(LiftQOperators(), model, after, feeds)
    verify(model, Stage.FLOAT, "lift-qoperators")
    for got, want in zip(run(model, feeds, plainly=True), expected, strict=True):
        if want.dtype == np.float32:
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        else:
            assert np.abs(got.astype(int) - want.astype(int)).max() <= 1
            assert (got != want).mean() < 0.05


@pytest.mark.parametrize(
    "call",
    ["QLinearAdd (x, xs, xz, x2, xs, xz, ys, yz)", "QLinearMul (x, xs, xz, x2, xs, xz, ys, yz)"],
)
def test_binary(call):
    model = foreign(
        f"g (uint8[2,6] x, uint8[2,6] x2) => (uint8[2,6] y) {{ y = com.microsoft.{call} }}"
    )
    assert_lifts(
        model,
        f"""inputs x, x2
        v5 = DequantizeLinear  (x, v3, v4)
        v6 = DequantizeLinear  (x2, v3, v4)
        v7 = {call[7:10]}  (v5, v6)
        y = QuantizeLinear  (v7, v8, v9)
        outputs y""",
        {"x": X, "x2": X[::-1].copy()},
    )


UNARY = {
    "QLinearSigmoid (x, xs, xz, p, q)": "Sigmoid  (v4)",
    "QLinearLeakyRelu <alpha = 0.25> (x, xs, xz, ys, yz)": "LeakyRelu {'alpha': '0.25'} (v4)",
    "QLinearSoftmax <axis = -1, opset = 13> (x, xs, xz, p, q)": "Softmax {'axis': '-1'} (v4)",
}


@pytest.mark.parametrize("call", UNARY)
def test_unary(call):
    weights = WEIGHTS | {"p": np.float32(1 / 256), "q": np.uint8(0)}
    model = foreign(f"g (uint8[2,6] x) => (uint8[2,6] y) {{ y = com.microsoft.{call} }}", weights)
    assert_lifts(
        model,
        f"""inputs x
        v4 = DequantizeLinear  (x, v2, v3)
        v5 = {UNARY[call]}
        y = QuantizeLinear  (v5, v6, v7)
        outputs y""",
        {"x": X},
    )


POOLS = {
    "QLinearGlobalAveragePool (x, xs, xz, ys, yz)": ("[1,3,1,1]", "GlobalAveragePool"),
    "QLinearAveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x, xs, xz, ys, yz)":
        ("[1,3,4,4]", "AveragePool {'kernel_shape': '(2, 2)', 'strides': '(2, 2)'}"),
}  # fmt: skip


@pytest.mark.parametrize("call", POOLS)
def test_pools(call):
    shape, op = POOLS[call]
    text = f"g (uint8[1,3,8,8] x) => (uint8{shape} y) {{ y = com.microsoft.{call} }}"
    assert_lifts(
        foreign(text),
        f"""inputs x
        v4 = DequantizeLinear  (x, v2, v3)
        v5 = {op}{"" if "{" in op else " "} (v4)
        y = QuantizeLinear  (v5, v6, v7)
        outputs y""",
        {"x": IMAGE},
    )


def test_reduce_mean_which_ort_has_no_kernel_for():
    model = foreign(
        "g (uint8[1,3,8,8] x) => (uint8[1,3,1,1] y) { y = com.microsoft.QLinearReduceMean "
        "<axes = [2, 3], keepdims = 1> (x, xs, xz, xs, xz) }"
    )
    assert LiftQOperators()(model).modified
    (mean,) = run(model, {"x": IMAGE}, plainly=True)
    np.testing.assert_array_equal(mean, np.rint(IMAGE.mean((2, 3), keepdims=True)))


def test_concat_of_different_scales():
    assert_lifts(
        foreign(
            "g (uint8[2,6] x, uint8[2,6] x2) => (uint8[2,12] y) "
            "{ y = com.microsoft.QLinearConcat <axis = 1> (ys, yz, x, xs, xz, x2, ys, yz) }"
        ),
        """inputs x, x2
        v5 = DequantizeLinear  (x, v3, v4)
        v8 = DequantizeLinear  (x2, v6, v7)
        v9 = Concat {'axis': '1'} (v5, v8)
        y = QuantizeLinear  (v9, v6, v7)
        outputs y""",
        {"x": X, "x2": X[::-1].copy()},
    )


def test_where():
    assert_lifts(
        foreign(
            "g (bool[2,6] c, uint8[2,6] x, uint8[2,6] x2) => (uint8[2,6] y) "
            "{ y = com.microsoft.QLinearWhere (c, x, xs, xz, x2, ys, yz, ys, yz) }"
        ),
        """inputs c, x, x2
        v6 = DequantizeLinear  (x, v4, v5)
        v9 = DequantizeLinear  (x2, v7, v8)
        v10 = Where  (c, v6, v9)
        y = QuantizeLinear  (v10, v7, v8)
        outputs y""",
        {"c": X > 128, "x": X, "x2": X[::-1].copy()},
    )


@pytest.mark.parametrize(
    ("scale", "zero"),
    [("ws", "wz"), ("wsc", "wzc")],
)
def test_conv_with_bias(scale, zero):
    along = "{'axis': '0'} " if scale == "wsc" else " "
    assert_lifts(
        foreign(
            "g (uint8[1,3,8,8] x) => (uint8[1,4,8,8] y) { y = QLinearConv <pads = [1,1,1,1]> "
            f"(x, xs1, xz1, k, {scale}, {zero}, ys, yz, bi) }}",
        ),
        f"""inputs x
        v4 = DequantizeLinear  (x, v2, v3)
        v8 = DequantizeLinear {along}(v5, v6, v7)
        v11 = DequantizeLinear {along}(v9, v10)
        v12 = Conv {{'pads': '(1, 1, 1, 1)'}} (v4, v8, v11)
        y = QuantizeLinear  (v12, v13, v14)
        outputs y""",
        {"x": IMAGE},
    )


@pytest.mark.parametrize(("scale", "zero"), [("ws", "wz"), ("wsc", "wzc"), ("wsc", "wz")])
def test_matmul(scale, zero):
    along = " " if scale == "ws" else "{'axis': '1'} "
    assert_lifts(
        foreign(
            "g (uint8[2,6] x) => (uint8[2,4] y) "
            f"{{ y = QLinearMatMul (x, xs, xz, w, {scale}, {zero}, ys, yz) }}"
        ),
        f"""inputs x
        v4 = DequantizeLinear  (x, v2, v3)
        v8 = DequantizeLinear {along}(v5, v6, v7)
        v9 = MatMul  (v4, v8)
        y = QuantizeLinear  (v9, v10, v11)
        outputs y""",
        {"x": X},
    )


def test_gemm_with_alpha_and_a_turned_weight():
    weights = WEIGHTS | {"wt": np.ascontiguousarray(WEIGHTS["w"].T)}
    assert_lifts(
        foreign(
            "g (uint8[2,6] x) => (uint8[2,4] y) { y = com.microsoft.QGemm "
            "<transB = 1, alpha = 0.5> (x, xs, xz, wt, wsc, wzc, bi, ys, yz) }",
            weights,
        ),
        """inputs x
        v4 = DequantizeLinear  (x, v2, v3)
        v8 = DequantizeLinear {'axis': '1'} (v5, v6, v7)
        v9 = MatMul  (v4, v8)
        v12 = DequantizeLinear {'axis': '0'} (v10, v11)
        v13 = Add  (v9, v12)
        y = QuantizeLinear  (v13, v14, v15)
        outputs y""",
        {"x": X},
    )


def test_gemm_to_float():
    assert_lifts(
        foreign(
            "g (uint8[2,6] x) => (float[2,4] y) { y = com.microsoft.QGemm (x, xs, xz, w, ws, wz) }"
        ),
        """inputs x
        v4 = DequantizeLinear  (x, v2, v3)
        v8 = DequantizeLinear  (v5, v6, v7)
        y = MatMul  (v4, v8)
        outputs y""",
        {"x": X},
    )


def test_matmul_to_float():
    assert_lifts(
        foreign(
            "g (uint8[2,6] x) => (float[2,4] y) "
            "{ y = com.microsoft.MatMulIntegerToFloat (x, w, xs, wsc, xz, wzc, b) }"
        ),
        """inputs x
        v4 = DequantizeLinear  (x, v2, v3)
        v8 = DequantizeLinear {'axis': '1'} (v5, v6, v7)
        v9 = MatMul  (v4, v8)
        y = Add  (v9, v10)
        outputs y""",
        {"x": X},
    )


DYNAMIC = """inputs x
        v2, v3, v4 = DynamicQuantizeLinear  (x)
        v5 = DequantizeLinear  (v2, v3, v4)
        v9 = DequantizeLinear {'axis': '1'} (v6, v7, v8)
        y = MatMul  (v5, v9)
        outputs y"""

SCALED = (
    "q, s, z = DynamicQuantizeLinear (x) i = MatMulInteger (q, w, z, wzc) "
    "f = Cast <to = 1> (i) "
)  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        "y = com.microsoft.DynamicQuantizeMatMul (x, w, wsc, wzc)",
        SCALED + "t = Mul (s, wsc) y = Mul (f, t)",
        SCALED + "t = Mul (f, s) y = Mul (wsc, t)",
    ],
)
def test_dynamic_matmul(body):
    text = f"g (float[2,6] x) => (float[2,4] y) {{ {body} }}"
    assert_lifts(foreign(text), DYNAMIC, {"x": FLOATS})


def test_products_that_share_a_dynamic_quantization():
    """The pair in the middle is one for both; a branch of the scales may be read by each."""
    assert_lifts(
        foreign(
            "g (float[2,6] x) => (float[2,4] y, float[2,4] z) { "
            "q, s, p = DynamicQuantizeLinear (x) t = Mul (s, ws) "
            "i = MatMulInteger (q, w, p) f = Cast <to = 1> (i) y = Mul (f, t) "
            "j = MatMulInteger (q, w2, p) g = Cast <to = 1> (j) z = Mul (g, t) }",
            WEIGHTS | {"w2": WEIGHTS["w"][::-1].copy()},
        ),
        """inputs x
        v3, v4, v5 = DynamicQuantizeLinear  (x)
        v6 = DequantizeLinear  (v3, v4, v5)
        v9 = DequantizeLinear  (v7, v8)
        y = MatMul  (v6, v9)
        v11 = DequantizeLinear  (v10, v8)
        z = MatMul  (v6, v11)
        outputs y, z""",
        {"x": FLOATS},
    )


def test_dynamic_product_of_two_activations():
    assert_lifts(
        foreign(
            "g (float[2,6] x, float[6,2] x2) => (float[2,2] y) { "
            "q, s, z = DynamicQuantizeLinear (x) r, t, u = DynamicQuantizeLinear (x2) "
            "i = MatMulInteger (q, r, z, u) f = Cast <to = 1> (i) "
            "m = Mul (s, t) y = Mul (f, m) }"
        ),
        """inputs x, x2
        v3, v4, v5 = DynamicQuantizeLinear  (x)
        v6, v7, v8 = DynamicQuantizeLinear  (x2)
        v9 = DequantizeLinear  (v3, v4, v5)
        v10 = DequantizeLinear  (v6, v7, v8)
        y = MatMul  (v9, v10)
        outputs y""",
        {"x": FLOATS, "x2": FLOATS.reshape(6, 2)},
    )


def test_dynamic_conv():
    weights = WEIGHTS | {"kz": np.int8(3), "wsr": WEIGHTS["wsc"].reshape(1, 4, 1, 1)}
    assert_lifts(
        foreign(
            "g (float[1,3,8,8] x) => (float[1,4,8,8] y) { q, s, z = DynamicQuantizeLinear (x) "
            "i = ConvInteger <pads = [1,1,1,1]> (q, k, z, kz) f = Cast <to = 1> (i) "
            "t = Mul (s, wsr) y = Mul (f, t) }",
            weights,
        ),
        """inputs x
        v2, v3, v4 = DynamicQuantizeLinear  (x)
        v5 = DequantizeLinear  (v2, v3, v4)
        v9 = DequantizeLinear {'axis': '0'} (v6, v7, v8)
        y = Conv {'pads': '(1, 1, 1, 1)'} (v5, v9)
        outputs y""",
        {"x": RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)},
    )


def test_a_bias_that_is_added_to_the_integers():
    """As older quantizers of ORT write it."""
    assert_lifts(
        foreign(
            "g (float[2,6] x) => (float[2,4] y) { q, s, z = DynamicQuantizeLinear (x) "
            "i = MatMulInteger (q, w, z) j = Add (i, bi) f = Cast <to = 1> (j) "
            "t = Mul (s, ws) y = Mul (f, t) }"
        ),
        """inputs x
        v2, v3, v4 = DynamicQuantizeLinear  (x)
        v5 = DequantizeLinear  (v2, v3, v4)
        v8 = DequantizeLinear  (v6, v7)
        v9 = MatMul  (v5, v8)
        v10 = Mul  (v3, v7)
        v12 = DequantizeLinear  (v11, v10)
        y = Add  (v9, v12)
        outputs y""",
        {"x": FLOATS},
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("points", ["", "zp"])
@pytest.mark.parametrize("k", [64, 40])
def test_matmul_nbits(bits, points, k):
    n, block = 8, 16
    blocks = -(-k // block)
    weights = {
        "w": RNG.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8),
        "s": RNG.uniform(0.01, 0.1, (n, blocks)).astype(np.float32),
        "zp": RNG.integers(0, 256, (n, -(-blocks * bits // 8))).astype(np.uint8),
        "b": RNG.standard_normal(n).astype(np.float32),
    }
    call = f"<K = {k}, N = {n}, bits = {bits}, block_size = {block}>"
    operands = ", ".join(["v2", "v3"] + ["v4"] * bool(points))
    last = 3 + bool(points)
    model = foreign(
        f"g (float[3,{k}] x) => (float[3,{n}] y) "
        f"{{ y = com.microsoft.MatMulNBits {call} (x, w, s, {points}, , b) }}",
        weights,
    )
    feeds = {"x": RNG.standard_normal((3, k)).astype(np.float32)}
    expected = run(model, feeds, plainly=True)[0]
    assert_rewrites(
        LiftQOperators(),
        model,
        f"""inputs x
        v{last + 1} = DequantizeLinear {{'axis': '0', 'block_size': '{block}'}} ({operands})
        v{last + 2} = MatMul  (x, v{last + 1})
        y = Add  (v{last + 2}, v{last + 3})
        outputs y""",
    )
    np.testing.assert_allclose(run(model, feeds, plainly=True)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("points", ["", ", zp"])
def test_gather_of_blocks(bits, points):
    weights = {
        "w": RNG.integers(0, 256, (9, 40 * bits // 8)).astype(np.uint8),
        "s": RNG.uniform(0.01, 0.1, (9, 3)).astype(np.float32),
        "zp": RNG.integers(0, 256, (9, -(-3 * bits // 8))).astype(np.uint8),
    }
    model = foreign(
        "g (int64[2,3] i) => (float[2,3,40] y) { y = com.microsoft.GatherBlockQuantized "
        f"<bits = {bits}, block_size = 16, quantize_axis = 1> (w, i, s{points}) }}",
        weights,
    )
    operands = "(v2, v3, v4)" if points else "(v2, v3)"
    assert_lifts(
        model,
        f"""inputs i
        v{5 if points else 4} = DequantizeLinear {{'axis': '1', 'block_size': '16'}} {operands}
        y = Gather {{'axis': '0'}} (v{5 if points else 4}, i)
        outputs y""",
        {"i": np.array([[8, 0, 3], [1, 1, 7]])},
    )


def test_zero_points_in_the_middle_are_none():
    weights = {
        "w": RNG.integers(0, 256, (8, 2, 8)).astype(np.uint8), "s": np.ones((8, 2), np.float32),
        "zp": np.full((8, 1), 0x88, np.uint8),
    }  # fmt: skip
    model = foreign(
        "g (float[3,32] x) => (float[3,8] y) { y = com.microsoft.MatMulNBits "
        "<K = 32, N = 8, bits = 4, block_size = 16> (x, w, s, zp) }",
        weights,
    )
    LiftQOperators()(model)
    assert len(next(iter(model.graph)).inputs) == 2


def test_contrib_pair_takes_the_standard_domain():
    assert_lifts(
        foreign(
            "g (float[2,6] x) => (float[2,6] y) { q = com.microsoft.QuantizeLinear (x, xs1, w16) "
            "y = com.microsoft.DequantizeLinear (q, xs1, w16) }",
            WEIGHTS | {"w16": np.array([3000], np.uint16)},
        ),
        """inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        y = DequantizeLinear  (v4, v2, v3)
        outputs y""",
        {"x": FLOATS},
    )


def test_contrib_dequantize_along_an_axis():
    assert_lifts(
        foreign(
            "g (float[2,6] x) => (float[2,4] y) "
            "{ f = com.microsoft.DequantizeLinear <axis = 1> (w, wsc, wzc) y = MatMul (x, f) }"
        ),
        """inputs x
        v5 = DequantizeLinear {'axis': '1'} (v2, v3, v4)
        y = MatMul  (x, v5)
        outputs y""",
        {"x": FLOATS},
    )


ATTENTION = {
    "x": RNG.integers(0, 256, (2, 5, 8)).astype(np.uint8),
    "m": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32),
}
ATTENTION_WEIGHTS = WEIGHTS | {
    "wa": RNG.integers(-127, 128, (8, 24)).astype(np.int8), "wza": np.int8(0),
    "ba": RNG.standard_normal(24).astype(np.float32), "wsa": np.float32(0.01),
}  # fmt: skip


def attention(mask="m", attributes="num_heads = 2", shape="[2,5]"):
    feed = f"int32{shape} m" if mask else ""
    return foreign(
        f"g (uint8[2,5,8] x{', ' * bool(mask)}{feed}) => (float[2,5,8] y) {{ y = "
        f"com.microsoft.QAttention <{attributes}> (x, wa, ba, xs, wsa, {mask}, xz, wza) }}",
        ATTENTION_WEIGHTS,
    )


@pytest.mark.parametrize("mask", ["m", ""])
@pytest.mark.parametrize("attributes", ["num_heads = 2", "num_heads = 4, scale = 0.25"])
def test_attention(mask, attributes):
    model = attention(mask, attributes)
    feeds = ATTENTION if mask else {"x": ATTENTION["x"]}
    expected = run(model, feeds)[0]
    assert LiftQOperators()(model).modified
    assert not LiftQOperators()(model).modified
    verify(model, Stage.FLOAT, "lift-qoperators")
    assert not any(node.domain for node in model.graph)
    assert [n.op_type for n in model.graph].count("MatMul") == 3
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (attention(attributes="num_heads = 2, unidirectional = 1"), "it is causal"),
        (attention(shape="[2]"), "not one number per key"),
    ],
)
def test_attention_of_other_kinds_stays(model, why):
    before = text_of(model)
    assert not LiftQOperators()(model).modified
    assert text_of(model) == before
    assert why in decision_of(next(iter(model.graph))).why


NEAR_MISSES = {
    "its int32 result is not cast":
        "g (uint8[2,6] x) => (int32[2,4] y) { y = MatMulInteger (x, w) }",
    "a scale per channel that is computed": "g (float[2,6] x) => (float[2,4] y) "
        "{ q, s, z = DynamicQuantizeLinear (x) i = MatMulInteger (q, w, z) j = Add (i, bi) "
        "f = Cast <to = 1> (j) t = Mul (s, wsc) y = Mul (f, t) }",
    "which scale belongs to which operand": "g (uint8[2,6] x, float[1] s) => (float[2,4] y) "
        "{ i = MatMulInteger (x, w) f = Cast <to = 1> (i) y = Mul (f, s) }",
    "not multiplied by the scales of both": "g (float[2,6] x) => (float[2,4] y) "
        "{ q, s, z = DynamicQuantizeLinear (x) i = MatMulInteger (q, w, z) "
        "f = Cast <to = 1> (i) y = Mul (f, s) }",
    "not cast to float32 and scaled": "g (float[2,6] x) => (float[2,4] y, int32[2,4] i) "
        "{ q, s, z = DynamicQuantizeLinear (x) i = MatMulInteger (q, w, z) "
        "f = Cast <to = 1> (i) t = Mul (s, ws) y = Mul (f, t) }",
    "g_idx permutes its groups": "g (float[2,32] x, uint8[4,2,8] w4, float[8] s4, int32[32] i) => "
        "(float[2,4] y) { y = com.microsoft.MatMulNBits <K = 32, N = 4, bits = 4, "
        "block_size = 16> (x, w4, s4, , i) }",
    "its weights are computed": "g (float[2,32] x, uint8[4,2,8] w4, float[8] s4) => "
        "(float[2,4] y) { y = com.microsoft.MatMulNBits <K = 32, N = 4, bits = 4, "
        "block_size = 16> (x, w4, s4) }",
    "its layout is NHWC": "g (uint8[1,8,8,3] x) => (uint8[1,1,1,3] y) { y = "
        "com.microsoft.QLinearGlobalAveragePool <channels_last = 1> (x, xs, xz, ys, yz) }",
    "the shape of its scale": "g (uint8[2,6] x, float[n] s) => (uint8[2,6] y) "
        "{ y = com.microsoft.QLinearSigmoid (x, s, xz, ys, yz) }",
    "its scale or zero point has 4 elements": "g (uint8[2,4] x) => (uint8[2,4] y) "
        "{ y = com.microsoft.QLinearSigmoid (x, wsc, xz, ys, yz) }",
    "normalizes over several axes": "g (uint8[2,3,4] x) => (uint8[2,3,4] y) "
        "{ y = com.microsoft.QLinearSoftmax <axis = 1, opset = 12> (x, xs, xz, ys, yz) }",
}  # fmt: skip


@pytest.mark.parametrize("why", NEAR_MISSES)
def test_what_is_not_lifted_stays_and_says_why(why):
    model = foreign(NEAR_MISSES[why])
    before, initializers = text_of(model), set(model.graph.initializers)
    assert not LiftQOperators()(model).modified
    assert text_of(model) == before
    assert set(model.graph.initializers) == initializers
    assert any(why in decision_of(node).why for node in model.graph)
    assert {decision_of(node).action for node in model.graph} <= {"qdq", "float"}


def test_a_stored_value_may_leave_the_graph():
    """What the source computes in integers stays visible as integers."""
    model = foreign(
        "g (uint8[2,6] x) => (uint8[2,6] t, uint8[2,6] y) "
        "{ t = com.microsoft.QLinearAdd (x, xs, xz, x, xs, xz, ys, yz) "
        "y = com.microsoft.QLinearMul (t, ys, yz, x, xs, xz, ys, yz) }"
    )
    assert_lifts(
        model,
        """inputs x
        v5 = DequantizeLinear  (x, v3, v4)
        v6 = Add  (v5, v5)
        t = QuantizeLinear  (v6, v7, v8)
        v9 = DequantizeLinear  (t, v7, v8)
        v10 = Mul  (v9, v5)
        y = QuantizeLinear  (v10, v7, v8)
        outputs t, y""",
        {"x": X},
    )

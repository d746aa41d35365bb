"""lift-qoperators: convolutions, matrix products and attention, in text and in stock ORT."""

import numpy as np
import pytest
from foreign import FLOATS, IMAGE, RNG, WEIGHTS, X, assert_lifts, foreign
from golden import run, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.lift_qoperators import LiftQOperators


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


def test_half_precision_stays_half():
    """ONNX Runtime has no kernel for it, and does not need one for the pairs."""
    half = {name: WEIGHTS[name].astype(np.float16) for name in ("xs", "ws", "ys")}
    model = foreign(
        "g (uint8[2,6] x) => (uint8[2,4] y) { y = QLinearMatMul (x, xs, xz, w, ws, wz, ys, yz) }",
        WEIGHTS | half,
    )
    wanted = (X - 120.0) * half["xs"] @ (WEIGHTS["w"] * half["ws"].astype(float))
    assert LiftQOperators()(model).modified
    assert {n.outputs[0].dtype.name for n in model.graph} == {"FLOAT16", "UINT8"}
    steps = run(model, {"x": X})[0].astype(int)
    np.testing.assert_allclose(steps, np.clip(wanted / half["ys"] + 130, 0, 255), atol=0.6)


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
        {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)},
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

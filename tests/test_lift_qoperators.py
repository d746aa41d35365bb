"""lift-qoperators: ops without weights, and what is not lifted, in text and in stock ORT."""

import numpy as np
import pytest
from foreign import FLOATS, IMAGE, WEIGHTS, X, assert_lifts, foreign
from golden import ORT_HEAD, model_of, run, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.lift_qoperators import LiftQOperators
from qcompiler.targets.catalog import TARGETS


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
        "block_size = 16, accuracy_level = 4> (x, w4, s4, , i) }",
    "its weights are computed": "g (float[2,32] x, uint8[4,2,8] w4, float[8] s4) => "
        "(float[2,4] y) { y = com.microsoft.MatMulNBits <K = 32, N = 4, bits = 4, "
        "block_size = 16, accuracy_level = 4> (x, w4, s4) }",
    "its layout is NHWC": "g (uint8[1,8,8,3] x) => (uint8[1,1,1,3] y) { y = "
        "com.microsoft.QLinearGlobalAveragePool <channels_last = 1> (x, xs, xz, ys, yz) }",
    "its last windows cover behind the padding": "g (uint8[1,3,8,8] x) => (uint8[1,3,5,5] y) { y = "
        "com.microsoft.QLinearAveragePool <kernel_shape = [3,3], strides = [2,2], "
        "pads = [1,1,1,1], ceil_mode = 1, count_include_pad = 1> (x, xs, xz, ys, yz) }",
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


@pytest.mark.parametrize(
    ("opset", "call", "lifted"),
    [
        (12, "QLinearSigmoid (x, xs, xz, ys, yz)", False),
        (13, "QLinearSigmoid (x, xs, xz, ys, yz)", True),
        (17, "QLinearReduceMean <axes = [1], keepdims = 1> (x, xs, xz, ys, yz)", False),
        (18, "QLinearReduceMean <axes = [1], keepdims = 1> (x, xs, xz, ys, yz)", True),
    ],
)
def test_an_opset_without_the_form_keeps_the_op(opset, call, lifted):
    model = model_of(
        f"g (uint8[2,6] x) => (uint8[2,n] y) {{ y = com.microsoft.{call} }}",
        WEIGHTS,
        ORT_HEAD.replace("21", str(opset)),
    )
    assert LiftQOperators()(model).modified == lifted
    if not lifted:
        why = decision_of(next(iter(model.graph))).why
        assert f"not {opset}: canonicalize first" in why


@pytest.mark.parametrize(("zero", "lifted"), [("xz1", True), ("w16", False)])
def test_a_pair_of_16_bits_needs_opset_21(zero, lifted):
    model = model_of(
        f"g (float[2,6] x) => (float[2,6] y) {{ q = com.microsoft.QuantizeLinear (x, xs1, {zero}) "
        f"y = com.microsoft.DequantizeLinear (q, xs1, {zero}) }}",
        WEIGHTS | {"w16": np.array([3000], np.uint16)},
        ORT_HEAD.replace("21", "19"),
    )
    assert LiftQOperators()(model).modified == lifted


def test_what_is_lifted_keeps_its_name_beside_what_is_not():
    """A scale that a form which came to nothing had turned is turned again for the next."""
    model = foreign(
        "g (uint8[2,4] x) => (uint8[2,4] y, uint8[2,4] s) "
        "{ y = com.microsoft.QLinearAdd (x, xs1, xz1, x, wsc, xz, ys, yz) "
        "s = com.microsoft.QLinearSigmoid (x, xs1, xz1, xs1, xz1) }"
    )
    assert LiftQOperators()(model).modified
    verify(model, Stage.FLOAT, "lift-qoperators")
    named = {node.name: node.op_type for node in model.graph}
    assert named["node_0"] == "QLinearAdd"
    assert named["node_1"] == "Sigmoid"


def test_a_quantized_op_without_float_form_keeps_its_reason():
    """Planning, which has nothing to add, does not call it float afterwards."""
    model = foreign(
        "g (float[2,32] x) => (float[2,4] y) { y = com.microsoft.MatMulBnb4 "
        "<K = 32, N = 4, block_size = 16, quant_type = 1> (x, packed, absmax) }",
        {"packed": np.zeros(64, np.uint8), "absmax": np.ones(8, np.float32)},
    )
    LiftQOperators()(model)
    AssignPrecision(TARGETS["x86-int8"].scheme)(model)
    decision = decision_of(next(iter(model.graph)))
    assert decision.action == "qdq"
    assert "codebook" in decision.why


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

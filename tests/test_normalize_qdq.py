"""normalize-qdq: each rewrite in text, and its numbers in stock ORT.

All are equal bit for bit, but for Gemm: its last float bits differ, so that a tie may move.
"""

import numpy as np
import onnx_ir as ir
import pytest
from golden import run
from imported import FLOATS, INT4, QDQ, RNG, W, assert_normalizes, assert_stays, named

from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.normalize_qdq import NormalizeQDQ


def test_a_float_model_is_left_alone():
    model = named(
        "g (float[2,6] x) => (float[2,4] y) "
        "{ m = MatMul (x, wf) n = MatMul (x, wf) y = Add (m, n) }"
    )
    assert not NormalizeQDQ()(model).modified


PLAIN_WEIGHT = """inputs x
    v4 = DequantizeLinear {'axis': '1'} (v2, v3)
    y = MatMul  (x, v4)
    outputs y"""


@pytest.mark.parametrize(
    "weight",
    [
        "f = DequantizeLinear <axis = 1> (w, ws, wz)",
        "f = DequantizeLinear <axis = -1> (w, ws)",
        "q = QuantizeLinear <axis = 1> (wf, ws, wz) f = DequantizeLinear <axis = 1> (q, ws, wz)",
        "q = QuantizeLinear <axis = 1, output_dtype = 3> (wf, ws) "
        "f = DequantizeLinear <axis = 1> (q, ws)",
        "f = DequantizeLinear <axis = 1> (wu, ws, middle)",
        "g = DequantizeLinear <axis = 0> (wt, ws, wz) f = Transpose (g)",
    ],
)
def test_symmetric_weights_have_one_form(weight):
    text = f"g (float[2,6] x) => (float[2,4] y) {{ {weight} y = MatMul (x, f) }}"
    model = assert_normalizes(text, PLAIN_WEIGHT, FLOATS)
    (widened, _) = model.graph
    assert widened.inputs[0].dtype is ir.DataType.INT8


def test_weights_are_rounded_half_to_even():
    weights = {
        "wf": np.array([[0.5, 1.5], [2.5, -0.5], [300, -300]], np.float32),
        "s": np.float32(1),
        "z8": np.int8(0),
    }
    model = named(
        "g (float[1,3] x) => (float[1,2] y) "
        "{ q = QuantizeLinear (wf, s, z8) f = DequantizeLinear (q, s, z8) y = MatMul (x, f) }",
        weights,
    )
    NormalizeQDQ()(model)
    stored = next(iter(model.graph)).inputs[0].const_value.numpy()
    np.testing.assert_array_equal(stored, [[0, 2], [2, 0], [127, -128]])


def test_constants_far_out_of_range_saturate():
    weights = W | {"far": np.float32([3.4e38, -3.4e38, 1e9, -1e9, np.inf, 0.3])}
    model = named(
        "g (float[2,6] x) => (float[2,6] y) { q = QuantizeLinear (far, s, z) "
        "d = DequantizeLinear (q, s, z) y = Add (x, d) }",
        weights,
    )
    expected = run(model, FLOATS, plainly=True)
    assert NormalizeQDQ()(model).modified
    stored = next(iter(model.graph)).inputs[0].const_value.numpy()
    np.testing.assert_array_equal(stored, np.uint8([255, 0, 255, 0, 255, 130]))
    np.testing.assert_array_equal(run(model, FLOATS, plainly=True), expected)


def test_asymmetric_weights_keep_their_zero_points():
    model = named(
        "g (float[2,6] x) => (float[2,4] y) "
        "{ f = DequantizeLinear <axis = 1> (wu, ws, wuz) y = MatMul (x, f) }"
    )
    expected = run(model, FLOATS, plainly=True)
    assert NormalizeQDQ()(model).modified
    assert not NormalizeQDQ()(model).modified
    np.testing.assert_array_equal(run(model, FLOATS, plainly=True), expected)
    stored, _, zero = (value.const_value.numpy() for value in next(iter(model.graph)).inputs)
    np.testing.assert_array_equal(stored, W["wu"].astype(int) - 128)
    np.testing.assert_array_equal(zero, W["wuz"].astype(int) - 128)


def test_blocks_are_turned_with_their_weight():
    weights = {
        "w4": RNG.integers(-8, 8, (8, 32)).astype(INT4),
        "s4": RNG.uniform(0.1, 1, (8, 2)).astype(np.float32),
    }
    assert_normalizes(
        "g (float[2,32] x) => (float[2,8] y) "
        "{ f = DequantizeLinear <axis = 1, block_size = 16> (w4, s4) "
        "t = Transpose <perm = [1, 0]> (f) y = MatMul (x, t) }",
        """inputs x
        v4 = DequantizeLinear {'axis': '0', 'block_size': '16'} (v2, v3)
        y = MatMul  (x, v4)
        outputs y""",
        {"x": RNG.standard_normal((2, 32)).astype(np.float32)},
        weights,
    )


def test_gemm_over_quantized_weights_is_a_matmul():
    assert_normalizes(
        f"g (float[2,6] x) => (float[2,4] y) {{ {QDQ} "
        "f = DequantizeLinear <axis = 0> (wt, ws) c = DequantizeLinear <axis = 0> (b, bs, bz) "
        "y = Gemm <transB = 1> (d, f, c) }",
        """inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v5 = DequantizeLinear  (v4, v2, v3)
        v8 = DequantizeLinear {'axis': '0'} (v6, v7)
        v11 = DequantizeLinear {'axis': '1'} (v9, v10)
        v12 = MatMul  (v5, v11)
        y = Add  (v12, v8)
        outputs y""",
        FLOATS,
    )


def test_gemm_with_alpha_stays():
    assert_stays(
        "g (float[2,6] x) => (float[2,4] y) "
        "{ f = DequantizeLinear <axis = 1> (w, ws) y = Gemm <alpha = 0.5> (x, f) }",
        FLOATS,
        "alpha or beta",
    )


def test_equal_pairs_back_to_back_cancel():
    assert_normalizes(
        f"g (float[2,6] x) => (float[2,6] y) {{ {QDQ} r = QuantizeLinear (d, s1, z1) "
        "e = DequantizeLinear (r, s1, z1) y = Exp (e) }",
        """inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v5 = DequantizeLinear  (v4, v2, v3)
        y = Exp  (v5)
        outputs y""",
        FLOATS,
    )


@pytest.mark.parametrize("parameters", ["t, z", "s, u"])
def test_a_requantization_stays_and_says_so(parameters):
    assert_stays(
        f"g (float[2,6] x) => (float[2,6] y) {{ {QDQ} r = QuantizeLinear (d, {parameters}) "
        f"e = DequantizeLinear (r, {parameters}) y = Exp (e) }}",
        FLOATS,
        "requantize",
    )


def test_equal_pairs_of_one_value_are_one():
    assert_normalizes(
        "g (float[2,6] x) => (float[2,6] y, float[2,6] e) { q = QuantizeLinear (x, s, z) "
        "r = QuantizeLinear (x, s1, z1) d = DequantizeLinear (q, s, z) "
        "f = DequantizeLinear (r, s1, z1) y = Exp (d) e = Neg (f) }",
        """inputs x
        v5 = QuantizeLinear  (x, v3, v4)
        v6 = DequantizeLinear  (v5, v3, v4)
        y = Exp  (v6)
        e = Neg  (v6)
        outputs y, e""",
        FLOATS,
    )


def test_what_is_drawn_twice_stays_two_nodes():
    model = named(
        "g (float[2,6] x) => (float[2,6] y, float[2,6] e) { q = QuantizeLinear (x, s, zi) "
        "d = DequantizeLinear (q, s, zi) m = Bernoulli (d) n = Bernoulli (d) "
        "y = Add (m, d) e = Add (n, d) }"
    )
    assert NormalizeQDQ()(model).modified
    assert [node.op_type for node in model.graph].count("Bernoulli") == 2


def test_branches_see_integers_from_outside():
    text = (
        f"g (float[2,6] x, bool c) => (float[6,2] y) {{ {QDQ} y = If (c) <then_branch = a () => "
        "(float[6,2] p) { k = Constant <value_float = 2.0> () m = Transpose (d) p = Mul (m, k) }, "
        "else_branch = o () => (float[6,2] n) { n = Transpose (d) }> }"
    )
    model = named(text)
    feeds = [FLOATS | {"c": np.array(flag)} for flag in (True, False)]
    expected = [run(model, feed, plainly=True) for feed in feeds]
    assert NormalizeQDQ()(model).modified
    verify(model, Stage.FLOAT, "normalize-qdq")
    for feed, want in zip(feeds, expected, strict=True):
        np.testing.assert_array_equal(run(model, feed, plainly=True), want)

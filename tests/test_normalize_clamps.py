"""normalize-qdq on clamps and guards against NaN: they go where saturation does their work."""

import numpy as np
import pytest
from golden import run, text_of
from imported import CONV, FLOATS, IMAGE, QDQ, W, assert_normalizes, assert_stays, named

from qcompiler.passes.normalize_qdq import NormalizeQDQ


@pytest.mark.parametrize(
    ("clamp", "scale", "zero", "goes"),
    [
        ("Relu (c)", "t", "low", True),
        ("Relu (c)", "t", "least", True),
        ("Relu (c)", "t", "u", False),
        ("Clip (c, zf, six)", "t6", "low", True),
        ("Clip (c, zf)", "t", "low", True),
        ("Clip (c, zf, six)", "t", "low", False),
    ],
)
def test_a_clamp_goes_where_saturation_does_it(clamp, scale, zero, goes):
    kind = "int8" if zero == "least" else "uint8"
    model = named(
        f"g (float[1,2,8,8] x) => ({kind}[1,4,6,6] y) "
        f"{{ {CONV} r = {clamp} y = QuantizeLinear (r, {scale}, {zero}) }}"
    )
    expected = run(model, IMAGE, plainly=True)
    NormalizeQDQ()(model)
    assert ("Relu" in text_of(model) or "Clip" in text_of(model)) != goes
    np.testing.assert_array_equal(run(model, IMAGE, plainly=True), expected)


def test_a_clamp_that_is_read_in_float_stays():
    assert_stays(
        "g (float[2,6] x) => (uint8[2,6] y, float[2,6] e) "
        "{ r = Relu (x) y = QuantizeLinear (r, t, low) e = Exp (r) }",
        FLOATS,
    )


def test_a_relu_of_what_has_no_negatives_goes():
    assert_normalizes(
        "g (float[2,6] x) => (float[2,6] y) { q = QuantizeLinear (x, s, low) "
        "d = DequantizeLinear (q, s, low) r = Relu (d) y = Exp (r) }",
        """inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v5 = DequantizeLinear  (v4, v2, v3)
        y = Exp  (v5)
        outputs y""",
        FLOATS,
    )


@pytest.mark.parametrize("guard", ["Where (n, zf, d)", "Where (n, one, d)"])
def test_a_guard_against_nan_goes_where_none_is(guard):
    assert_normalizes(
        f"g (float[2,6] x) => (float[2,6] y) {{ {QDQ} n = IsNaN (d) r = {guard} y = Exp (r) }}",
        """inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v5 = DequantizeLinear  (v4, v2, v3)
        y = Exp  (v5)
        outputs y""",
        FLOATS | {"x": np.where(FLOATS["x"] > 1, np.float32(np.nan), FLOATS["x"])},
    )


def test_a_guard_goes_whose_number_is_dequantized():
    text = f"g (float[2,6] x) => (float[2,6] y) {{ {QDQ} o = DequantizeLinear (u, s, z) "
    model = named(text + "n = IsNaN (d) r = Where (n, o, d) y = Exp (r) }")
    expected = run(model, FLOATS, plainly=True)
    assert NormalizeQDQ()(model).modified
    assert "IsNaN" not in text_of(model) and "Where" not in text_of(model)
    np.testing.assert_array_equal(run(model, FLOATS, plainly=True), expected)


@pytest.mark.parametrize(
    "body",
    [
        "n = IsNaN (x) r = Where (n, zf, x) y = Exp (r)",  # floats may be NaN
        "n = IsNaN (x) r = Where (n, zf, d) y = Exp (r)",  # of another value
        "n = IsNaN (d) r = Where (n, d, zf) y = Exp (r)",  # the other way round
        "n = IsNaN (d) r = Where (n, bf6, d) y = Exp (r)",  # no single number
        "n = IsNaN (d) y = Where (n, zf, d)",  # leaves the graph
        "p = QuantizeLinear (x, dx, z) e = DequantizeLinear (p, dx, z) n = IsNaN (e) "
        "r = Where (n, zf, e) y = Exp (r)",  # a scale that may be NaN
        "p = QuantizeLinear <output_dtype = 17> (x, s) e = DequantizeLinear (p, s) n = IsNaN (e) "
        "r = Where (n, zf, e) y = Exp (r)",  # float8 stores NaN
    ],
)
def test_another_guard_stays(body):
    weights = W | {"bf6": np.ones(6, np.float32)}
    text = f"g (float[2,6] x, float dx) => (float[2,6] y, float[2,6] d) {{ {QDQ} {body} }}"
    model = named(text, weights)
    NormalizeQDQ()(model)
    assert "IsNaN" in text_of(model) and "Where" in text_of(model)
    run(model, FLOATS | {"dx": np.array(0.02, np.float32)})


@pytest.mark.parametrize("clamp", ["Relu (d)", "Clip (d, zf)", "Clip (d, , zf)"])
def test_a_clamp_of_a_negative_scale(clamp):
    model = named(
        "g (float[2,6] x) => (float[2,6] y) { q = QuantizeLinear (x, below, low) "
        f"d = DequantizeLinear (q, below, low) r = {clamp} y = Exp (r) }}",
        W | {"below": np.float32(-0.03)},
    )
    expected = run(model, FLOATS, plainly=True)
    NormalizeQDQ()(model)
    # All that is stored stands for 0 or less.
    assert any(node.op_type in clamp for node in model.graph) == (clamp != "Clip (d, , zf)")
    np.testing.assert_array_equal(run(model, FLOATS, plainly=True), expected)

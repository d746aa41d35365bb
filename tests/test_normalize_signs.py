"""normalize-qdq makes activations uint8, unless something else sees or computes with them."""

import numpy as np
import pytest
from golden import run
from imported import FLOATS, IMAGE, W, named

from qcompiler.passes.normalize_qdq import NormalizeQDQ

SIGNED = "q = QuantizeLinear (x, s, zi) {} d = DequantizeLinear ({}, s, zi) "


def kinds(model):
    """The types of what every Q writes and every DQ reads."""
    ends = {"QuantizeLinear": lambda n: n.outputs[0], "DequantizeLinear": lambda n: n.inputs[0]}
    return {ends[n.op_type](n).dtype.name for n in model.graph if n.op_type in ends}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (SIGNED.format("", "q") + "y = Exp (d)", {"UINT8"}),
        (SIGNED.format("m = Transpose (q)", "m") + "y = Exp (d)", {"UINT8"}),
        (SIGNED.format("m = Pad (q, sides, zi)", "m") + "y = Exp (d)", {"UINT8"}),
        (SIGNED.format("", "q") + "e = DequantizeLinear (row, t) y = Add (d, e)", {"UINT8"}),
        (SIGNED.format("", "q") + "e = DequantizeLinear (w, t) y = MatMul (d, e)",
         {"UINT8", "INT8"}),
        ("q = QuantizeLinear (x, s) m = Concat <axis = 0> (q, q) "
         "d = DequantizeLinear (m, s) y = Exp (d)", {"UINT8"}),
    ],
)  # fmt: skip
def test_activations_are_unsigned(body, expected):
    weights = W | {"sides": np.array([0, 1, 0, 1]), "row": np.arange(6).astype(np.int8)}
    model = named(f"g (float[2,6] x) => (float y) {{ {body} }}", weights)
    wanted = run(model, FLOATS, plainly=True)
    NormalizeQDQ()(model)
    assert not NormalizeQDQ()(model).modified
    assert kinds(model) == expected
    np.testing.assert_array_equal(run(model, FLOATS, plainly=True), wanted)


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        # seen from outside
        ("(float[2,6] x) => (float[2,6] y, int8[2,6] q)", SIGNED.format("", "q") + "y = Exp (d)"),
        ("(int8[2,6] q) => (float[2,6] y)", "d = DequantizeLinear (q, s, zi) y = Exp (d)"),
        # computed with
        ("(float[2,6] x) => (float[2,6] y, int32[2,2] i)",
         SIGNED.format("", "q") + "p = Transpose (q) i = MatMulInteger (q, p) y = Exp (d)"),
    ],
)  # fmt: skip
def test_integers_that_something_else_sees_stay_signed(signature, body):
    model = named(f"g {signature} {{ {body} }}")
    before = run(
        model, {name: np.ones((2, 6), "i1") for name in "q" if "(int8" in signature} or FLOATS
    )
    NormalizeQDQ()(model)
    assert kinds(model) == {"INT8"}
    after = run(
        model, {name: np.ones((2, 6), "i1") for name in "q" if "(int8" in signature} or FLOATS
    )
    np.testing.assert_array_equal(after[0], before[0])


@pytest.mark.parametrize(
    ("image", "move"),
    [
        (False, "Pad (q, sides, fill)"),
        (True, 'Resize <mode = "linear"> (q, , grow)'),
        (True, 'Resize <mode = "nearest", coordinate_transformation_mode = "tf_crop_and_resize", '
         "extrapolation_value = 7.0> (q, crop, grow)"),
    ],
)  # fmt: skip
def test_integers_that_an_op_makes_new_ones_of_stay_signed(image, move):
    weights = W | {
        "sides": np.array([0, 1, 0, 1]), "grow": np.float32([1, 1, 1.7, 2.3]),
        "crop": np.float32([0, 0, -0.5, -0.5, 1, 1, 1.5, 1.5]),
    }  # fmt: skip
    shape, feeds = ("1,2,8,8", IMAGE) if image else ("2,6", FLOATS)
    model = named(
        f"g (float[{shape}] x, int8 fill) => (float y) {{ {SIGNED.format('m = ' + move, 'm')} "
        "y = Exp (d) }",
        weights,
    )
    feeds = feeds | {"fill": np.array(5, np.int8)}
    expected = run(model, feeds, plainly=True)
    NormalizeQDQ()(model)
    assert kinds(model) == {"INT8"}
    np.testing.assert_array_equal(run(model, feeds, plainly=True), expected)

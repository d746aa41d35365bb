"""Transposed convolutions as convolutions, padding in numbers, means as pools: float for float."""

import numpy as np
import pytest
from golden import assert_rewrites, model_of, run

from qcompiler.ir.decisions import plan_of
from qcompiler.ir.types import PerAxis
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.lower_convolutions import LowerConvolutions
from qcompiler.passes.sub_pixel import no_convolution_of
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
FEEDS = {"x": RNG.standard_normal((1, 4, 5, 7), dtype=np.float32)}


def planned(text, weights):
    model = model_of(text, weights)
    AssignPrecision(TARGETS["x86-int8"].scheme)(model)
    return model


def transposed(attributes, shape, bias=True):
    width = shape[1] * (2 if "group = 2" in attributes else 1)
    weights = {"w": RNG.standard_normal(shape, dtype=np.float32)}
    weights |= {"b": RNG.standard_normal(width, dtype=np.float32)} if bias else {}
    operands = "x, w, b" if bias else "x, w"
    text = f"{{ t = ConvTranspose <{attributes}> ({operands}) y = Exp (t) }}"
    return planned("g (float[1,4,5,7] x) => (float[1,n,p,q] y) " + text, weights)


@pytest.mark.parametrize(("attributes", "shape", "ops"), [
    ("strides = [2,2]", (4, 3, 2, 2), "Conv DepthToSpace"),
    ("strides = [3,3]", (4, 3, 3, 3), "Conv DepthToSpace"),
    ("strides = [2,2]", (4, 3, 4, 2), "Conv DepthToSpace"),
    ("strides = [2,2], group = 2", (4, 3, 2, 2), "Conv DepthToSpace"),
    ("strides = [2,2], pads = [1,1,1,1]", (4, 3, 4, 4), "Conv DepthToSpace Slice"),
    ("strides = [2,2], pads = [0,1,2,1], output_padding = [1,0]", (4, 3, 4, 4),
     "Conv DepthToSpace Slice"),
    ("strides = [3,3], pads = [2,0,2,0], output_padding = [2,0]", (4, 1, 6, 6),
     "Conv DepthToSpace Slice"),
    ('strides = [2,2], auto_pad = "VALID"', (4, 3, 2, 2), "Conv DepthToSpace"),
    ("strides = [2,2]", (4, 3, 3, 3), "Conv DepthToSpace Slice"),
    ("strides = [2,2], pads = [1,1,1,1], output_padding = [1,1]", (4, 3, 3, 3),
     "Conv DepthToSpace Slice"),
    ("strides = [2,2], pads = [1,1,1,1], output_padding = [1,0], group = 2", (4, 3, 3, 5),
     "Conv DepthToSpace Slice"),
    ("strides = [2,2], output_padding = [1,1]", (4, 3, 2, 2), "Conv DepthToSpace Slice"),
    ("strides = [3,3], output_padding = [2,1]", (4, 3, 2, 1), "Conv DepthToSpace Slice"),
    ('strides = [2,2], auto_pad = "SAME_UPPER"', (4, 3, 3, 3), "Conv DepthToSpace Slice"),
    ('strides = [2,2], auto_pad = "SAME_LOWER"', (4, 3, 3, 4), "Conv DepthToSpace Slice"),
    ("pads = [1,1,1,1]", (4, 3, 3, 3), "Conv Slice"),
    ("group = 1", (4, 3, 1, 1), "Conv"),
])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_a_transposed_convolution_is_one_and_a_shuffle(attributes, shape, ops, bias):
    model = transposed(attributes, shape, bias)
    expected = run(model, FEEDS)[0]
    assert LowerConvolutions()(model).modified
    assert not LowerConvolutions()(model).modified
    assert [node.op_type for node in model.graph] == [*ops.split(), "Exp"]
    assert plan_of(model.graph[0]).weight.granularity == PerAxis(0)
    np.testing.assert_allclose(run(model, FEEDS)[0], expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(("attributes", "shape", "why"), [
    ("strides = [2,1]", (4, 3, 2, 2), "different strides"),
    ("dilations = [2,2]", (4, 3, 2, 2), "dilations"),
    ("strides = [2,2], output_shape = [10,14]", (4, 3, 4, 4), "sizes that are not known"),
    ('strides = [2,2], auto_pad = "SAME_UPPER"', (4, 3, 1, 4), "sizes that are not known"),
])  # fmt: skip
def test_a_transposed_convolution_that_stays_says_why(attributes, shape, why):
    model = transposed(attributes, shape)
    assert why in no_convolution_of(model.graph[0], shape)
    assert plan_of(model.graph[0]) is None
    assert not LowerConvolutions()(model).modified


def test_golden_pads_and_pools():
    model = planned(
        "g (float[1,4,5,7] x) => (float[1,4] y, float[1,4,1,1] z) "
        '{ t = Conv <auto_pad = "SAME_LOWER", strides = [2,2]> (x, w) '
        "y = ReduceMean <keepdims = 0> (t, hw) z = ReduceMean (t, back) }",
        {"w": RNG.standard_normal((4, 4, 3, 3), dtype=np.float32), "hw": np.array([2, 3]),
         "back": np.array([-1, -2])},
    )  # fmt: skip
    assert_rewrites(
        LowerConvolutions(),
        model,
        """inputs x
        v4 = Conv {'pads': '(1, 1, 1, 1)', 'strides': '(2, 2)'} (x, v3)
        v5 = GlobalAveragePool  (v4)
        y = Squeeze  (v5, v6)
        z = GlobalAveragePool  (v4)
        outputs y, z""",
        FEEDS,
    )


@pytest.mark.parametrize("body", [
    "t = Conv (x, w) y = ReduceMean (t, one)",  # over one axis of two
    "t = Neg (x) y = ReduceMean (t, hw)",  # nothing is planned
])  # fmt: skip
def test_other_means_stay(body):
    weights = {"w": np.ones((4, 4, 3, 3), np.float32), "one": np.array([2]), "hw": np.array([2, 3])}
    model = planned(f"g (float[1,4,5,7] x) => (float[a,b,c,d] y) {{ {body} }}", weights)
    assert not LowerConvolutions()(model).modified

"""By which tensors a model is judged whose outputs do not compare."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of

from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.passes.judged_values import judged_values

WEIGHTS = {
    "axis": np.array([1]),
    "flat": np.array([-1]),
    "many": np.array([3]),
    "zero": np.float32(0),
    "first": np.array([0]),
    "at": np.array([[0, 1]]),
    "w": np.ones((4, 4), np.float32),
}


def judged(outputs, body):
    model = model_of(
        f"g (float[n,4] x) => ({outputs}) {{ h = MatMul (x, w) y = Relu (h) {body} }}", WEIGHTS
    )
    InferShapes()(model)
    return [value.name for value in judged_values(model.graph)]


@pytest.mark.parametrize(
    ("outputs", "body", "expected"),
    [
        ("float[n,4] y", "", ["y"]),
        ("float[n,4] y, float[n,4] z", "z = Neg (y)", ["y", "z"]),
        ("float16[n,4] z", "z = Cast <to = 10> (y)", ["z"]),
        ("int64[n,1] z", "z = ArgMax <axis = 1> (y)", ["y"]),
        ("int64[2] z", "z = Shape (y)", []),
        ("float[n,4] x2", "x2 = Identity (x)", ["x2"]),
        # As many as are found: what they were found among.
        ("float[m] z", "b = Greater (y, zero) z = Compress (y, b)", ["y"]),
        ("int64[2,m] z", "z = NonZero (y)", ["y"]),
        ("float[m,4] z", "t = ArgMax <keepdims = 0> (y) u = Unique (t) r = Neg (y) "
         "z = Gather (r, u)", ["r", "y"]),
        # Sizes made of values, and of sizes.
        ("float[k,4] z", "t = ReduceMax <keepdims = 0> (y) i = Cast <to = 7> (t) "
         "e = Reshape (i, flat) z = Slice (y, first, e, first)", ["y", "t"]),
        ("float[k,4] z", "s = Shape (y) r = Reshape (y, s) z = Neg (r)", ["z"]),
        # As many as always: the best three.
        ("float[n,3] z, int64[n,3] i", "z, i = TopK (y, many)", ["z", "y"]),
        # A sum over what was found has one size.
        ("float z", "b = Greater (y, zero) c = Compress (y, b) z = ReduceSum <keepdims = 0> (c)",
         ["z"]),
    ],
)  # fmt: skip
def test_judged(outputs, body, expected):
    assert judged(outputs, body) == expected


def test_branches_whose_sizes_values_decide():
    body = (
        "t = ReduceMax <keepdims = 0> (y) b = Greater (t, zero) z = If (b) "
        "<then_branch = f () => (float[k,4] p) { p = Identity (y) }, "
        "else_branch = e () => (float[j,4] q) { q = Slice (y, first, many) }>"
    )
    assert judged("float[i,4] z", body) == ["t", "y"]


def test_nothing_changes():
    model = model_of("g (float[n,4] x) => (float[n,4] y) { y = Relu (x) }", {})
    before = ir.to_proto(model).SerializeToString()
    judged_values(model.graph)
    assert ir.to_proto(model).SerializeToString() == before

"""Which results leave a network, or decide what does, with nothing in between that averages."""

import numpy as np
import pytest
from golden import model_of

from qcompiler.ir.decisions import decision_of, plan_of
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.passes.last_values import last_values
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
WEIGHTS = {
    "k": RNG.standard_normal((4, 4, 3, 3), dtype=np.float32),
    "k2": RNG.standard_normal((6, 4, 1, 1), dtype=np.float32),
    "flat": np.array([1, 4, -1]),
    "many": np.array([3]),
    "sizes": np.array([1, 1, 2, 2], np.float32),
    "c": np.float32(2),
    "none": np.zeros(0, np.float32),
}
BODY = "h = Conv (x, k) r = Relu (h) y = Conv (r, k2) "


def model(outputs, rest):
    made = model_of(f"g (float[1,4,9,9] x) => ({outputs}) {{ {BODY}{rest} }}", WEIGHTS)
    InferShapes()(made)
    return made


LAST = [
    ("float[1,6,7,7] y", ""),
    ("float[a,b,c] z", "z = Reshape (y, flat)"),
    ("float[1,6,7,7] z", "z = Softmax <axis = 1> (y)"),
    ("float[1,6,7,7] z", "s = Sigmoid (y) z = Identity (s)"),
    ("float[a,b,c,d] z", "t = Transpose <perm = [0,2,3,1]> (y) z = Tanh (t)"),
    ("float[1,12,7,7] z", "s = Sigmoid (y) z = Concat <axis = 1> (y, s)"),
    ("int64[1,1,7,7] z", "z = ArgMax <axis = 1> (y)"),
    ("int64[1,1,7,7] z", "s = Softmax <axis = 1> (y) z = ArgMax <axis = 1> (s)"),
    ("int64[1,3,7,7] z", "v, z = TopK <axis = 1> (y, many)"),
    ("float[1,6,14,14] z", 'z = Resize <mode = "nearest"> (y, none, sizes)'),
    ("int64[4,m] z", "b = Greater (y, c) z = NonZero (b)"),
]
AVERAGED = [
    ("float[1,6,1,1] z", "z = GlobalAveragePool (y)"),
    ("float[1,6,14,14] z", 'z = Resize <mode = "linear"> (y, none, sizes)'),
    ("int64[1,1,14,14] z",
     'e = Resize <mode = "linear"> (y, none, sizes) z = ArgMax <axis = 1> (e)'),
    ("float[1,6,7,7] z", "z = Add (y, y)"),
    ("float[1,6,1,1] z", "z = ReduceMax <keepdims = 1> (y)"),
]  # fmt: skip


@pytest.mark.parametrize(("outputs", "rest"), LAST)
def test_a_last_layer_stays_float(outputs, rest):
    made = model(outputs, rest)
    assert "y" in {value.name for value in last_values(made.graph)}
    first, last = (node for node in planned(made).graph if node.op_type == "Conv")
    assert plan_of(first) and not plan_of(last)
    why = decision_of(last).why
    assert why.startswith("its result leaves the graph"), why
    if rest:
        assert why.endswith(f"or decides what does, through {readers(made)}"), why
    assert all(plan_of(n) for n in planned(made, outputs=True).graph if n.op_type == "Conv")


@pytest.mark.parametrize(("outputs", "rest"), AVERAGED)
def test_what_is_averaged_is_rounded(outputs, rest):
    made = model(outputs, rest)
    assert "y" not in {value.name for value in last_values(made.graph)}
    assert all(plan_of(node) for node in planned(made).graph if node.op_type == "Conv")


def test_a_result_that_is_read_inside_too_stays_float():
    made = model("float[1,6,7,7] z, float[1,6,7,7] w", "z = Sigmoid (y) w = Add (y, y)")
    (last,) = (node for node in planned(made).graph if node.name == "node_2")
    assert decision_of(last).why.endswith("through Sigmoid, Add")


def readers(made):
    (y,) = (value for node in made.graph for value in node.outputs if value.name == "y")
    return ", ".join(dict.fromkeys(use.node.op_type for use in y.uses()))


def planned(made, **options):
    copy = made.clone()
    for index, node in enumerate(copy.graph):
        node.name = f"node_{index}"
    scheme = TARGETS["x86-int8"].scheme
    AssignPrecision(scheme, AssignPrecision.Options(**options))(copy)
    return copy

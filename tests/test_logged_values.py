"""Products of which a logarithm is taken stay float."""

import numpy as np
import pytest
from golden import model_of

from qcompiler.ir.decisions import decision_of, plan_of
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.passes.node_rules import NodeRule
from qcompiler.targets.catalog import get_target

RNG = np.random.default_rng(0)
WEIGHTS = {
    "dft": RNG.standard_normal((32, 34), dtype=np.float32),
    "mel": RNG.random((34, 16), dtype=np.float32),
    "w": RNG.standard_normal((16, 16), dtype=np.float32),
    "kernel": RNG.standard_normal((34, 1, 32), dtype=np.float32),
    "two": np.float32(2),
    "least": np.float32(1e-10),
}
SPECTRUM = "g (float[t,32] x) => (float[t,16] y) "
FRONT = "s = MatMul (x, dft) p = Pow (s, two) m = MatMul (p, mel) c = Clip (m, least) "


def planned(text, rules=()):
    """Names of the products' weights that are to be quantized, and the model."""
    model = model_of(text, WEIGHTS)
    InferShapes()(model)
    AssignPrecision(get_target("x86-int8").scheme, rules=rules)(model)
    products = [node for node in model.graph if node.op_type in ("Conv", "MatMul")]
    return {node.inputs[1].name for node in products if plan_of(node)}, model


def test_a_mel_spectrum_stays_float():
    found, model = planned(SPECTRUM + f"{{ {FRONT} l = Log (c) y = MatMul (l, w) }}")
    assert found == {"w"}
    assert "a Log takes its result" in decision_of(model.graph.node(2)).why


def test_one_of_convolutions_stays_float():
    text = ("g (float[1,1,t] x) => (float[1,u,16] y) { s = Conv (x, kernel) p = Mul (s, s) "
            "a = Transpose <perm = [0,2,1]> (p) m = MatMul (a, mel) c = Max (m, least) "
            "l = Log (c) y = MatMul (l, w) }")  # fmt: skip
    assert planned(text)[0] == {"w"}


@pytest.mark.parametrize(
    "rest",
    [
        "y = Softplus (c)",
        "q = Softmax (c) y = Log (q)",
        "q = Relu (c) y = Log (q)",
    ],
)
def test_what_learnt_ops_lie_between_is_quantized(rest):
    assert planned(SPECTRUM + f"{{ {FRONT} {rest} }}")[0] == {"dft", "mel"}


def test_no_more_than_two_layers_are_signal_processing():
    text = SPECTRUM + f"{{ {FRONT} r = MatMul (c, w) y = Log (r) }}"
    assert planned(text)[0] == {"dft"}


def test_what_a_recipe_asks_for_is_quantized():
    rules = [NodeRule(op="MatMul", precision="int8")]
    assert planned(SPECTRUM + f"{{ {FRONT} y = Log (c) }}", rules)[0] == {"dft", "mel"}

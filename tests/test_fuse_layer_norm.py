"""fuse-layer-norm: each spelling becomes one op, the numbers stay; what only looks alike stays."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_rewrites, model_of, text_of

from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.fuse_layer_norm import FuseLayerNorm

K = 16
RNG = np.random.default_rng(0)
X = {"x": RNG.standard_normal((3, 4, K), dtype=np.float32) * 3 + 1}
CONSTANTS = {
    "gamma": RNG.standard_normal(K, dtype=np.float32),
    "beta": RNG.standard_normal(K, dtype=np.float32),
    "rows": RNG.standard_normal((4, 1), dtype=np.float32),
    "one": np.float32(1),
    "two": np.float32(2),
    "three": np.float32(3),
    "eps": np.float32(1e-5),
    "last": np.array([-1]),
    "first": np.array([0]),
}
SIGNATURE = f"g (float[3,4,{K}] x) => (float[3,4,{K}] y) "
CENTRED = "m = ReduceMean (x, last) d = Sub (x, m) "
ROOT = "p = Pow (d, two) v = ReduceMean (p, last) e = Add (v, eps) r = Sqrt (e) "
SCALED = "u = Div (d, r) z = Mul (u, gamma) "
BIASED = "y = Add (z, beta)"
ATTRIBUTES = {"axis": "-1", "epsilon": "9.999999747378752e-06"}


def after(parameters="v2, v3"):
    return f"inputs x\ny = LayerNormalization {ATTRIBUTES} (x, {parameters})\noutputs y"


@pytest.mark.parametrize(
    "body",
    [
        CENTRED + ROOT + SCALED + BIASED,
        CENTRED + ROOT.replace("Pow (d, two)", "Mul (d, d)") + SCALED + BIASED,
        CENTRED + ROOT + "i = Reciprocal (r) u = Mul (d, i) z = Mul (gamma, u) y = Add (beta, z)",
        CENTRED + ROOT + "i = Div (one, r) u = Mul (i, d) z = Mul (u, gamma) " + BIASED,
    ],
)
def test_fuses_each_spelling(body):
    model = model_of(SIGNATURE + f"{{ {body} }}", CONSTANTS)
    assert_rewrites(FuseLayerNorm(), model, after(), X, exact=False, floor_db=100)


def test_without_a_bias():
    body = CENTRED + ROOT + SCALED.replace("z =", "y =")
    model = model_of(SIGNATURE + f"{{ {body} }}", CONSTANTS)
    assert_rewrites(FuseLayerNorm(), model, after("v2"), X, exact=False, floor_db=100)


def test_what_is_added_per_row_is_no_bias():
    body = CENTRED + ROOT + SCALED + "y = Add (z, rows)"
    model = model_of(SIGNATURE + f"{{ {body} }}", CONSTANTS)
    assert FuseLayerNorm()(model).modified
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "Add"]


@pytest.mark.parametrize(
    "body",
    [
        CENTRED.replace("Sub (x, m)", "Sub (m, x)") + ROOT + SCALED + BIASED,
        CENTRED.replace("last", "first") + ROOT + SCALED + BIASED,
        CENTRED + ROOT.replace("last", "first") + SCALED + BIASED,
        CENTRED + ROOT.replace("two", "three") + SCALED + BIASED,
        CENTRED + ROOT + SCALED.replace("Div (d, r)", "Div (x, r)") + BIASED,
        CENTRED + ROOT + SCALED.replace("gamma", "rows") + BIASED,
        CENTRED.replace("ReduceMean", "ReduceMax") + ROOT + SCALED + BIASED,
    ],
)
def test_leaves_what_only_looks_like_it(body):
    model = model_of(SIGNATURE + f"{{ {body} }}", CONSTANTS)
    before = text_of(model)
    assert not FuseLayerNorm()(model).modified
    assert text_of(model) == before


def test_leaves_pieces_that_leave_the_graph():
    signature = f"g (float[3,4,{K}] x) => (float[3,4,{K}] y, float[3,4,1] r) "
    model = model_of(signature + f"{{ {CENTRED + ROOT + SCALED + BIASED} }}", CONSTANTS)
    assert not FuseLayerNorm()(model).modified


def test_keeps_what_is_centred_for_its_other_readers():
    signature = f"g (float[3,4,{K}] x) => (float[3,4,{K}] y, float[3,4,{K}] o) "
    body = CENTRED + ROOT + SCALED + BIASED + " o = Relu (d)"
    model = model_of(signature + f"{{ {body} }}", CONSTANTS)
    assert FuseLayerNorm()(model).modified
    ops = [node.op_type for node in model.graph]
    assert ops == ["ReduceMean", "Sub", "LayerNormalization", "Relu"]


def test_a_shared_scaled_value_is_the_norm_without_its_bias():
    signature = f"g (float[3,4,{K}] x) => (float[3,4,{K}] y, float[3,4,{K}] z) "
    model = model_of(signature + f"{{ {CENTRED + ROOT + SCALED + BIASED} }}", CONSTANTS)
    assert FuseLayerNorm()(model).modified
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "Add"]
    assert [value.name for value in model.graph.node(0).outputs] == ["z"]


def test_inside_a_branch():
    # What is known of a constant outside, ONNX's inference does not take inside.
    axes = "last = Constant <value_ints = [-1]> () "
    body = axes + CENTRED + ROOT + SCALED + BIASED
    text = f"""
        g (float[3,4,{K}] x, bool c) => (float[3,4,{K}] o) {{
            o = If (c) <
                then_branch = t () => (float[3,4,{K}] y) {{ {body} }},
                else_branch = f () => (float[3,4,{K}] n) {{ n = Neg (x) }}
            >
        }}"""
    model = model_of(text, CONSTANTS)
    Canonicalize()(model)
    assert FuseLayerNorm()(model).modified
    (branch, _) = (a.as_graph() for a in model.graph.node(0).attributes.values())
    assert isinstance(branch, ir.Graph)
    assert [node.op_type for node in branch] == ["LayerNormalization"]

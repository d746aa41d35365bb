"""absorb_factors, through smooth-activations: what takes the factors of a value."""

import numpy as np
import pytest
from golden import model_of, run, text_of
from planted import plan, sampler

from qcompiler.ir.decisions import decision_of
from qcompiler.passes.absorb_factors import absorber_of
from qcompiler.passes.smooth_activations import SmoothActivations

RNG = np.random.default_rng(1)
K, WIDE, N, HEADS, GROUPS, DEPTH = 64, 128, 48, 6, 2, 16


def loud(rows, columns, *channels):
    """Weights whose results are 40 times as large in some columns."""
    weight = RNG.standard_normal((rows, columns), dtype=np.float32)
    weight[:, list(channels)] *= 40
    return weight


WEIGHTS = {
    "gamma": np.ones(K, np.float32),
    "wg": RNG.standard_normal((K, WIDE), dtype=np.float32),
    "wu": loud(K, WIDE, 5, 77),
    "bu": RNG.standard_normal(WIDE, dtype=np.float32),
    "wd": RNG.standard_normal((WIDE, N), dtype=np.float32),
    "wv": loud(K, GROUPS * DEPTH, 3, 20),
    "wo": RNG.standard_normal((HEADS * DEPTH, N), dtype=np.float32),
    "wqkv": loud(K, 3 * WIDE, 2 * WIDE + 9),
    "apart": np.array([0, 0, GROUPS, DEPTH]),
    "second": np.array([2]),
    "grouped": np.array([1, 1, HEADS // GROUPS, 1, 1]),
    "heads": np.array([0, HEADS, -1, DEPTH]),
    "joined": np.array([0, 0, HEADS * DEPTH]),
    "widths": np.array([WIDE] * 3),
}
X = f"float[b,s,{K}] x"
FEEDS = {"x": RNG.standard_normal((2, 9, K), dtype=np.float32)}
OUT = f"float[b,s,{N}] o"

GATE = "g = MatMul (x, wg) e = Sigmoid (g) a = Mul (g, e) "
GATED = GATE + "m = MatMul (x, wu) u = Add (m, bu) h = Mul (a, u) o = MatMul (h, wd)"
SCORES = "t = Transpose <perm = [0, 2, 1]> (x) c = MatMul (x, t) p0 = Softmax (c) "
GROUPED = (
    SCORES + "one = Constant <value_ints = [1]> () p = Unsqueeze (p0, one) v = MatMul (x, wv) "
    "v4 = Reshape (v, apart) vt = Transpose <perm = [0, 2, 1, 3]> (v4) vu = Unsqueeze (vt, second) "
    "ve = Expand (vu, grouped) vh = Reshape (ve, heads) y4 = MatMul (p, vh) "
    "yt = Transpose <perm = [0, 2, 1, 3]> (y4) y = Reshape (yt, joined) o = MatMul (y, wo)"
)
SPLIT = (
    "f = MatMul (x, wqkv) q, k, h = Split <axis = -1> (f, widths) o = MatMul (h, wd) r = Mul (q, k)"
)
GELU = "u = MatMul (x, wu) h = Gelu (u) o = MatMul (h, wd)"


def smoothed(text, outputs=OUT, **options):
    """The model after the pass, its results before, and the constants that it changed."""
    model = plan(model_of(f"g ({X}) => ({outputs}) {{ {text} }}", WEIGHTS))
    before, shape = run(model, FEEDS), text_of(model)
    SmoothActivations(sampler(FEEDS), SmoothActivations.Options(**options))(model)
    for got, want in zip(run(model, FEEDS), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)
    changed = {
        name.removesuffix("_smoothed"): value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if name.endswith("_smoothed")
    }
    return model, text_of(model) == shape, changed


def why(model):
    return decision_of(next(n for n in model.graph if n.outputs[0].name == "o")).why


def test_a_gate_takes_them_in_its_linear_factor():
    model, same_text, changed = smoothed(GATED)
    assert same_text and set(changed) == {"wu", "bu", "wd"}
    factors = changed["wd"][:, 0] / WEIGHTS["wd"][:, 0]
    assert {5, 77} <= set(np.flatnonzero(factors > 4))
    np.testing.assert_array_equal(np.log2(factors) % 1, 0)
    np.testing.assert_array_equal(changed["wu"], WEIGHTS["wu"] / factors)
    np.testing.assert_array_equal(changed["bu"], WEIGHTS["bu"] / factors)
    assert "activations smoothed with alpha=" in why(model) and "of the error" in why(model)


def test_values_take_them_through_attention_equal_for_the_heads_of_a_group():
    _, same_text, changed = smoothed(GROUPED)
    assert same_text and set(changed) == {"wv", "wo"}
    factors = (changed["wo"][:, 0] / WEIGHTS["wo"][:, 0]).reshape(GROUPS, HEADS // GROUPS, DEPTH)
    assert (factors == factors[:, :1]).all(), "heads of one group read the same values"
    of_values = factors[:, 0].reshape(-1)
    assert {3, 20} <= set(np.flatnonzero(of_values > 1))
    np.testing.assert_array_equal(changed["wv"], WEIGHTS["wv"] / of_values)


def test_a_part_of_a_merged_product_leaves_the_others_alone():
    _, same_text, changed = smoothed(SPLIT, f"{OUT}, float[b,s,{WIDE}] r")
    assert same_text and set(changed) == {"wqkv", "wd"}
    np.testing.assert_array_equal(changed["wqkv"][:, : 2 * WIDE], WEIGHTS["wqkv"][:, : 2 * WIDE])
    assert np.abs(changed["wqkv"][:, 2 * WIDE + 9]).max() < 20


def test_a_weight_that_another_product_reads_keeps_its_values():
    text = GATED + " z = MatMul (x, wu)"
    model, _, changed = smoothed(text, f"{OUT}, float[b,s,{WIDE}] z")
    assert set(changed) == {"wu", "bu", "wd"}
    np.testing.assert_array_equal(model.graph.initializers["wu"].const_value.numpy(), WEIGHTS["wu"])


@pytest.mark.parametrize(
    ("text", "outputs", "reason"),
    [
        (GELU, OUT, "no factor passes node_1 (Gelu)"),
        ("u = MatMul (x, wu) h = Relu (u) o = MatMul (h, wd)", f"{OUT}, float[b,s,{WIDE}] u",
         "u leaves the graph"),
        (GATED + " z = Neg (u)", f"{OUT}, float[b,s,{WIDE}] z", "u is read elsewhere too"),
        (GATED, f"{OUT}, float[b,s,{WIDE}] h", "h leaves the graph"),
        ("u = MatMul (x, wu) h = Mul (u, u) o = MatMul (h, wd)", OUT, "u is read elsewhere too"),
        (GROUPED, f"{OUT}, float[b,{GROUPS},s,{DEPTH}] vt", "vt leaves the graph"),
    ],
    ids=["Gelu", "result", "two readers", "value is a result", "square", "cached values"],
)  # fmt: skip
def test_says_why_nothing_takes_them(text, outputs, reason):
    model, same_text, changed = smoothed(text, outputs, worth_mul=1e-9)
    assert same_text and not changed
    assert "activations not smoothed, which would leave 0." in why(model)
    assert reason in why(model)


def test_a_mul_is_inserted_where_that_is_worth_it():
    model, _, changed = smoothed(GELU, worth_mul=0.5)
    assert set(changed) == {"wd"}
    assert [node.op_type for node in model.graph] == ["MatMul", "Gelu", "Mul", "MatMul"]
    assert "; by a Mul, because no factor passes node_1 (Gelu)" in why(model)


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        ("y = Reshape (x, turn) ", "[b,9,96]", "moves the channels is not known"),
        ("y = Concat <axis = -1> (x, x) ", "[b,s,128]", "no factor passes"),
        ("y = Identity (x) ", "[b,s,64]", "x is read elsewhere too"),
    ],
)
def test_no_absorber(text, shape, reason):
    weights = WEIGHTS | {"turn": np.array([0, -1, 96])}
    result = "" if "Identity" not in text else " z = Neg (x)"
    more = "" if "Identity" not in text else f", float[b,s,{K}] z"
    model = model_of(
        f"g (float[b,s,{K}] x) => (float{shape} y{more}) {{ {text}{result} }}", weights
    )
    found = absorber_of(model.graph.outputs[0])
    assert isinstance(found, str) and reason in found


def test_made_up_floats_say_nothing_of_what_is_no_norm():
    model = plan(model_of(f"g ({X}) => ({OUT}) {{ {GATED} }}", WEIGHTS))
    assert not SmoothActivations(sampler(FEEDS), made_up=True)(model).modified
    assert "smoothed" not in why(model)

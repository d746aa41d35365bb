"""smooth-activations: which norms are changed and how; the float model keeps its bits."""

import numpy as np
import pytest
from golden import assert_rewrites, model_of, run, sqnr, text_of
from norm_models import GAMMA, RNG, TOKENS, WEIGHTS, K, N

import qcompiler
from qcompiler.calibrate import sample_tokens
from qcompiler.ir.decisions import decision_of
from qcompiler.ir.types import TensorStats
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.known_ranges import KnownRanges
from qcompiler.passes.planned_products import Products
from qcompiler.passes.shared_weights import by_weights
from qcompiler.passes.smooth_activations import SmoothActivations
from qcompiler.pipeline import Pipeline
from qcompiler.targets.catalog import TARGETS

GAMMA[[3, 40]] *= (16, 40)
X = f"g (float[n,{K}] x)"
FEEDS = {"x": RNG.standard_normal((37, K), dtype=np.float32)}
NORM = "y = LayerNormalization <axis = -1> (x, gamma, beta)"
RMS_NORM = (
    "p2 = Mul (x, x) m = ReduceMean <keepdims = 1> (p2, last) e = Add (m, epsilon) r = Sqrt (e) "
    "u = Div (x, r) y = Mul (u, gamma)"
)
OUT = f"float[n,{N}]"


def sample(model, names):
    """The rows that the named values have on FEEDS."""
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    computed = [name for name in names if name in values]
    copy.graph.outputs[:] = [values[name] for name in computed]
    rows = dict(zip(computed, run(copy, FEEDS), strict=True))
    return {name: array.reshape(-1, array.shape[-1]) for name, array in (FEEDS | rows).items()}


def planned(text, weights=WEIGHTS, target="x86-int8", **options):
    model = model_of(text, weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    AssignPrecision(TARGETS[target].scheme, AssignPrecision.Options(**options))(model)
    return model


def constants(model):
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def test_the_norm_takes_the_factors_where_only_products_read_it():
    model = planned(f"{X} => ({OUT} p, {OUT} o) {{ {NORM} p = MatMul (y, v) o = MatMul (y, w) }}")
    before, rewrite = run(model, FEEDS), SmoothActivations(sample)
    text = text_of(model)
    assert rewrite(model).modified
    assert not rewrite(model).modified, "the pass is not idempotent"
    assert text_of(model) == text
    np.testing.assert_allclose(run(model, FEEDS), before, rtol=2e-6, atol=1e-6)
    new = constants(model)
    assert set(new) == {f"{name}_smoothed" for name in ("gamma", "beta", "v", "w")}
    factors = new["v_smoothed"][:, :1] / WEIGHTS["v"][:, :1]
    assert set(np.flatnonzero(factors > 1)) >= {3, 40}
    assert factors.min() == 1
    np.testing.assert_array_equal(np.log2(factors) % 1, 0)
    np.testing.assert_array_equal(new["gamma_smoothed"], GAMMA / factors[:, 0])
    for node in list(model.graph)[1:]:
        assert "activations smoothed with alpha=0." in decision_of(node).why


@pytest.mark.parametrize("reader", ["z = Neg (y)", "z = Identity (y)"])
def test_a_product_is_inserted_where_others_read_the_norm(reader):
    model = planned(
        f"{X} => ({OUT} p, {OUT} o, float[n,{K}] z) "
        f"{{ {NORM} p = MatMul (y, v) o = MatMul (y, w) {reader} }}"
    )
    op = reader.split()[2]
    after = f"""
        inputs x
        v6 = LayerNormalization {{'axis': '-1'}} (x, v4, v5)
        v8 = Mul  (v6, v7)
        p = MatMul  (v8, v9)
        o = MatMul  (v8, v10)
        z = {op}  (v6)
        outputs p, o, z
    """
    assert_rewrites(SmoothActivations(sample), model, after, FEEDS)


def test_a_product_is_inserted_where_the_norm_leaves_the_graph():
    model = planned(f"{X} => ({OUT} p, float[n,{K}] y) {{ {NORM} p = MatMul (y, v) }}")
    after = """
        inputs x
        y = LayerNormalization {'axis': '-1'} (x, v3, v4)
        v6 = Mul  (y, v5)
        p = MatMul  (v6, v7)
        outputs p, y
    """
    assert_rewrites(SmoothActivations(sample), model, after, FEEDS)


def test_a_norm_in_pieces():
    model = planned(f"{X} => ({OUT} o) {{ {RMS_NORM} o = MatMul (y, w) }}")
    before, count = run(model, FEEDS), len(model.graph)
    assert SmoothActivations(sample)(model).modified
    assert len(model.graph) == count
    np.testing.assert_allclose(run(model, FEEDS)[0], before[0], rtol=1e-6, atol=1e-6)


def test_a_constant_that_others_read_keeps_its_values():
    model = planned(
        f"{X} => ({OUT} p, {OUT} o, float[n,{K}] u) "
        f"{{ {NORM} p = MatMul (y, v) o = MatMul (x, v) u = Mul (x, gamma) }}",
        keep_float=("node_2",),
    )
    SmoothActivations(sample)(model)
    first, second = (node for node in model.graph if node.op_type == "MatMul")
    assert first.inputs[1].name == "v_smoothed" and second.inputs[1].name == "v"
    np.testing.assert_array_equal(constants(model)["gamma"], GAMMA)
    assert "smoothed" not in decision_of(second).why


SHARED = (
    f"{NORM} p = MatMul (y, v) z = LayerNormalization <axis = -1> (w2, gamma, beta) "
    "o = MatMul (z, v)"
)


def test_products_that_share_a_weight_share_their_factors():
    """One layer that is run twice: its weight is stored once, its norms' parameters are two."""
    model = planned(f"{X} => ({OUT} p, {OUT} o) {{ w2 = Mul (x, half) {SHARED} }}",
                    WEIGHTS | {"half": np.float32(0.5)})  # fmt: skip
    before = run(model, FEEDS)
    assert SmoothActivations(sample)(model).modified
    np.testing.assert_allclose(run(model, FEEDS), before, rtol=2e-6, atol=1e-6)
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert len({node.inputs[1] for node in products}) == 1
    assert sum(name.startswith("v") for name in constants(model)) == 1
    for node in products:
        assert "as those of 1 more by these weights" in decision_of(node).why


def test_the_first_of_many_layers_may_read_what_no_norm_makes():
    model = planned(f"{X} => ({OUT} p, {OUT} o, {OUT} q) {{ w2 = Mul (x, half) {SHARED} "
                    "n = Neg (x) q = MatMul (n, v) }",
                    WEIGHTS | {"half": np.float32(0.5)})  # fmt: skip
    before = run(model, FEEDS)
    assert SmoothActivations(sample)(model).modified
    np.testing.assert_allclose(run(model, FEEDS), before, rtol=2e-6, atol=1e-6)
    assert [node.op_type for node in model.graph].count("Mul") == 2
    assert len({node.inputs[1] for node in model.graph if node.op_type == "MatMul"}) == 1


def test_they_are_not_smoothed_where_norms_make_no_more_than_half():
    model = planned(f"{X} => ({OUT} p, {OUT} o) {{ {NORM} p = MatMul (y, v) o = MatMul (x, v) }}")
    assert not SmoothActivations(sample)(model).modified
    for node in list(model.graph)[1:]:
        assert "of 2 values that they multiply norms make but 1" in decision_of(node).why


def test_values_are_together_that_share_a_weight_with_any_of_them():
    model = planned(
        f"{X} => ({OUT} o, {OUT} p, {OUT} q, {OUT} r) {{ y = Neg (x) z = Abs (x) u = Exp (x) "
        "o = MatMul (x, v) p = MatMul (y, w) q = MatMul (z, v) r = MatMul (z, w) s = MatMul (u, b) "
        "}",
        WEIGHTS | {"b": WEIGHTS["v"] + 1},
    )
    products = {node.inputs[0]: [] for node in model.graph if node.op_type == "MatMul"}
    for node in model.graph:
        if node.op_type == "MatMul":
            products[node.inputs[0]].append(node)
    rows = np.ones((1, K), np.float32)
    groups = by_weights((Products(value, nodes), rows) for value, nodes in products.items())
    assert [[site.value.name for site, _ in group] for group in groups] == [["x", "y", "z"], ["u"]]


def test_a_product_that_stays_float_reads_the_norm_as_it_was():
    text = f"{X} => ({OUT} p, {OUT} o) {{ {NORM} p = MatMul (y, v) o = MatMul (y, w) }}"
    model = planned(text, keep_float=("node_2",))
    after = """
        inputs x
        v5 = LayerNormalization {'axis': '-1'} (x, v3, v4)
        v7 = Mul  (v5, v6)
        p = MatMul  (v7, v8)
        o = MatMul  (v5, v9)
        outputs p, o
    """
    assert_rewrites(SmoothActivations(sample), model, after, FEEDS)
    np.testing.assert_array_equal(constants(model)["w"], WEIGHTS["w"])


@pytest.mark.parametrize(
    ("text", "weights", "target"),
    [
        (f"{NORM} o = MatMul (y, w)", {"gamma": np.ones(K, np.float32)}, "x86-int8"),
        (f"{NORM} o = MatMul (y, w)", {}, "cuda-int4"),
    ],
    ids=["no outliers", "float activations"],
)
def test_stays(text, weights, target):
    model = planned(f"{X} => ({OUT} o) {{ {text} }}", WEIGHTS | weights, target)
    before = text_of(model)
    assert not SmoothActivations(sample)(model).modified
    assert text_of(model) == before


def test_says_when_there_is_nothing_to_run_on():
    model = planned(f"{X} => ({OUT} o) {{ {NORM} o = MatMul (y, w) }}")
    assert not SmoothActivations(lambda model, names: {})(model).modified
    why = decision_of(model.graph[-1]).why
    assert why.endswith("; activations not smoothed: no samples to run the model on")


@pytest.mark.parametrize(("rows", "given", "told"), [("n", 64, True), (3, 3, False), (9, 9, True)])
def test_what_a_single_made_up_row_holds_is_chance(rows, given, told):
    x = f"g (float[{rows},{K}] x)"
    model = planned(f"{x} => ({OUT} z) {{ {NORM} z = MatMul (y, w) }}")
    asked = []

    def counting(model, names):
        tokens = sample_tokens(model, names)
        asked.extend(len(each) for each in tokens.values())
        return tokens

    SmoothActivations(counting, made_up=True)(model)
    reason = decision_of(model.graph.node("node_1"))
    assert asked == [given]
    assert ("smoothed with alpha" in str(reason)) == told
    assert ("3 made-up tokens tell nothing" in str(reason)) != told


@pytest.mark.parametrize("smooth", [True, False])
def test_compiling_takes_given_samples(tmp_path, smooth):
    (tmp_path / "samples").mkdir()
    np.savez(tmp_path / "samples" / "a.npz", ids=np.arange(50)[None])
    report = qcompiler.compile(
        model_of(TOKENS, WEIGHTS),
        "arm-int8",
        tmp_path / "bundle",
        recipe=qcompiler.Recipe(smooth=smooth, passes={"split-outliers": {"when": "off"}}),
        calibration=tmp_path / "samples",
    )
    (why,) = (d.why for d in report.decisions if d.op == "QMatMulW8A8")
    assert ("activations smoothed with" in why) == smooth
    assert len(report.notes) == (not smooth)  # that samples were not used


@pytest.mark.parametrize("smooth", [True, False])
def test_a_recipe_turns_it_off(smooth):
    recipe = qcompiler.Recipe.from_dict({"smooth": smooth})
    assert qcompiler.Recipe.from_dict(recipe.to_dict()) == recipe
    names = [step.name for step in Pipeline.default(TARGETS["x86-int8"], recipe)]
    assert ("smooth-activations" in names) == smooth


@pytest.mark.parametrize("residual", [True, False])
def test_int8_products_become_more_exact(tmp_path, residual):
    text = f"{X} => ({OUT} o, float[n,{K}] z) {{ {NORM} o = MatMul (y, w) z = Add (x, y) }}"
    text = text if residual else text.replace(f", float[n,{K}] z", "").replace("z = Add (x, y)", "")
    model = model_of(text, WEIGHTS)
    exact = run(model, FEEDS)[0]
    noise = {}
    for smooth in (False, True):
        for native in (False, True):
            recipe = qcompiler.Recipe(smooth=smooth, passes={"split-outliers": {"when": "off"}})
            folder = tmp_path / f"{smooth}{native}"
            bundle = qcompiler.compile(model.clone(), "x86-int8", folder, recipe=recipe).bundle
            outputs = qcompiler.load(bundle, native=native).run(None, FEEDS)
            noise[smooth, native] = sqnr(exact, outputs[0])
    assert noise[True, False] > noise[False, False] + 3
    assert noise[True, True] == pytest.approx(noise[True, False], abs=0.2)


def test_ranges_that_are_known_hold_for_the_smoothed_model():
    asked = []

    def counted(model, names):
        asked.append(set(names))
        return {name: TensorStats(-1.0, 1.0) for name in names}

    model, ranges = (
        planned(f"{X} => ({OUT} o) {{ {NORM} o = MatMul (y, w) }}"),
        KnownRanges(counted),
    )
    ranges(model, {"x": None, "y": None})
    assert SmoothActivations(sample, ranges=ranges)(model).modified
    changed = model.graph[-1].inputs[0].name
    assert changed != "y"  # it holds other numbers
    ranges(model, {"x": None, changed: None})
    assert asked == [{"x", "y"}, {changed}]

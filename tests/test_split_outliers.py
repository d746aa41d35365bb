"""split-outliers: which channels, and the float product beside the quantized one."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_rewrites, model_of, run, sqnr, text_of
from planted import plan, sampler

import qcompiler
from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import OptionError
from qcompiler.ir.stages import Stage
from qcompiler.model_runs import ModelRuns
from qcompiler.passes.smooth_activations import SmoothActivations
from qcompiler.passes.split_outliers import SplitOutliers
from qcompiler.pipeline import Pipeline

RNG = np.random.default_rng(2)
K, N = 400, 48
OUTLIERS = [7, 201]
GAMMA = np.ones(K, np.float32)
GAMMA[OUTLIERS] = 50
WEIGHTS = {
    "gamma": GAMMA,
    "beta": np.zeros(K, np.float32),
    "v": RNG.standard_normal((K, N), dtype=np.float32),
    "w": RNG.standard_normal((K, N), dtype=np.float32),
    "inverse": (1 / GAMMA).astype(np.float32),
}
X = f"g (float[n,{K}] x)"
OUT = f"float[n,{N}]"
FEEDS = {"x": RNG.standard_normal((37, K), dtype=np.float32)}
NORM = "y = LayerNormalization <axis = -1> (x, gamma, beta)"
TWO = f"{X} => ({OUT} p, {OUT} o) {{ {NORM} p = MatMul (y, v) o = MatMul (y, w) }}"
ONE = f"{X} => ({OUT} o) {{ {NORM} o = MatMul (y, w) }}"


def split(model, **options):
    rewrite = SplitOutliers(sampler(FEEDS), SplitOutliers.Options(**options))
    return rewrite(model).modified


def constants(model):
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def test_two_products_of_one_value():
    after = """
        inputs x
        v5 = LayerNormalization {'axis': '-1'} (x, v3, v4)
        v7 = Mul  (v5, v6)
        v9 = Gather {'axis': '-1'} (v5, v8)
        v11 = MatMul  (v7, v10)
        v13 = MatMul  (v9, v12)
        p = Add  (v11, v13)
        v15 = MatMul  (v7, v14)
        v17 = MatMul  (v9, v16)
        o = Add  (v15, v17)
        outputs p, o
    """
    model = plan(model_of(TWO, WEIGHTS))
    before = run(model, FEEDS)
    assert_rewrites(SplitOutliers(sampler(FEEDS)), model, after)
    for got, want in zip(run(model, FEEDS), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)  # another order of terms
    new = constants(model)
    assert set(new) == {
        "gamma", "beta", "y_inliers", "y_outliers", "v_inliers", "v_outliers", "w_inliers",
        "w_outliers",
    }  # fmt: skip
    assert new["y_outliers"].tolist() == OUTLIERS == np.flatnonzero(new["y_inliers"] == 0).tolist()
    assert not new["w_inliers"][OUTLIERS].any()
    np.testing.assert_array_equal(new["w_outliers"], WEIGHTS["w"][OUTLIERS])
    first = next(node for node in model.graph if node.op_type == "MatMul")
    assert "2 of 400 channels multiplied in float, which leaves 0.0" in decision_of(first).why


def test_a_value_that_others_read_and_a_weight_that_is_shared():
    model = plan(
        model_of(
            f"{X} => ({OUT} o, {OUT} u, float[n,{K}] y) "
            f"{{ {NORM} o = MatMul (y, w) z = Sin (x) u = MatMul (z, w) }}",
            WEIGHTS,
        )
    )
    before = run(model, FEEDS)
    assert split(model)
    for got, want in zip(run(model, FEEDS), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(constants(model)["w"], WEIGHTS["w"])
    assert [value.name for value in model.graph.outputs] == ["o", "u", "y"]


def test_a_mul_by_channel_before_it_takes_the_zeros():
    text = f"{X} => ({OUT} o, float[n,{K}] y) {{ {NORM} o = MatMul (y, w) }}"
    model = plan(model_of(text, WEIGHTS))
    assert SmoothActivations(sampler(FEEDS), SmoothActivations.Options(alpha=(0.5,)))(
        model
    ).modified
    before = run(model, FEEDS)
    after = """
        inputs x
        y = LayerNormalization {'axis': '-1'} (x, v3, v4)
        v6 = Mul  (y, v5)
        v8 = Gather {'axis': '-1'} (y, v7)
        v10 = MatMul  (v6, v9)
        v12 = MatMul  (v8, v11)
        o = Add  (v10, v12)
        outputs o, y
    """
    assert_rewrites(SplitOutliers(sampler(FEEDS), SplitOutliers.Options(when="on")), model, after)
    np.testing.assert_allclose(run(model, FEEDS)[0], before[0], rtol=1e-5, atol=1e-3)
    (node,) = (n for n in model.graph if n.op_type == "MatMul" and "int8" in decision_of(n).why)
    why = decision_of(node).why
    assert "activations smoothed with alpha=0.5" in why and "2 of 400 channels" in why


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2),
        ({"threshold": 10}, 2),
        ({"threshold": 80}, 0),
        ({"when": "off"}, 0),
        ({"most": 0.0025}, 0),
        ({"most": 0.0025, "when": "on"}, 1),
        ({"worth": 1e-6}, 0),
        ({"when": "on", "worth": 1e-6, "threshold": 1.0001}, 4),
    ],
)
def test_options(options, count):
    model = plan(model_of(ONE, WEIGHTS))
    assert split(model, **options) == (count > 0)
    index = constants(model).get("y_outliers")
    assert (0 if index is None else len(index)) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": "always"}, "when must be auto, on or off, not 'always'"),
        ({"threshold": 1.0}, "threshold must be above 1, not 1"),
        ({"most": 1.0}, "most must lie between 0 and 1, not 1"),
        ({"most": 0}, "most must lie between 0 and 1, not 0"),
        ({"worth": -1.0}, "worth must be above 0, not -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        SplitOutliers.Options(**options)


def test_options_as_text():
    pipeline = Pipeline.parse("assign-precision,split-outliers{when=off}", "x86-int8")
    assert list(pipeline)[-1].rewrite.options.when == "off"
    with pytest.raises(OptionError, match="split-outliers: when must be auto, on or off"):
        Pipeline.parse("assign-precision,split-outliers{when=no}", "x86-int8")
    with pytest.raises(OptionError, match="split-outliers: most takes a number, not 'few'"):
        Pipeline.parse("assign-precision,split-outliers{most=few}", "x86-int8")


@pytest.mark.parametrize(
    ("weights", "target"),
    [({"gamma": np.ones(K, np.float32)}, "x86-int8"), ({}, "cuda-int4")],
    ids=["no outliers", "float activations"],
)
def test_stays(weights, target):
    model = plan(model_of(ONE, WEIGHTS | weights), target)
    before = text_of(model)
    assert not split(model)
    assert text_of(model) == before


def test_says_when_there_is_nothing_to_run_on():
    model = plan(model_of(ONE, WEIGHTS))
    assert not SplitOutliers(lambda model, names: {})(model).modified
    why = decision_of(model.graph[-1]).why
    assert why.endswith("; outliers not split off: no samples to run the model on")


def test_the_first_operand_may_be_an_input():
    model = plan(model_of(f"{X} => ({OUT} o) {{ o = MatMul (x, w) }}", WEIGHTS))
    feeds = {"x": FEEDS["x"] * GAMMA}
    before = run(model, feeds)
    assert SplitOutliers(sampler(feeds))(model).modified
    np.testing.assert_allclose(run(model, feeds)[0], before[0], rtol=1e-5, atol=1e-3)


def test_a_token_that_is_all_outliers():
    model = plan(model_of(f"{X} => ({OUT} o) {{ o = MatMul (x, w) }}", WEIGHTS))
    feeds = {"x": FEEDS["x"] * GAMMA}
    pipeline = Pipeline.default("x86-int8", runs=ModelRuns(sample=sampler(feeds)))
    quantized = pipeline.up_to(Stage.QUANTIZED).run(model)
    row = np.zeros((1, K), np.float32)
    row[0, OUTLIERS] = 30
    exact = row @ WEIGHTS["w"]
    assert sqnr(exact, run(quantized, {"x": row}, plainly=True)[0]) > 100


def test_no_op_of_its_own_is_needed(tmp_path):
    """The masked scale is a Quantize of the masked value; a norm's kernel masks for nothing."""
    pipeline = Pipeline.default("x86-int8", runs=ModelRuns(sample=sampler(FEEDS)))
    pipeline.remove("smooth-activations")
    model = pipeline.run(model_of(ONE, WEIGHTS))
    ops = [node.op_type for node in model.graph]
    assert any(op.startswith("LayerNorm_K400_smoothed") for op in ops), ops
    assert any(op.startswith("QMatMulW8A8_K400_N48_AddT") for op in ops), ops
    assert len(ops) == 4, ops


@pytest.mark.parametrize("native", [True, False])
def test_a_bundle(tmp_path, native):
    feeds = FEEDS
    np.savez(tmp_path / "sample.npz", **feeds)
    noise = {}
    for when in ("off", "auto"):
        recipe = qcompiler.Recipe(smooth=False, passes={"split-outliers": {"when": when}})
        model = model_of(ONE, WEIGHTS)
        bundle = qcompiler.compile(
            model, "x86-int8", tmp_path / when, recipe=recipe, calibration=tmp_path / "sample.npz"
        ).bundle
        outputs = qcompiler.load(bundle, native=native).run(None, feeds)
        noise[when] = sqnr(run(model_of(ONE, WEIGHTS), feeds)[0], outputs[0])
    assert noise["auto"] > noise["off"] + 15


def test_it_composes_in_either_order():
    """Smoothing finds the Mul of splitting and uses it; splitting that of smoothing."""
    for order in ((SmoothActivations, SplitOutliers), (SplitOutliers, SmoothActivations)):
        model = plan(model_of(TWO, WEIGHTS))
        before = run(model, FEEDS)
        for rewrite in order:
            rewrite(sampler(FEEDS))(model)
        for got, want in zip(run(model, FEEDS), before, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)
        planned = [node for node in model.graph if "int8" in decision_of(node).why]
        assert len(planned) == 2
        assert all(isinstance(node, ir.Node) for node in planned)

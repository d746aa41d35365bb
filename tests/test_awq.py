"""awq: text, numbers, what can take factors; and what it has in common with hqq, bad input."""

import numpy as np
import pytest
from golden import assert_rewrites, model_of, run, sqnr, text_of
from planned_norm import FEEDS, GAMMA, NORM, ONE, OUT, RUNS, WALK, WEIGHTS, K, X, constants, planned

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import CalibrationError, ModelError, OptionError
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.awq import AWQ
from qcompiler.passes.gptq import GPTQ
from qcompiler.passes.hqq import HQQ
from qcompiler.passes.node_rules import NodeRule
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.passes.second_moments import LayerRuns
from qcompiler.targets.catalog import TARGETS

pytestmark = pytest.mark.usefixtures("own_cache")


def noise_of(rounding, text=ONE, weights=WEIGHTS):
    model = planned(text, weights, rounding)
    expected = run(model, FEEDS)[0]
    for rewrite in (AWQ(RUNS), HQQ(), GPTQ(RUNS), RoundToNearest()):
        rewrite(model)
    return sqnr(expected, run(model, FEEDS, plainly=True)[0])


def test_awq_scales_the_norm_and_rounds():
    after = """
        inputs x
        v4 = DequantizeLinear {'axis': '0', 'block_size': '64'} (v2, v3)
        v7 = LayerNormalization {'axis': '-1'} (x, v5, v6)
        o = MatMul  (v7, v4)
        outputs o
    """
    model = assert_rewrites(AWQ(RUNS), planned(), after, FEEDS, exact=False, floor_db=20)
    factors = GAMMA / constants(model)["gamma_smoothed"]
    assert factors[[3, 40]].min() > np.delete(factors, [3, 40]).max()
    assert "scaled by awq with alpha=" in decision_of(model.graph[-1]).why


def test_awq_before_gptq_keeps_the_numbers():
    model = planned(rounding="awq_gptq")
    expected = run(model, FEEDS)[0]
    assert AWQ(RUNS)(model).modified
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "MatMul"]
    np.testing.assert_allclose(run(model, FEEDS)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_weight_is_not_rounded_in_two_ways():
    text = f"{X} => ({OUT} o, {OUT} p) {{ {NORM} o = MatMul (y, w) p = MatMul (x, w) }}"
    rules = [NodeRule("node_1", rounding="awq_gptq"), NodeRule("node_2", rounding="awq")]
    model = model_of(text, WEIGHTS)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    AssignPrecision(TARGETS["cuda-int4"].scheme, AssignPrecision.Options(), rules)(model)
    with pytest.raises(OptionError, match="node_2: others that read its weight 'w' round it by aw"):
        AWQ(RUNS)(model)


def test_awq_is_better_than_rounding_to_nearest_and_helps_gptq():
    nearest = noise_of("nearest")
    assert noise_of("awq") > nearest + 2
    assert noise_of("awq_gptq") > nearest + 2


def test_awq_takes_factors_through_another_product():
    """Rows of the second matrix grow, columns of the first shrink."""
    text = f"{X} => ({OUT} o) {{ u = MatMul (x, v) t = Relu (u) o = MatMul (t, w) }}"
    weights = WEIGHTS | {"v": WEIGHTS["v"] * np.abs(GAMMA)}
    assert noise_of("awq", text, weights) > noise_of("nearest", text, weights) + 1
    model = planned(text, weights)
    AWQ(RUNS)(model)
    assert "x is an input of the model" in decision_of(model.graph[-3]).why
    assert "scaled by awq" in decision_of(model.graph[-1]).why


@pytest.mark.parametrize(
    "text",
    [
        f"{X} => ({OUT} o, float[n,{K}] z) {{ {NORM} o = MatMul (y, w) z = Neg (y) }}",
        f"{X} => ({OUT} o, float[n,{K}] y) {{ {NORM} o = MatMul (y, w) }}",
        f"{X} => ({OUT} o, {OUT} p) {{ {NORM} o = MatMul (y, w) t = Neg (x) p = MatMul (t, w) }}",
    ],
    ids=["another reader", "a graph output", "a shared weight"],
)
def test_awq_scales_nothing_that_others_see(text):
    model = planned(text)
    expected = run(model, FEEDS)
    AWQ(RUNS)(model)
    for got, want in zip(run(model, FEEDS, plainly=True), expected, strict=True):
        assert sqnr(want, got) > 15
    assert any("not scaled by awq: " in decision_of(node).why for node in model.graph)
    assert "gamma_smoothed" not in constants(model)


def test_awq_goes_on_from_its_cache():
    def nothing():
        raise AssertionError("the model was run")

    first, second = planned(), planned()
    AWQ(RUNS)(first)

    def start(model, stops):
        found = WALK(model, stops)
        found.rows = lambda value: nothing()
        return found

    AWQ(LayerRuns(start))(second)
    np.testing.assert_array_equal(*(constants(m)["gamma_smoothed"] for m in (first, second)))


def test_each_input_and_each_layer_is_told_of():
    told = []
    AWQ(LayerRuns(WALK, tell=lambda text, share, left: told.append((text, share))))(planned())
    assert [share for _, share in told] == [0, 0.5, 1]
    assert told[1][0].startswith("y: scaled by awq with alpha=")
    assert told[2][0].startswith("node_1: rounded by awq to ")
    HQQ(LayerRuns(tell=lambda *line: told.append(line[:2])))(
        planned(rounding="hqq", zero_points="float")
    )
    assert told[3][0].startswith("node_1: rounded by hqq, its weights to ") and told[3][1] == 1


def test_nothing_planned_is_left():
    model = planned(keep_float=("MatMul",))
    before = text_of(model)
    assert not AWQ(RUNS)(model).modified and not HQQ()(model).modified
    assert text_of(model) == before


def test_awq_needs_samples():
    with pytest.raises(CalibrationError, match="awq scales node_1 and 0 more .*--calib"):
        AWQ()(planned())


@pytest.mark.parametrize(("rounding", "rewrite"), [("hqq", HQQ()), ("awq", AWQ(RUNS))])
def test_weights_that_are_not_finite_are_refused(rounding, rewrite):
    weight = WEIGHTS["w"].copy()
    weight[3, 4] = np.inf
    with pytest.raises(ModelError, match="'w' of 'node_1' holds 1 NaN or Inf.*--keep-float node_1"):
        rewrite(planned(weights=WEIGHTS | {"w": weight}, rounding=rounding))


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        (HQQ.Options, {"norm": 0}, "norm must be above 0"),
        (HQQ.Options, {"norm": 3}, "norm must be above 0"),
        (HQQ.Options, {"steps": 0}, "steps must be 1"),
        (HQQ.Options, {"range": "no"}, "range must be max or mse"),
        (AWQ.Options, {"alphas": 0}, "alphas must be 1"),
    ],
)
def test_options_are_checked(options, values, message):
    with pytest.raises(OptionError, match=message):
        options(**values)

"""gptq and the walk it takes: text, numbers, what is shared, bad input."""

import numpy as np
import onnx_ir as ir
import pytest
from correlated_rows import FEEDS, K, rows, samples
from golden import assert_rewrites, run, sqnr, text_of
from layer_chain import OUT, RUNS, WEIGHTS, X, constants, planned

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import CalibrationError, ModelError, OptionError
from qcompiler.ir.types import PerAxis, PerGroup, QuantType
from qcompiler.passes.awq import AWQ
from qcompiler.passes.gptq import GPTQ, gptq
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.passes.second_moments import LayerRuns
from qcompiler.samples import Samples
from qcompiler.walk import walker

pytestmark = pytest.mark.usefixtures("own_cache")

RNG = np.random.default_rng(1)


def runs_on(function):
    return LayerRuns(walker(Samples(function)))


def test_becomes_the_same_graph_as_rounding_to_nearest():
    after = """
        inputs x
        v4 = DequantizeLinear {'axis': '0', 'block_size': '64'} (v2, v3)
        v7 = DequantizeLinear {'axis': '0', 'block_size': '64'} (v5, v6)
        v10 = DequantizeLinear {'axis': '0', 'block_size': '64'} (v8, v9)
        v13 = DequantizeLinear {'axis': '0', 'block_size': '64'} (v11, v12)
        v14 = MatMul  (x, v13)
        v15 = MatMul  (x, v10)
        v16 = Tanh  (v14)
        v17 = Mul  (v16, v15)
        v18 = MatMul  (v17, v7)
        v19 = Add  (v18, x)
        y = MatMul  (v19, v4)
        outputs y
    """
    assert_rewrites(GPTQ(RUNS), planned(), after, FEEDS, exact=False, floor_db=19)


@pytest.mark.parametrize("act_order", [True, False])
def test_is_better_than_rounding_to_nearest(act_order):
    expected = run(planned(), FEEDS)[0]
    nearest, model = planned(rounding="nearest"), planned()
    RoundToNearest()(nearest)
    GPTQ(RUNS, GPTQ.Options(act_order=act_order))(model)
    before, after = (sqnr(expected, run(m, FEEDS, plainly=True)[0]) for m in (nearest, model))
    assert after > before + 3
    assert "rounded by gptq to 2" in decision_of(model.graph[-1]).why


@pytest.mark.parametrize("chance", [0, 0.3])
def test_the_update_is_that_of_the_paper(chance):
    """Against the definition, with the inverse of H computed anew after each input."""
    weight, hessian = WEIGHTS["a"][:, :5].copy(), np.cov(rows(0, 300).T).astype(np.float32)
    type = QuantType(ir.DataType.INT4, granularity=PerAxis(1))
    options = GPTQ.Options(block=16, range="max")
    rounded, _ = gptq(weight, hessian, type, options, chance)
    order = list(np.argsort(-np.diag(hessian), kind="stable"))
    damped = hessian * (1 - chance) + 0.01 * np.diag(hessian).mean() * np.eye(K)
    damped += chance * np.diag(np.diag(hessian))
    rest, expected = weight.astype(np.float64), np.empty(weight.shape)
    while order:
        at, *behind = order
        inverse = np.linalg.inv(damped[np.ix_(order, order)])
        expected[at] = np.clip(np.rint(rest[at] / rounded.scale), -8, 7)
        error = (rest[at] - expected[at] * rounded.scale) / inverse[0, 0]
        rest[behind] -= inverse[1:, :1] * error
        order = behind
    assert (rounded.stored.astype(int) == expected).mean() > 0.98  # a tie falls to either side


def test_later_layers_make_up_for_earlier_ones():
    """The last layer is rounded on what the rounded ones before it make."""
    model = planned()
    GPTQ(RUNS)(model)
    alone = planned(keep_float=("node_0", "node_1", "node_4"))
    GPTQ(RUNS)(alone)
    stored = [constants(m)["d_int4"].astype(int) for m in (model, alone)]
    assert 0 < (stored[0] != stored[1]).mean() < 0.5


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [0, 16, 24])
@pytest.mark.parametrize("symmetric", [True, False])
def test_types(bits, group, symmetric):
    """24 does not divide K: the last group is shorter."""
    storage = ir.DataType[f"{'' if symmetric else 'U'}INT{bits}"]
    granularity = PerGroup(0, group) if group else PerAxis(1)
    type = QuantType(storage, granularity=granularity, symmetric=symmetric)
    weight = RNG.standard_normal((K, 8), dtype=np.float32) + np.float32(0.3)
    hessian = np.cov(rows(0, 300).T).astype(np.float32)
    rounded, _ = gptq(weight, hessian, type, GPTQ.Options())
    assert rounded.stored.dtype == storage.numpy() and rounded.stored.shape == weight.shape
    assert rounded.scale.shape == granularity.scale_shape(weight.shape)
    assert (rounded.zero_point is None) == symmetric
    floor = {2: 4, 4: 18, 8: 40}[bits]
    assert sqnr(rows(9) @ weight, rows(9) @ rounded.floats(type)) > floor


def test_a_graph_input_and_a_graph_output():
    model = planned(f"{X} => ({OUT} p, {OUT} y) {{ p = MatMul (x, a) y = MatMul (p, b) }}")
    expected = run(model, FEEDS)
    GPTQ(RUNS)(model)
    assert sqnr(expected[1], run(model, FEEDS, plainly=True)[1]) > 20


def test_a_shared_weight_is_rounded_once_and_kept_for_others():
    model = planned(
        f"{X} => ({OUT} y, {OUT} z) "
        "{ p = MatMul (x, a) t = Tanh (p) y = MatMul (t, a) z = Add (x, a) }".replace("[n,", "[64,")
    )
    GPTQ(RUNS)(model)
    assert [node.op_type for node in model.graph].count("DequantizeLinear") == 1
    np.testing.assert_array_equal(constants(model)["a"], WEIGHTS["a"])


def test_what_is_no_planned_product_stays():
    model = planned(f"{X} => ({OUT} y, {OUT} z) {{ t = Tanh (x) y = MatMul (x, t2) z = Neg (t) }}"
                    .replace("t2", "t").replace("[n,", "[64,"))  # fmt: skip
    before = text_of(model)
    assert not GPTQ(RUNS)(model).modified
    assert text_of(model) == before
    assert decision_of(model.graph[1]).why.startswith("its second operand is an activation")


def test_a_dead_channel_is_rounded_to_nearest():
    """A channel that is always 0 makes H singular, and says nothing about its weights."""

    def dead():
        for sample in samples():
            sample["x"][:, 7] = 0
            yield sample

    model = planned(f"{X} => ({OUT} y) {{ y = MatMul (x, a) }}")
    GPTQ(runs_on(dead))(model)
    found = constants(model)
    expected = np.clip(np.rint(WEIGHTS["a"][7] / found["a_scale"][0]), -8, 7)
    np.testing.assert_array_equal(found["a_int4"][7].astype(int), expected)


def test_no_activations_at_all_are_no_error():
    model = planned(f"{X} => ({OUT} y) {{ y = MatMul (x, a) }}")
    GPTQ(runs_on(lambda: [{"x": np.zeros((3, K), np.float32)}]))(model)
    assert "rounded to nearest, which is no worse" in decision_of(model.graph[-1]).why


@pytest.mark.parametrize("rounding", ["gptq", "awq", "awq_gptq"])
def test_an_expert_that_no_token_is_for_is_rounded_to_nearest(rounding):
    """Of a mixture of experts a few samples need not reach all."""
    text = (
        f"{X} => ({OUT} y) {{ mask = Less (one, zero) some = Compress <axis = 0> (x, mask) "
        "sent = MatMul (some, a) none = ReduceSum <keepdims = 0> (sent, axes) "
        "p = MatMul (x, b) y = Add (p, none) }"
    )
    facts = {"one": np.ones(1, np.float32), "zero": np.zeros(1, np.float32), "axes": np.array([0])}
    nearest, model = (planned(text, WEIGHTS | facts, rounding=r) for r in ("nearest", rounding))
    AWQ(RUNS)(model)
    GPTQ(RUNS)(model)
    RoundToNearest()(nearest)
    reached, unreached = (
        next(node for node in model.graph if node.outputs[0].name == name) for name in ("p", "sent")
    )
    assert "no sample reaches it" in decision_of(unreached).why
    assert "no sample" not in decision_of(reached).why
    for name in ("a_int4", "a_scale"):
        np.testing.assert_array_equal(constants(model)[name], constants(nearest)[name])
    assert (constants(model)["b_int4"] != constants(nearest)["b_int4"]).any()


def test_fewer_tokens_than_channels():
    """H has rank 3: damping makes it regular."""
    model = planned(f"{X} => ({OUT} y) {{ y = MatMul (x, a) }}")
    GPTQ(runs_on(lambda: [{"x": rows(0, 3)}]))(model)
    few = {"x": rows(0, 3)}
    assert sqnr(run(planned(f"{X} => ({OUT} y) {{ y = MatMul (x, a) }}"), few)[0],
                run(model, few, plainly=True)[0]) > 30  # fmt: skip


def test_a_singular_hessian_is_damped_more_and_then_refused():
    weight, type = WEIGHTS["a"], QuantType(ir.DataType.INT4, granularity=PerGroup(0, 32))
    hessian = np.eye(K, dtype=np.float32)
    hessian[:2, :2] = [[1, 1.05], [1.05, 1]]
    _, damping = gptq(weight, hessian, type, GPTQ.Options())
    assert damping == pytest.approx(0.1)
    hessian[:2, :2] = [[1, 9], [9, 1]]
    with pytest.raises(CalibrationError, match="no positive matrix"):
        gptq(weight, hessian, type, GPTQ.Options())


def test_bad_values_are_named():
    weight = WEIGHTS["a"].copy()
    weight[3, 4] = np.nan
    text = f"{X} => ({OUT} y) {{ t = Exp (x) y = MatMul (t, a) }}"
    with pytest.raises(ModelError, match="'a' of 'node_1' holds 1 NaN or Inf.*--keep-float node_1"):
        GPTQ(RUNS)(planned(text, {"a": weight}))
    with pytest.raises(CalibrationError, match="'t' becomes NaN or Inf"):
        GPTQ(runs_on(lambda: [{"x": np.full((3, K), 1e4, np.float32)}]))(planned(text))
    with pytest.raises(CalibrationError, match="sample 1 of .*'t' becomes 9e.16, too large to sq"):
        GPTQ(runs_on(lambda: [{"x": np.full((3, K), 39, np.float32)}]))(planned(text))
    with pytest.raises(CalibrationError, match="samples are empty: no input .* give some"):
        GPTQ(runs_on(lambda: [{"x": np.zeros((0, K), np.float32)}]))(planned(text))
    with pytest.raises(CalibrationError, match="takes .*64"):
        GPTQ(runs_on(lambda: [{"x": np.zeros((3, 5), np.float32)}]))(planned(text))


def test_needs_samples():
    with pytest.raises(CalibrationError, match="gptq rounds node_0 and 3 more .*--calib"):
        GPTQ()(planned())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"damping": 0}, "damping"), ({"damping": 2}, "damping"), ({"block": 0}, "block"),
     ({"shrinkage": -0.1}, "shrinkage"), ({"shrinkage": np.inf}, "shrinkage"),
     ({"range": "min"}, "range must be one of max, mse")],
)  # fmt: skip
def test_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        GPTQ.Options(**options)

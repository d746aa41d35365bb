"""gptq and the walk it takes: text, numbers, what is shared, bad input."""

import concurrent.futures
import os

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_rewrites, model_of, run, sqnr, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import CalibrationError, ModelError, OptionError
from qcompiler.ir.types import PerAxis, PerGroup, QuantType
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.awq import AWQ
from qcompiler.passes.gptq import GPTQ, gptq
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.passes.second_moments import LayerRuns
from qcompiler.samples import Samples
from qcompiler.targets.catalog import TARGETS
from qcompiler.walk import walker

K, N = 64, 48
RNG = np.random.default_rng(0)
MIX = RNG.standard_normal((K, K)) * np.exp(-np.arange(K) / 8)[:, None]
WEIGHTS = {name: RNG.standard_normal((K, K), dtype=np.float32) / 8 for name in "abcd"}
X = f"g (float[n,{K}] x)"
OUT = f"float[n,{K}]"
CHAIN = (
    f"{X} => ({OUT} y) {{ p = MatMul (x, a) q = MatMul (x, b) r = Tanh (p) t = Mul (r, q) "
    "u = MatMul (t, c) v = Add (u, x) y = MatMul (v, d) }"
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))


def rows(seed, count=64):
    noise = np.random.default_rng(seed).standard_normal((count, K))
    return (noise @ MIX).astype(np.float32)


def samples():
    for seed in range(4):
        yield {"x": rows(seed)}


FEEDS = {"x": rows(99)}
WALK = walker(Samples(samples))
RUNS = LayerRuns(WALK)


def runs_on(function):
    return LayerRuns(walker(Samples(function)))


def planned(text=CHAIN, weights=WEIGHTS, target="cuda-int4", **options):
    model = model_of(text, weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    options = {"rounding": "gptq"} | options
    AssignPrecision(TARGETS[target].scheme, AssignPrecision.Options(**options))(model)
    return model


def constants(model):
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


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


def test_layers_side_by_side_are_the_same():
    first, second, told = planned(), planned(), []
    GPTQ(RUNS)(first)
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        os.environ["QCOMPILER_CACHE"] += "2"
        runs = LayerRuns(WALK, executor, lambda text, share, left: told.append((text, share)))
        GPTQ(runs)(second)
    for name, array in constants(first).items():
        np.testing.assert_array_equal(array.astype(np.float32),
                                      constants(second)[name].astype(np.float32))  # fmt: skip
    assert [share for _, share in told] == [0, 0.25, 0.5, 0.75, 1]
    assert told[1][0].startswith("node_0: rounded by gptq to ")


def test_it_is_said_what_was_kept_from_an_earlier_run():
    def told(model):
        lines = []
        GPTQ(LayerRuns(WALK, tell=lambda text, *_: lines.append(text)))(model)
        kept = ["kept from an earlier run: rounded by gptq" in line for line in lines[1:]]
        return lines[0].partition(" are there from an earlier run on this model")[0], kept

    none, all_of_them = ("layers: none of 4", [False] * 4), ("layers: 4 of 4", [True] * 4)
    assert told(planned()) == none and told(planned()) == all_of_them
    assert told(planned(weights=WEIGHTS | {"d": WEIGHTS["a"]})) == none


def test_it_is_said_that_layers_cannot_be_kept(tmp_path, monkeypatch):
    lines = []
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "file" / "cache"))
    GPTQ(LayerRuns(WALK, tell=lambda text, *_: lines.append(text)))(planned())
    assert all("not kept for another run: cannot write the kernel cache" in t for t in lines[1:])


def test_what_was_kept_says_nothing_of_how_long_the_rest_takes(monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr("qcompiler.passes.second_moments.time.perf_counter", lambda: now[0])
    tell = LayerRuns(tell=lambda text, share, left: told.append(left)).progress(8)
    tell("layers", 0)
    tell("a", 4, kept=True)
    now[0] = 6.0
    tell("b", 5)
    assert told == [0, 0, 18]  # an eighth took 6 s, and three more are left


class Cluster(concurrent.futures.Executor):
    def map(self, function, *arguments, **options):
        raise KeyError("no such worker")


def test_an_executor_that_fails_is_named():
    closed = concurrent.futures.ThreadPoolExecutor(1)
    closed.shutdown()
    for executor, why in (closed, "RuntimeError: .*shutdown"), (Cluster(), "KeyError: 'no such"):
        with pytest.raises(OptionError, match=f"the executor fails: {why}.* not shut down"):
            GPTQ(LayerRuns(WALK, executor))(planned())
    weight = np.full((K, K), 3e30, np.float32)
    with (
        concurrent.futures.ThreadPoolExecutor(1) as working,
        pytest.raises(CalibrationError, match="weight too"),
    ):
        LayerRuns(executor=working).map(_refuse, [weight])


def _refuse(weight):
    raise CalibrationError(f"a weight too large: {weight.max():g}")


def test_a_disk_that_is_full_is_named(monkeypatch):
    def full(*arrays, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qcompiler.walk.np.savez", full)
    with pytest.raises(OptionError, match=r"cannot write .*npz: No space left .*TMPDIR says where"):
        GPTQ(RUNS)(planned())


def test_another_model_or_samples_find_nothing_in_the_cache():
    def asked(model, walk):
        counts = []

        def counting(model, stops):
            found = walk(model, stops)
            read = found.rows
            found.rows = lambda value: counts.append(value.name) or read(value)
            return found

        GPTQ(LayerRuns(counting))(model)
        return counts

    assert asked(planned(), WALK) == ["x", "t", "v"]
    assert asked(planned(), WALK) == []
    assert asked(planned(group_size=32), WALK) == ["x", "t", "v"]
    assert asked(planned(weights=WEIGHTS | {"d": WEIGHTS["a"]}), WALK) == ["x", "t", "v"]
    assert asked(planned(CHAIN.replace("Tanh", "Sigmoid")), WALK) == ["x", "t", "v"]
    assert asked(planned(), walker(Samples(lambda: [{"x": rows(0)}]))) == ["x", "t", "v"]

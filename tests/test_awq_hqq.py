"""awq, hqq and the grids they round on: text, numbers, what can take factors, bad input."""

import dataclasses
import tracemalloc

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_rewrites, model_of, run, sqnr, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import CalibrationError, ModelError, OptionError
from qcompiler.ir.types import PerAxis, PerGroup, QuantType
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.awq import AWQ
from qcompiler.passes.gptq import GPTQ
from qcompiler.passes.hqq import HQQ, hqq
from qcompiler.passes.node_rules import NodeRule
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.passes.second_moments import LayerRuns
from qcompiler.passes.weight_grid import rounded_on, weight_grid
from qcompiler.samples import Samples
from qcompiler.targets.catalog import TARGETS
from qcompiler.walk import walker

K, N = 64, 48
RNG = np.random.default_rng(0)
GAMMA = RNG.uniform(0.5, 1.5, K).astype(np.float32)
GAMMA[[3, 40]] *= (16, 40)
WEIGHTS = {
    "gamma": GAMMA,
    "beta": RNG.standard_normal(K, dtype=np.float32),
    "v": RNG.standard_normal((K, K), dtype=np.float32),
    "w": RNG.standard_normal((K, N), dtype=np.float32),
}
X = f"g (float[n,{K}] x)"
FEEDS = {"x": RNG.standard_normal((37, K), dtype=np.float32)}
NORM = "y = LayerNormalization <axis = -1> (x, gamma, beta)"
OUT = f"float[n,{N}]"
ONE = f"{X} => ({OUT} o) {{ {NORM} o = MatMul (y, w) }}"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))


def samples():
    for seed in range(3):
        noise = np.random.default_rng(seed).standard_normal((50, K))
        yield {"x": noise.astype(np.float32)}


WALK = walker(Samples(samples))
RUNS = LayerRuns(WALK)


def planned(text=ONE, weights=WEIGHTS, rounding="awq", **options):
    model = model_of(text, weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    AssignPrecision(
        TARGETS["cuda-int4"].scheme, AssignPrecision.Options(rounding=rounding, **options)
    )(model)
    return model


def constants(model):
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


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


def test_hqq_becomes_the_same_graph_as_rounding_to_nearest():
    after = """
        inputs x
        v4 = DequantizeLinear {'axis': '0', 'block_size': '64'} (v2, v3)
        v7 = LayerNormalization {'axis': '-1'} (x, v5, v6)
        o = MatMul  (v7, v4)
        outputs o
    """
    assert_rewrites(HQQ(), planned(rounding="hqq"), after, FEEDS, exact=False, floor_db=17)


def filled(weight, size):
    return np.pad(weight, ((0, -len(weight) % size), (0, 0)))


@pytest.mark.parametrize("two_level", [False, True])
def test_hqq_fits_a_shorter_group_as_if_zeros_filled_it_up(two_level):
    type = QuantType(
        ir.DataType.INT4, granularity=PerGroup(0, 24), offset=True, two_level=two_level
    )
    weight = RNG.standard_t(3, (K, N)).astype(np.float32)
    assert len(weight) % 24
    one, other = hqq(weight, type, HQQ.Options()), hqq(filled(weight, 24), type, HQQ.Options())
    np.testing.assert_array_equal(one.floats(type), other.floats(type)[: len(weight)])


@pytest.mark.parametrize("granularity", [PerGroup(0, 32), PerGroup(0, 16), PerGroup(0, K)])
@pytest.mark.parametrize("start", ["max", "mse"])
def test_hqq_moves_zero_points_to_where_the_error_is_less(granularity, start):
    type = QuantType(ir.DataType.INT4, granularity=granularity, offset=True)
    weight = RNG.standard_t(3, (K, N)).astype(np.float32)
    first = weight_grid(weight, type, start)
    if start == "max":  # from a whole number
        first = dataclasses.replace(first, offset=np.rint(first.offset / first.scale) * first.scale)
    fitted = hqq(weight, type, HQQ.Options(range=start))
    losses = [
        np.square(weight - r.floats(type)).sum() for r in (rounded_on(weight, type, first), fitted)
    ]
    assert losses[1] < losses[0]
    np.testing.assert_array_equal(fitted.scale, first.scale)
    moved = np.abs(fitted.offset - first.offset) / first.scale
    assert 0 < moved.mean() < 0.5


def test_hqq_finds_the_grid_that_weights_once_lay_on():
    """Its zero points are no whole numbers, where it starts."""
    type = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 32), offset=True)
    rng = np.random.default_rng(3)
    levels = rng.integers(-8, 8, (2, 32, N))
    levels[:, 0], levels[:, 1] = -8, 7
    step, zero = rng.uniform(0.1, 1, (2, 1, N)), rng.uniform(-9, 9, (2, 1, N))
    weight = np.asarray((levels + zero) * step, np.float32).reshape(64, N)
    np.testing.assert_allclose(hqq(weight, type, HQQ.Options()).floats(type), weight, atol=1e-4)


def test_hqq_makes_no_copies_of_a_weight_in_each_step():
    weight = np.random.default_rng(3).standard_normal((512, 8192), dtype=np.float32)
    type = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 128), offset=True)
    tracemalloc.start()
    try:
        hqq(weight, type, HQQ.Options())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * weight.nbytes


def test_a_clipped_weight_does_not_move_the_zero_point_of_all_others():
    """What the end of the range cuts off is an outlier: by least squares alone it counts whole."""
    type = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 16), offset=True)
    weight = np.arange(-8, 8, dtype=np.float32)[:, None] + np.float32(0.02)
    weight[-1] += 0.9
    fits = [hqq(weight, type, HQQ.Options(norm=norm)) for norm in (0.7, 2)]
    errors = [np.median(np.abs(weight - fit.floats(type))) for fit in fits]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_offsets_hqq_rounds_to_nearest_and_says_so(symmetric):
    type = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 32), symmetric=symmetric)
    weight = np.random.default_rng(1).standard_t(3, (K, N)).astype(np.float32)
    nearest = rounded_on(weight, type, weight_grid(weight, type, "max"))
    fitted = hqq(weight, type, HQQ.Options())
    np.testing.assert_array_equal(fitted.floats(type), nearest.floats(type))
    model = planned(rounding="hqq")
    HQQ()(model)
    assert (
        "rounded to nearest: hqq fits zero points that are floats"
        in decision_of(model.graph[-1]).why
    )


@pytest.mark.parametrize("range", ["max", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_weights_are_exact_enough(range, symmetric):
    type = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 16), symmetric=symmetric)
    weight = np.zeros((32, 3), np.float32)
    weight[:, 1] = 0.7
    rounded = rounded_on(weight, type, weight_grid(weight, type, range))
    np.testing.assert_allclose(rounded.floats(type), weight, atol=0.051)


def test_an_asymmetric_grid_is_never_worse_than_the_whole_range():
    type = QuantType(ir.DataType.UINT4, granularity=PerGroup(0, 32), symmetric=False)
    weight = (np.random.default_rng(2).standard_t(4, (K, N)) + 0.4).astype(np.float32)
    errors = []
    for range in ("max", "mse"):
        floats = rounded_on(weight, type, weight_grid(weight, type, range)).floats(type)
        errors.append(np.square(weight - floats).reshape(2, 32, N).sum(1))
    assert (errors[1] <= errors[0] * 1.0001).all() and errors[1].sum() < 0.95 * errors[0].sum()


def test_groups_that_nothing_counts_in_keep_the_whole_range():
    """Channels that no sample reached."""
    type = QuantType(ir.DataType.UINT4, granularity=PerGroup(0, 32), symmetric=False)
    weight = RNG.standard_normal((K, N), dtype=np.float32)
    dead, whole = weight_grid(weight, type, "mse", np.zeros(K)), weight_grid(weight, type, "max")
    floats = [rounded_on(weight, type, grid).floats(type) for grid in (dead, whole)]
    np.testing.assert_allclose(*floats, rtol=1e-6)


@pytest.mark.parametrize(("bits", "less"), [(None, 0.925), (3, 0.982)])
def test_whole_zero_points_are_better_than_none(bits, less):
    """What is cut off need not be the same on both sides, so the zero point is searched for too."""
    errors = []
    for more in ({}, {"symmetric": False}):
        type = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 32), bits=bits, **more)
        weight = np.random.default_rng(3).standard_normal((256, 512), dtype=np.float32)
        floats = rounded_on(weight, type, weight_grid(weight, type, "mse")).floats(type)
        errors.append(np.square(weight - floats).sum())
    assert errors[1] < less * errors[0]  # 0.939 and 0.986 with zero points as the range has them


def test_importance_spares_what_counts():
    type = QuantType(ir.DataType.INT4, granularity=PerAxis(1))
    weight = RNG.standard_t(3, (K, N)).astype(np.float32)
    importance = np.where(np.arange(K) < 4, 100, 0.01).astype(np.float32)
    errors = []
    for counts in (None, importance):
        rounded = rounded_on(weight, type, weight_grid(weight, type, "mse", counts))
        errors.append(np.square(weight - rounded.floats(type))[:4].sum())
    assert errors[1] < 0.8 * errors[0]


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

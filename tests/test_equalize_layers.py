"""equalize-layers: which pairs are changed; the float model keeps its bits."""

import math

import numpy as np
import pytest
from calibrated import facts, output_sqnr, planned
from golden import assert_rewrites, run, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.passes.equalize_layers import EqualizeLayers
from qcompiler.passes.known_ranges import KnownRanges
from qcompiler.passes.options import configured
from qcompiler.passes.side_by_side import Comparison, quantized_copy

RNG = np.random.default_rng(0)
C = 16
RANGES = np.geomspace(1, 1000, C).astype(np.float32)
WEIGHTS = {
    "w": RNG.standard_normal((C, 3, 3, 3), dtype=np.float32) * RANGES.reshape(-1, 1, 1, 1),
    "b": RNG.standard_normal(C, dtype=np.float32) * RANGES,
    "v": RNG.standard_normal((8, C, 1, 1), dtype=np.float32) / RANGES.reshape(1, -1, 1, 1),
    "grouped": RNG.standard_normal((8, C // 2, 1, 1), dtype=np.float32)
    / RANGES.reshape(2, 1, -1, 1, 1).repeat(4, 1).reshape(8, C // 2, 1, 1),
    "deep": RNG.standard_normal((C, 1, 3, 3), dtype=np.float32),
    "slope": RNG.uniform(0.1, 0.5, (C, 1, 1)).astype(np.float32),
    "zero": np.float32(0),
    "six": np.float32(6),
}
FEEDS = [{"x": RNG.standard_normal((1, 3, 8, 8), dtype=np.float32)} for _ in range(3)]
RUN, OBSERVE = facts(FEEDS)
HEAD = "g (float[1,3,8,8] x) => (float[1,8,6,6] z)"
RELU = HEAD + " { c = Conv (x, w, b) y = Relu (c) u = Conv (y, v) z = Neg (u) }"


def equalized(text, weights=WEIGHTS, **options):
    """The model, whether it was changed, and the SQNR of its output before and after."""
    model = planned(text, weights)
    exact, before = run(model, FEEDS[0]), output_sqnr(model, FEEDS[0], OBSERVE)
    ops = [node.op_type for node in model.graph]
    modified = EqualizeLayers(RUN, OBSERVE, EqualizeLayers.Options(**options))(model).modified
    assert [node.op_type for node in model.graph] == ops  # only constants change
    for left, right in zip(exact, run(model, FEEDS[0]), strict=True):
        np.testing.assert_array_equal(left, right)
    assert not EqualizeLayers(RUN, OBSERVE)(model).modified or not modified
    return model, modified, before, output_sqnr(model, FEEDS[0], OBSERVE)


def reasons(model):
    return [decision_of(node).why for node in model.graph if node.op_type == "Conv"]


@pytest.mark.parametrize(
    "between",
    [
        "y = Relu (c)",
        "y = LeakyRelu <alpha = 0.125> (c)",
        "y = PRelu (c, slope)",
        "r = Relu (c) y = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r)",
    ],
)
def test_factors_pass_what_lets_them_through(between):
    text = RELU.replace("y = Relu (c)", between)
    model, modified, before, after = equalized(text)
    assert modified and after > before + 6
    assert "; input equalized with node_0" in reasons(model)[1] and "dB better" in reasons(model)[1]


def test_a_pair_with_nothing_between_and_no_bias():
    text = HEAD + " { y = Conv (x, w) u = Conv (y, v) z = Neg (u) }"
    _, modified, before, after = equalized(text)
    assert modified and after > before + 6


def test_the_weights_of_a_group_take_its_factors():
    text = RELU.replace("Conv (y, v)", "Conv <group = 2> (y, grouped)")
    weights = WEIGHTS | {"w": WEIGHTS["w"].copy(), "b": WEIGHTS["b"].copy()}
    for name in ("w", "b"):  # both groups have the same range of ranges
        weights[name] /= RANGES.reshape(-1, *[1] * (weights[name].ndim - 1))
        weights[name] *= np.tile(RANGES[: C // 2], 2).reshape(-1, *[1] * (weights[name].ndim - 1))
    _, modified, before, after = equalized(text, weights)
    assert modified and after > before + 3


def test_a_depthwise_layer_takes_it_all_and_hands_it_on():
    text = (
        "g (float[1,3,8,8] x) => (float[1,8,4,4] z) { c = Conv (x, w, b) y = Relu (c) "
        f"d = Conv <group = {C}> (y, deep) e = Relu (d) u = Conv (e, v) z = Neg (u) }}"
    )
    model, modified, before, after = equalized(text)
    assert modified and after > before + 10
    assert sum("input equalized" in reason for reason in reasons(model)) == 2


def test_equal_ranges_are_left_alone():
    weights = WEIGHTS | {"w": WEIGHTS["w"] / RANGES.reshape(-1, 1, 1, 1), "b": np.zeros(C, "f4")}
    weights["v"] = WEIGHTS["v"] * RANGES.reshape(1, -1, 1, 1)
    model, modified, before, after = equalized(RELU, weights)
    assert not modified and before == after
    assert not any("equalized" in reason for reason in reasons(model))


def test_a_bound_is_the_reason_to_leave_a_pair():
    model, modified, *_ = equalized(RELU.replace("Relu (c)", "Clip (c, zero, six)"))
    assert not modified
    assert reasons(model)[1].endswith("; not equalized: Clip bounds all channels alike")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (RELU.replace("[1,8,6,6] z)", f"[1,8,6,6] z, float[1,{C},6,6] y)"), "a graph output"),
        (RELU.replace("z = Neg (u)", "s = Neg (y) z = Add (u, u)"), "a shared value"),
        (RELU.replace("y = Relu (c)", "y = Exp (c)"), "Exp"),
        ("g (float[1,16,6,6] x) => (float[1,8,6,6] z) { u = Conv (x, v) z = Neg (u) }", "an input"),
    ],
)
def test_pairs_that_are_none(text, why):
    model = planned(text, WEIGHTS)
    assert not EqualizeLayers(RUN, OBSERVE)(model).modified, why


def test_shared_weights_keep_their_other_readers():
    text = RELU.replace("z = Neg (u)", "n = Neg (u) o = Conv (x, w, b) z = Add (n, n)").replace(
        "[1,8,6,6] z)", f"[1,8,6,6] z, float[1,{C},6,6] o)"
    )
    model, modified, *_ = equalized(text)
    assert modified and {"w", "b"} <= set(model.graph.initializers)
    assert "v" not in model.graph.initializers


def test_dead_channels_have_no_factor():
    weights = WEIGHTS | {
        "w": WEIGHTS["w"].copy(),
        "b": WEIGHTS["b"].copy(),
        "v": WEIGHTS["v"].copy(),
    }
    weights["w"][2], weights["b"][2], weights["v"][:, 5] = 0, 0, 0
    _, modified, before, after = equalized(RELU, weights)
    assert modified and after > before + 6


def test_ranges_that_overflow_are_left_to_calibration(recwarn):
    feeds = [{"x": np.full_like(FEEDS[0]["x"], 3e38)}]
    run, _ = facts(feeds)
    model = planned(RELU, WEIGHTS)
    assert not EqualizeLayers(run, OBSERVE)(model).modified
    assert not recwarn.list


def test_without_samples_nothing_changes():
    assert_rewrites(EqualizeLayers(), planned(RELU, WEIGHTS), text_of(planned(RELU, WEIGHTS)))
    with pytest.raises(CalibrationError, match="--calib"):
        EqualizeLayers(RUN)(planned(RELU, WEIGHTS))


def test_gain_is_what_a_pair_must_be_worth():
    assert not equalized(RELU, gain=60)[1]
    with pytest.raises(OptionError, match="equalize-layers: gain must be 0 dB or more, not -1"):
        configured(EqualizeLayers(), "equalize-layers", {"gain": ["-1"]})


def test_what_holds_the_same_numbers_is_not_observed_again():
    asked = []

    def counted(model, names):
        asked.append(set(names))
        return OBSERVE(model, names)

    model, ranges = planned(RELU, WEIGHTS), KnownRanges(counted)
    assert EqualizeLayers(RUN, ranges)(model).modified
    quantized_copy(model, ranges)
    first, again = asked
    assert again and all(name.endswith("_equalized") for name in again) and not first & again


def test_squares_beyond_float32_are_told_by_nobody():
    rows = {"n": np.full((2, 3), np.inf, np.float32), "s": np.full((2, 3), np.inf, np.float32)}
    assert math.isnan(Comparison("n", "s", "d").by_channel(rows))

"""bias-correction: the mean error of a channel is gone, whatever ran before."""

import numpy as np
import pytest
from calibrated import facts, output_sqnr, planned
from golden import assert_rewrites, model_of, run, text_of

from qcompiler.ir.decisions import (
    add_note,
    bias_shift,
    decide,
    decision_of,
    drop_plan,
    set_bias_shift,
)
from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.passes.bias_correction import BiasCorrection
from qcompiler.passes.equalize_layers import EqualizeLayers
from qcompiler.passes.keep_sensitive import KeepSensitive
from qcompiler.passes.node_rules import NodeRule
from qcompiler.passes.options import configured
from qcompiler.passes.side_by_side import own_errors, quantized_copy

RNG = np.random.default_rng(0)
RANGES = np.geomspace(1, 300, 16).astype(np.float32).reshape(-1, 1, 1, 1)
WEIGHTS = {
    "v": RNG.standard_normal((16, 32, 1, 1), dtype=np.float32) * RANGES,
    "u": RNG.standard_normal((8, 16, 3, 3), dtype=np.float32) / RANGES.reshape(1, 16, 1, 1),
    "w": RNG.standard_normal((8, 32, 3, 3), dtype=np.float32),
    "b": RNG.standard_normal(8, dtype=np.float32),
}
# Far from 0 beside how far they vary: what rounding adds to a channel is a shift.
FEEDS = [{"x": 20 + RNG.standard_normal((1, 32, 6, 6), dtype=np.float32)} for _ in range(4)]
CENTRED = [{"x": feed["x"] - 20} for feed in FEEDS]
RUN, OBSERVE = facts(FEEDS)
CONV = (
    "g (float[1,32,6,6] x) => (float[1,8,6,6] y) "
    "{ c = Conv <pads = [1, 1, 1, 1]> (x, w, b) y = Neg (c) }"
)
TWO = (
    "g (float[1,32,6,6] x) => (float[1,8,6,6] y) "
    "{ c = Conv (x, v) d = Conv <pads = [1, 1, 1, 1]> (c, u) y = Neg (d) }"
)


def drift(model, feeds=FEEDS):
    """The largest mean error of a channel of the output, in standard deviations of its error."""
    copy = quantized_copy(model, OBSERVE)
    errors = np.concatenate(
        [run(copy, f, plainly=True)[0] - run(model, f, plainly=True)[0] for f in feeds]
    )
    return float(np.max(np.abs(errors.mean(axis=(0, 2, 3))) / errors.std(axis=(0, 2, 3))))


@pytest.mark.parametrize("text", [CONV, CONV.replace("(x, w, b)", "(x, w)")])
def test_takes_the_shift_from_the_bias(text):
    model = planned(text, WEIGHTS)
    printed, before, shift = text_of(model), output_sqnr(model, FEEDS[0], OBSERVE), drift(model)
    assert BiasCorrection(RUN, OBSERVE)(model).modified
    assert text_of(model) == printed  # a plan: the float model stays what it was
    assert output_sqnr(model, FEEDS[0], OBSERVE) > before + 1
    assert drift(model) < 0.25 < 0.5 < shift
    assert "; bias corrected: " in decision_of(model.graph[0]).why
    assert not BiasCorrection(RUN, OBSERVE)(model).modified


def test_golden_a_shift_beside_the_plan():
    after = """inputs x
        v4 = Conv {'pads': '(1, 1, 1, 1)'} (x, v2, v3)
        # weight quant<int8:float, axis=0, narrow>
        # activation static quant<uint8:float, tensor, asymmetric>
        # output static quant<uint8:float, tensor, asymmetric>
        # bias less [-1.8, 4.0, -1.1, -3.2, -1.3, 1.4, 2.6, -1.2]
        # qdq: weight quant<int8:float, axis=0, narrow>, activation static \
quant<uint8:float, tensor, asymmetric>; bias corrected: 85% of its squared error
        y = Neg  (v4)
        outputs y"""
    rewrite = BiasCorrection(RUN, OBSERVE)
    assert_rewrites(rewrite, planned(CONV, WEIGHTS), after, FEEDS[0], notes=True)


LINEAR = "g (float[n,6,32] x) => (float[n,6,8] y) { c = MatMul (x, w) y = Add (c, b) }"
MATRIX = {"w": WEIGHTS["w"][:, :, 0, 0].T.copy(), "b": WEIGHTS["b"]}
TOKENS = [{"x": 20 + RNG.standard_normal((1, 6, 32), dtype=np.float32)} for _ in range(4)]
STATIC = NodeRule(op="MatMul", activation="static")


def linear(text=LINEAR, rule=STATIC):
    return planned(text, MATRIX, rules=[rule])


@pytest.mark.parametrize("text", [LINEAR, LINEAR.replace("(c, b)", "(b, c)")])
def test_takes_the_shift_from_what_is_added_to_a_product(text):
    run_, observe_ = facts(TOKENS)
    fresh = {"x": 20 + RNG.standard_normal((1, 6, 32), dtype=np.float32)}
    model = linear(text)
    printed, before = text_of(model), output_sqnr(model, fresh, observe_)
    assert BiasCorrection(run_, observe_)(model).modified
    assert text_of(model) == printed
    assert output_sqnr(model, fresh, observe_) > before + 3
    assert "; bias corrected: " in decision_of(model.graph[0]).why
    assert not BiasCorrection(run_, observe_)(model).modified


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (LINEAR, NodeRule(op="MatMul", activation="dynamic")),
        (LINEAR.replace("Add (c, b)", "Neg (c)"), STATIC),
        (LINEAR.replace("Add (c, b)", "Add (c, c)"), STATIC),
        (LINEAR.replace("=> (float[n,6,8] y)", "=> (float[n,6,8] y, float[n,6,8] c)"), STATIC),
    ],
)
def test_a_product_without_a_bias_of_its_own_is_left_alone(text, rule):
    assert not BiasCorrection(*facts(TOKENS))(linear(text, rule)).modified


def test_a_bias_that_two_products_add_has_a_shift_for_each():
    text = LINEAR.replace("y = Add (c, b)", "a = Add (c, b) n = Neg (x) d = MatMul (n, w) "
                          "e = Add (d, b) y = Sub (a, e)")  # fmt: skip
    run_, observe_ = facts(TOKENS)
    model = linear(text)
    before = output_sqnr(model, TOKENS[0], observe_)
    assert BiasCorrection(run_, observe_)(model).modified
    assert output_sqnr(model, TOKENS[0], observe_) > before + 3


def test_a_product_is_judged_with_its_bias_corrected():
    run_, observe_ = facts(TOKENS)

    def worst(model):
        copy = quantized_copy(model, observe_)
        joined, found = own_errors(model, copy, ["node_0"])
        return found["node_0"].by_channel(run_(joined, found["node_0"].names))

    model = linear()
    before = worst(model)
    BiasCorrection(run_, observe_)(model)
    assert worst(model) > before + 3
    options = KeepSensitive.Options(own=before + 1, runs=0)
    assert not KeepSensitive(run_, observe_, options)(model).modified
    assert KeepSensitive(run_, observe_, options)(linear()).modified


def test_errors_without_a_mean_are_left_alone():
    model = planned(CONV, WEIGHTS)
    assert not BiasCorrection(*facts(CENTRED))(model).modified
    assert bias_shift(model.graph[0]) is None
    assert "corrected" not in decision_of(model.graph[0]).why


def test_what_the_other_samples_do_not_share_is_not_corrected():
    """Each sample has a mean of its own, with either sign: the mean of four is chance."""
    signs = np.float32([1, -1, 1, -1])
    feeds = [{"x": s * (f["x"] + i)} for i, (s, f) in enumerate(zip(signs, FEEDS, strict=True))]
    model = planned(CONV, WEIGHTS)
    BiasCorrection(*facts(feeds))(model)
    shift = bias_shift(model.graph[0])
    held_out = [{"x": -f["x"]} for f in FEEDS] + FEEDS
    before = [output_sqnr(planned(CONV, WEIGHTS), f, OBSERVE) for f in held_out]
    if shift is not None:
        assert np.mean([output_sqnr(model, f, OBSERVE) for f in held_out]) > np.mean(before) - 0.1


def test_a_batch_counts_as_its_pictures_and_one_picture_as_nothing():
    text = CONV.replace("float[1,32,6,6] x", "float[n,32,6,6] x").replace(
        "float[1,8,6,6] y", "float[n,8,6,6] y"
    )
    batch = [{"x": np.concatenate([feed["x"] for feed in FEEDS])}]
    model, alone = planned(text, WEIGHTS), planned(text, WEIGHTS)
    assert BiasCorrection(*facts(batch))(model).modified
    single = planned(text, WEIGHTS)
    BiasCorrection(RUN, OBSERVE)(single)
    np.testing.assert_allclose(
        bias_shift(model.graph[0]), bias_shift(single.graph[0]), rtol=0.05, atol=0.01
    )
    assert not BiasCorrection(*facts(FEEDS[:1]))(alone).modified


def test_a_shared_weight_has_a_shift_for_each_bias():
    text = CONV.replace(
        "y = Neg (c)", "n = Neg (x) e = Conv <pads = [1, 1, 1, 1]> (n, w, b) y = Sub (c, e)"
    )
    model = planned(text, WEIGHTS)
    BiasCorrection(RUN, OBSERVE)(model)
    shifts = [bias_shift(node) for node in model.graph if node.op_type == "Conv"]
    assert all(shift is not None for shift in shifts)
    assert not np.allclose(shifts[0], shifts[1], rtol=0.1)
    assert drift(model) < 0.25


def test_after_equalization_the_means_are_those_of_what_it_made():
    model, alone = planned(TWO, WEIGHTS), planned(TWO, WEIGHTS)
    before = drift(model)
    assert EqualizeLayers(RUN, OBSERVE)(model).modified
    equalized = drift(model)
    assert BiasCorrection(RUN, OBSERVE)(model).modified and BiasCorrection(RUN, OBSERVE)(alone)
    assert drift(model) < 0.5 * min(before, equalized)
    # The weights are other ones now, and so are their errors: shifts of before would be wrong.
    shifts = [bias_shift(graph[1]) for graph in (model.graph, alone.graph)]
    assert shifts[0] is not None and not np.allclose(*shifts, rtol=0.1)
    with pytest.raises(OptionError, match="equalize-layers must run before bias-correction"):
        EqualizeLayers(RUN, OBSERVE)(alone)


def test_a_plan_taken_back_takes_the_shift_along():
    model = model_of(CONV, WEIGHTS)
    (conv,) = (node for node in model.graph if node.op_type == "Conv")
    decide(conv, "float", "planned")
    add_note(conv, "a note")
    set_bias_shift(conv, np.ones(8, np.float32), "bias corrected: 9%")
    copy = model.clone()
    assert decision_of(conv).why == "planned; a note; bias corrected: 9%"
    drop_plan(conv)
    assert bias_shift(conv) is None and decision_of(conv).why == "planned; a note"
    decide(conv, "float", "kept float")
    assert decision_of(conv).why == "kept float; a note"
    (other,) = (node for node in copy.graph if node.op_type == "Conv")
    assert bias_shift(other) is not None and "corrected" in decision_of(other).why


def test_without_samples_nothing_changes():
    assert not BiasCorrection()(planned(CONV, WEIGHTS)).modified
    with pytest.raises(CalibrationError, match="--calib"):
        BiasCorrection(RUN)(planned(CONV, WEIGHTS))
    with pytest.raises(
        OptionError, match="bias-correction: least must be a part from 0 to 1, not 2"
    ):
        configured(BiasCorrection(), "bias-correction", {"least": ["2"]})

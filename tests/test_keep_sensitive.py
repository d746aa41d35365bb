"""keep-sensitive: what is dropped, in which order, and what the reason says."""

import re

import numpy as np
import pytest
from calibrated import output_sqnr, planned
from golden import assert_rewrites, model_of
from sensitive_models import CHAIN, CHAIN_WEIGHTS, FEEDS, OBSERVE, RUN, WEIGHTS, kept

import qcompiler
from qcompiler.ir.decisions import add_note, decide, decision_of, plan_of
from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.passes.keep_sensitive import KeepSensitive
from qcompiler.passes.options import configured

TEXT = (
    "g (float[1,4,8,8] x) => (float[1,8,6,6] z) "
    "{ c = Conv (x, a) r = Relu (c) y = Conv (r, head) z = Mul (y, scale) }"
)


def test_a_head_with_one_scale_for_two_ranges_stays_float():
    before = output_sqnr(planned(TEXT, WEIGHTS), FEEDS[0], OBSERVE)
    model, reasons = kept(TEXT)
    assert list(reasons) == ["node_2"]
    found = re.fullmatch(r"kept float: its own error is (.*) dB, below 10", reasons["node_2"])
    assert found and -1 < float(found[1]) < 4  # half of its channels are lost
    assert before < 10 and output_sqnr(model, FEEDS[0], OBSERVE) > 30


def test_golden_a_plan_is_taken_back_and_the_graph_is_not_changed():
    after = """inputs x
        v3 = Conv  (x, v2)
        # weight quant<int8:float, axis=0, narrow>
        # activation static quant<uint8:float, tensor, asymmetric>
        # output static quant<uint8:float, tensor, asymmetric>
        v4 = Relu  (v3)
        v6 = Conv  (v4, v5)
        # float: kept float: its own error is 3.0 dB, below 10
        z = Mul  (v6, v7)
        outputs z"""
    assert_rewrites(
        KeepSensitive(RUN, OBSERVE), planned(TEXT, WEIGHTS), after, FEEDS[0], notes=True
    )


def test_what_is_good_enough_stays_quantized():
    assert kept(CHAIN, CHAIN_WEIGHTS)[1] == {}
    assert list(kept(TEXT, own=-300, outputs=-300)[1]) == []
    assert list(kept(TEXT, own=-300, runs=0)[1]) == []


def test_a_note_is_no_reason_to_say_it_twice():
    model = planned(TEXT, WEIGHTS)
    head = model.graph[2]
    add_note(head, "a note")
    KeepSensitive(RUN, OBSERVE)(model)
    why = decision_of(head).why
    assert why.startswith("kept float: its own error is ") and why.endswith("; a note")
    assert why.count("kept float") == 1
    decide(head, "float", "something else")
    assert decision_of(head).why.startswith("something else; a note; kept float: its own error")


def test_dynamic_products_answer_for_themselves_only():
    text = (
        "g (float[1,4,8,8] x) => (float[1,8,6,5] z) "
        "{ c = Conv (x, a) r = Relu (c) z = MatMul (r, m) }"
    )
    model, reasons = kept(text, outputs=200)
    assert list(reasons) == ["node_0"] and plan_of(model.graph[2])


def test_without_samples_nothing_changes():
    assert not KeepSensitive()(planned(TEXT, WEIGHTS)).modified
    with pytest.raises(CalibrationError, match="--calib"):
        KeepSensitive(RUN)(planned(TEXT, WEIGHTS))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("own", "x", "own takes a number, not 'x'"),
        ("outputs", "-1e9", "outputs must be a number of dB from -1000 to 1000, not -1000000000.0"),
        ("runs", "-1", "runs must be 0 or more, not -1"),
        ("run", "1", "no option 'run'; did you mean 'runs'"),
    ],
)
def test_options_are_checked(option, value, message):
    with pytest.raises(OptionError, match=message):
        configured(KeepSensitive(), "keep-sensitive", {option: [value]})


def test_compiling_a_convolution_decides_by_its_samples(tmp_path):
    report = qcompiler.compile(
        *(model_of(TEXT.replace("Mul (y, scale)", "Neg (y)"), WEIGHTS), "arm-int8"),
        tmp_path / "bundle",
        calibration=lambda: [feed["x"] for feed in FEEDS],
    )
    (head,) = (d for d in report.decisions if "its own error is" in d.why)
    assert head.action == "float" and head.op == "Conv" and head.expected
    assert report.notes == ()
    assert any(d.op == "QConv" for d in report.decisions)  # the other one


def test_samples_that_nothing_needs_are_named(tmp_path):
    report = qcompiler.compile(
        *(model_of("g (float[n,4] x) => (float[n,4] y) { y = Neg (x) }"), "arm-int8"),
        tmp_path / "bundle",
        calibration=lambda: [np.zeros((2, 4), np.float32)],
    )
    assert [note for note in report.notes if "the calibration samples were not used" in note]

"""keep-sensitive: what is dropped, in which order, and what the reason says."""

import re

import numpy as np
import onnx_ir as ir
import pytest
from calibrated import facts, output_sqnr, planned
from golden import assert_rewrites, model_of, text_of

import qcompiler
from qcompiler.ir.decisions import (
    add_note,
    decide,
    decision_of,
    is_kept_float,
    operand_plan_of,
    plan_of,
)
from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.join_integers import JoinIntegers
from qcompiler.passes.keep_sensitive import KeepSensitive
from qcompiler.passes.known_ranges import KnownRanges
from qcompiler.passes.node_rules import NodeRule
from qcompiler.passes.options import configured
from qcompiler.passes.worst_output import WorstOutput
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
# A head of boxes and scores: half of its channels a thousand times as large as the others.
HEAD = np.repeat([1000, 1], 4).astype(np.float32)
WEIGHTS = {
    "a": RNG.standard_normal((8, 4, 3, 3), dtype=np.float32),
    "head": RNG.standard_normal((8, 8, 1, 1), dtype=np.float32) * HEAD.reshape(-1, 1, 1, 1),
    "scale": (1 / HEAD).reshape(1, -1, 1, 1),
    "m": RNG.standard_normal((6, 5), dtype=np.float32),
}
FEEDS = [{"x": RNG.standard_normal((1, 4, 8, 8), dtype=np.float32)} for _ in range(3)]
RUN, OBSERVE = facts(FEEDS)
TEXT = (
    "g (float[1,4,8,8] x) => (float[1,8,6,6] z) "
    "{ c = Conv (x, a) r = Relu (c) y = Conv (r, head) z = Mul (y, scale) }"
)
CHAIN = (
    "g (float[1,4,8,8] x) => (float[1,8,2,2] z) { c = Conv (x, a) r = Relu (c) "
    "d = Conv (r, k0) s = Relu (d) e = Conv (s, k1) t = Relu (e) z = Neg (t) }"
)
CHAIN_WEIGHTS = WEIGHTS | {
    f"k{i}": RNG.standard_normal((8, 8, 3, 3), dtype=np.float32) for i in range(2)
}
BETWEEN = (
    "g (float[1,4,8,8] x) => (float[1,8,4,4] z) "
    "{ c = Conv (x, a) u = Add (c, high) v = Add (u, low) d = Conv (v, k0) z = Neg (d) }"
)
BETWEEN_WEIGHTS = CHAIN_WEIGHTS | {"high": np.float32(1e4), "low": np.float32(-1e4)}


def kept(text, weights=WEIGHTS, **options):
    """The model, and the reason of each convolution that stays float."""
    model = planned(text, weights)
    printed = text_of(model)
    modified = KeepSensitive(RUN, OBSERVE, KeepSensitive.Options(**options))(model).modified
    assert text_of(model) == printed
    convolutions = [node for node in model.graph if node.op_type == "Conv"]
    reasons = {node.name: decision_of(node).why for node in convolutions if not plan_of(node)}
    assert modified == bool(reasons)
    return model, reasons


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


def test_the_outputs_decide_how_many_stay_float():
    model = planned(CHAIN, CHAIN_WEIGHTS)
    every = output_sqnr(model, FEEDS[0], OBSERVE)
    counts = []
    for bound in (every - 3, every + 1, every + 4, 200):
        changed, reasons = kept(CHAIN, CHAIN_WEIGHTS, outputs=bound)
        counts.append(len(reasons))
        for reason in reasons.values():
            assert re.fullmatch(
                r"kept float: quantized alone it leaves the worst output \d+\.\d dB, and all "
                rf"together \d+\.\d dB, below {bound:g}",
                reason,
            )
        if counts[-1] < 3:
            assert output_sqnr(changed, FEEDS[0], OBSERVE) > bound - 1
    assert counts[0] == 0 and counts[-1] == 3 and counts == sorted(counts) and counts[1] in (1, 2)


def test_runs_bound_the_search():
    asked = []

    def counted(model, names):
        asked.append(len(names))
        return RUN(model, names)

    model = planned(CHAIN, CHAIN_WEIGHTS)
    KeepSensitive(counted, OBSERVE, KeepSensitive.Options(outputs=200, runs=2))(model)
    assert asked == [9, 3]  # each node once, then the output; two halves would be too much
    why = decision_of(model.graph[0]).why
    assert why.startswith("kept float: quantized alone with 2 more it leaves the worst output ")
    asked.clear()
    heard = []
    options, told = KeepSensitive.Options(outputs=200), lambda *what: heard.append(what)
    KeepSensitive(counted, OBSERVE, options, lambda: told)(planned(CHAIN, CHAIN_WEIGHTS))
    assert asked == [9, *[3] * 5]  # all, one and two, and the two
    assert [share for _, share in heard] == [run / 60 for run in range(1, 6)]
    assert re.fullmatch(r"run 1 of at most 60, 3 layers quantized: \d+\.\d dB", heard[0][0])


def test_nodes_that_only_together_make_noise(monkeypatch):
    """The search ends with all left out, also those whose noise alone is 0."""

    def noise(self, layers, links):
        self.heard.append(5.0)
        return 0.0 if list(layers) in (["node_0"], ["node_2"]) else 10**-0.5

    monkeypatch.setattr(WorstOutput, "noise", noise)
    _, reasons = kept(CHAIN, CHAIN_WEIGHTS)
    assert list(reasons) == ["node_0", "node_2", "node_4"]
    assert "quantized alone it leaves the worst output inf dB" in reasons["node_0"]
    assert "quantized alone it leaves the worst output 5.0 dB" in reasons["node_4"]


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


def test_what_costs_the_output_stays_float_not_what_errs_most_itself():
    """One is good, but a small difference is all that is left of it; one is bad, but quiet."""
    rng = np.random.default_rng(1)
    weights = {
        "one": np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1),
        "channel": np.int64([1]),
        "quiet": np.float32(1e-4),
    }
    text = (
        "g (float[1,8,8,8] x, float[1,8,8,8] p) => (float[1,8,8,8] z) "
        "{ c = Conv (x, one) m = ReduceMean (c, channel) d = Sub (c, m) "
        "b = Conv (p, one) t = Mul (b, quiet) z = Add (d, t) }"
    )
    shape, shared = (1, 8, 8, 8), 100 * rng.standard_normal((1, 1, 8, 8), dtype=np.float32)
    feed = {
        "x": shared + rng.standard_normal(shape, dtype=np.float32),
        "p": rng.standard_normal(shape, dtype=np.float32) ** 7,
    }

    def kept(**options):
        model = planned(text, weights)
        KeepSensitive(*facts([feed]), KeepSensitive.Options(**options))(model)
        return [node.name for node in model.graph if node.op_type == "Conv" and not plan_of(node)]

    assert kept(own=30, outputs=-300) == ["node_3"]
    assert kept(own=-300, outputs=20) == ["node_0"]


def test_what_is_rounded_between_two_layers_counts():
    """Up by much and down again, in integers: nothing is left, though both layers are good."""
    alone, joined = (planned(BETWEEN, BETWEEN_WEIGHTS) for _ in range(2))
    JoinIntegers()(joined)
    assert output_sqnr(alone, FEEDS[0], OBSERVE) > 25
    assert output_sqnr(joined, FEEDS[0], OBSERVE) < 5
    model, heard = planned(BETWEEN, BETWEEN_WEIGHTS), []
    told = lambda *what: heard.append(what[0])  # noqa: E731
    assert KeepSensitive(RUN, OBSERVE, progress=lambda: told)(model).modified
    JoinIntegers()(model)
    assert output_sqnr(model, FEEDS[0], OBSERVE) > 25
    assert [plan_of(node) is not None for node in model.graph] == [1, 0, 0, 1, 0]
    floats = [decision_of(node).why for node in model.graph if is_kept_float(node)]
    said = (
        r"kept float: in integers alone it leaves the worst output \S+ dB, and all together \S+ dB"
    )
    said = "kept float: in integers alone with 1 more it leaves the worst output -"
    assert len(floats) == 2 and all(why.startswith(said) for why in floats)
    assert re.match(r"run 1 of .* 2 layers and 2 between them quantized: -", heard[0])
    assert re.match(r"run 2 of .* 2 layers quantized: 3", heard[1])


def test_few_runs_look_at_all_together():
    model = planned(BETWEEN, BETWEEN_WEIGHTS)
    KeepSensitive(RUN, OBSERVE, KeepSensitive.Options(runs=3))(model)
    JoinIntegers()(model)
    assert not any(plan_of(node) for node in model.graph)
    assert output_sqnr(model, FEEDS[0], OBSERVE) > 25


@pytest.mark.parametrize("masked", ["Add (t, low)", "Log (t)"])
def test_what_is_not_finite_in_an_output_hides_nothing(masked):
    ends = "=> (float[1,8,2,2] z, float[1,8,2,2] u)", f"z = Neg (t) u = {masked}"
    text = CHAIN.replace("=> (float[1,8,2,2] z)", ends[0]).replace("z = Neg (t)", ends[1])
    # Half of the channels are minus infinity, as what a mask hides is.
    low = np.where(np.arange(8) % 2, 0, -np.inf).astype(np.float32).reshape(1, 8, 1, 1)
    weights = CHAIN_WEIGHTS | {"low": low}
    assert kept(text, weights, outputs=200)[1]
    _, reasons = kept(CHAIN, CHAIN_WEIGHTS, outputs=200)
    assert len(kept(text, weights, outputs=200)[1]) == len(reasons)
    assert kept(text, weights, outputs=-100)[1] == {}


@pytest.mark.parametrize(
    ("type", "ends"),
    [
        ("float16[1,8,2,2]", "z = Cast <to = 10> (n)"),
        ("double[1,8,2,2]", "z = Cast <to = 11> (n)"),
        ("bfloat16[1,8,2,2]", "z = Cast <to = 16> (n)"),
        ("int64[1,1,2,2]", "z = ArgMax <axis = 1> (n)"),
        ("int64[4,m]", "z = NonZero (n)"),
        ("float[m]", "b = Greater (n, zero) z = Compress (n, b)"),
    ],
)
def test_outputs_of_any_kind_are_judged(type, ends):
    text = CHAIN.replace("float[1,8,2,2] z", f"{type} z").replace("z =", "n =")
    text = text.replace("n = Neg (t)", f"n = Neg (t) {ends}")
    weights = CHAIN_WEIGHTS | {"zero": np.float32(0)}
    _, reasons = kept(text, weights, outputs=200)
    assert list(reasons) == list(kept(CHAIN, CHAIN_WEIGHTS, outputs=200)[1])
    assert all("below 200" in why for why in reasons.values())
    assert kept(text, weights, outputs=-100)[1] == {}


def test_dynamic_products_answer_for_themselves_only():
    text = (
        "g (float[1,4,8,8] x) => (float[1,8,6,5] z) "
        "{ c = Conv (x, a) r = Relu (c) z = MatMul (r, m) }"
    )
    model, reasons = kept(text, outputs=200)
    assert list(reasons) == ["node_0"] and plan_of(model.graph[2])


def test_the_model_is_calibrated_once():
    calls = []

    def counted(model, names):
        calls.append(list(names))
        return OBSERVE(model, names)

    model = planned(CHAIN, CHAIN_WEIGHTS)
    ranges = KnownRanges(counted)
    KeepSensitive(RUN, ranges, KeepSensitive.Options(outputs=200))(model)
    assert len(calls) == 1
    first = ranges(model, {"x": None})
    model.graph[0].replace_input_with(1, model.graph.initializers["a"])
    assert ranges(model, {"x": None}) == first and len(calls) == 1
    weight = model.graph.initializers["a"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * 2, name="a")
    ranges(model, {"x": None})
    assert len(calls) == 2  # another model


def test_ranges_are_carried_to_a_model_of_the_same_numbers():
    calls = []

    def counted(model, names):
        calls.append(list(names))
        return OBSERVE(model, names)

    model = planned(CHAIN, CHAIN_WEIGHTS)
    ranges = KnownRanges(counted)
    first, other = ranges(model, {"x": None, "r": None}), model.clone()
    weight = other.graph.initializers["a"]
    weight.const_value = ir.tensor(weight.const_value.numpy().copy(), name="a")
    ranges.carry(other, model)  # of which nothing is known
    ranges.carry(model, other)
    assert ranges(other, {"x": None, "r": None, "s": None}) | first and calls[1:] == [["s"]]
    ranges(model, {"x": None})
    assert len(calls) == 3


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


@pytest.mark.parametrize(("activation", "runs"), [("static", 60), ("dynamic", 60), ("dynamic", 3)])
def test_a_product_of_activations_is_judged_where_it_was_asked_for(activation, runs):
    """One channel is most of the range of what it reads, and nothing of what it makes."""
    outlier = np.where(np.arange(8) == 3, 1e4, 1).astype(np.float32)
    weights = {"w": RNG.standard_normal((8, 8), dtype=np.float32) * outlier}
    feeds = [
        {
            "x": RNG.standard_normal((1, 8, 8), dtype=np.float32),
            "p": RNG.standard_normal((1, 8, 4), dtype=np.float32) / outlier[:, None] ** 2,
        }
        for _ in range(2)
    ]
    text = (
        "g (float[1,8,8] x, float[1,8,4] p) => (float[1,8,4] z) "
        "{ q = MatMul (x, w) s = MatMul (q, p) z = Neg (s) }"
    )
    model = model_of(text, weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    options = AssignPrecision.Options(products=True)
    rules = (NodeRule(match="node_0", activation=activation),)
    AssignPrecision(TARGETS["x86-int8"].scheme, options, rules)(model)
    assert operand_plan_of(model.graph[1])
    run, observe = facts(feeds)
    assert KeepSensitive(run, observe, KeepSensitive.Options(runs=runs))(model).modified
    assert plan_of(model.graph[0]) and not operand_plan_of(model.graph[1])
    why = decision_of(model.graph[1]).why
    assert re.match(r"kept float: in integers alone it leaves the worst output -?\d\.\d dB, ", why)
    assert output_sqnr(model, feeds[0], observe) > 25

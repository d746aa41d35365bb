"""Passes and their options as text, and from Python."""

import pytest
from conftest import mlp
from pipelines import KNOWN, Halve, halving

from qcompiler.ir.errors import OptionError
from qcompiler.ir.stages import Stage
from qcompiler.passes.options import options_of
from qcompiler.pipeline import Pipeline, Step
from qcompiler.pipeline_text import PassText, parse_pipeline

# Text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha", ["alpha"]),
        (" beta , alpha+gamma", ["beta", "alpha", "gamma"]),
        ("..", ["alpha", "beta", "gamma"]),
        ("beta..,alpha", ["beta", "gamma", "alpha"]),
        ("..beta", ["alpha", "beta"]),
        ("alpha..alpha,alpha", ["alpha", "alpha"]),
        ("alpha{}", ["alpha"]),
    ],
)
def test_names_and_ranges(text, expected):
    assert parse_pipeline(text, KNOWN) == [PassText(name, {}) for name in expected]


def test_options_are_apart_by_spaces_or_commas():
    written = {"a_b": ["1", "2"], "c": ["/x.*/y"], "d": [""]}
    for text in ("{a-b=1,2 c=/x.*/y d=}", "{ a_b=1, 2,c=/x.*/y , d= }"):
        (found,) = parse_pipeline(f"alpha {text}", KNOWN)
        assert found == PassText("alpha", written)


def test_smooth_quant_is_another_name():
    known = ("fold-qdq", "smooth-activations")
    smooth = PassText("smooth-activations", {"alpha": ["0.6"]})
    assert parse_pipeline("smooth-quant{alpha=0.6}", known) == [smooth]
    assert parse_pipeline("..smooth-quant{alpha=0.6}", known)[-1] == smooth


def test_options_of_a_range_are_its_last_pass_s():
    found = parse_pipeline("..beta{a=1}", KNOWN)
    assert found == [PassText("alpha", {}), PassText("beta", {"a": ["1"]})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpah", "no pass 'alpah'; did you mean 'alpha'?"),
        ("zzz", "no pass 'zzz'; one of alpha, beta, gamma"),
        ("", "the name of a pass is missing at an end"),
        ("alpha,,beta", "missing at an end, or between two commas"),
        ("{a=1}", "missing before {a=1}"),
        ("alpha{a=1", "a '{' that nothing closes"),
        ("alpha{a={1}}", "a '{' inside of another"),
        ("alpha}", "a '}' that nothing opens"),
        ("alpha{a=1}beta", "a comma is missing after 'alpha{a=1}'"),
        ("alpha{a=1}..gamma", "put a comma after 'alpha{a=1}', and begin the range with the pass"),
        ("alpha{1}", "alpha: '1' is not OPTION=VALUE"),
        ("alpha{a=1 a=2}", "alpha: a is given twice"),
        ("gamma..alpha", "gamma..alpha: alpha comes before gamma; turn it round"),
        ("alpha..beat", "no pass 'beat'; did you mean 'beta'?"),
        ("alpha..{a=1}", "options belong to a pass, not to 'alpha..'"),
    ],
)
def test_text_that_is_no_pipeline(text, message):
    with pytest.raises(OptionError) as error:
        parse_pipeline(text, KNOWN)
    assert message in str(error.value)


# Options


def test_options_are_read_as_the_type_of_their_field():
    text = "halve{factor=2 names=a,b really=false times=3 note=x}"
    (step,) = halving().select(text)
    assert step.rewrite.options == Halve.Options(2.0, ("a", "b"), False, 3, "x")


def test_options_describe_themselves():
    factor, names, really, times, note = options_of(Halve())
    assert (factor.name, factor.type, factor.default) == ("factor", "number", "0.5")
    assert factor.help == "What biases are multiplied by."
    assert (names.type, names.default, names.help) == (
        "text,…",
        "",
        "Of the biases; by default all.",
    )
    assert (really.type, times.type, times.default, note.default) == (
        "true|false", "integer", "1", "none",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("halve{fcator=2}", "halve has no option 'fcator'; did you mean 'factor'?"),
        ("halve{zzz=2}", "halve has no option 'zzz'; it has factor, names, really, times, note"),
        ("halve{factor=x}", "halve: factor takes a number, not 'x'"),
        ("halve{factor=nan}", "halve: factor takes a number, not 'nan'"),
        ("halve{factor=1e999}", "halve: factor takes a number, not '1e999'"),
        ("halve{factor=}", "halve: factor takes a number, not ''"),
        ("halve{factor=1,2}", "halve: factor takes one value, not 1, 2"),
        ("halve{times=1.5}", "halve: times takes a whole number, not '1.5'"),
        ("halve{really=yes}", "halve: really takes true or false, not 'yes'"),
        ("halve{names=}", "halve: names takes a text, not ''"),
        ("canonicalize{a=1}", "canonicalize has no option 'a', and no others: leave"),
        ("smooth-activations,assign-precision", "needs the plans of assign-precision"),
        ("smooth-activations{alpha=2}", "alpha must be"),
        ("smooth-activations{alph=2}", "has no option 'alph'; did you mean 'alpha'"),
        ("assign-precision,smooth-activations{alpha=2}",
         "smooth-activations: alpha must be numbers from 0 to 1, not (2.0,)"),
        ("assign-precision,smooth-activations{worth=0}", "worth must be above 0, not 0"),
        ("assign-precision{group_size=7}", "group_size 7: must be 16, 32, 64, 128 or 256"),
        ("assign-precision{group_size=32}", "weights have one scale per channel"),
    ],
)  # fmt: skip
def test_options_that_are_refused(text, message):
    with pytest.raises(OptionError) as error:
        halving().select(text)
    assert message in str(error.value)


def test_options_from_python():
    pipeline, options = halving(), {"factor": 3.0}
    pipeline.configure("halve", **options)
    (step,) = (step for step in pipeline if step.name == "halve")
    assert step.rewrite.options.factor == 3.0
    with pytest.raises(OptionError, match="halve has no option 'fact'; did you mean 'factor'"):
        pipeline.configure("halve", fact=1)
    with pytest.raises(OptionError, match="no pass 'halv' in the pipeline; did you mean 'halve'"):
        pipeline.configure("halv", factor=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": "much"}, "smooth-activations: alpha takes a number, not 'much'"),
        ({"alpha": (0.5, None)}, "smooth-activations: alpha takes a number, not None"),
        ({"alpha": True}, "alpha takes a number, not True"),
        ({"worth": (1.0,)}, r"worth takes a number, not \(1.0,\)"),
    ],
)
def test_values_from_python_that_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Pipeline.default("arm-int8").configure("smooth-activations", **options)


@pytest.mark.parametrize("alpha", [0.6, (0.6,), [0.6], ["0.6"]])
def test_values_from_python(alpha):
    pipeline = Pipeline.default("arm-int8")
    pipeline.configure("smooth-activations", alpha=alpha, worth=1)
    pipeline.configure("assign-precision", group_size=None, keep_float="Conv")
    options = {step.name: getattr(step.rewrite, "options", None) for step in pipeline}
    assert options["smooth-activations"].alpha == (0.6,)
    assert options["assign-precision"].keep_float == ("Conv",)


def test_a_pass_may_be_named_twice_with_other_options():
    first, second = halving().select("halve{factor=2},halve")
    assert (first.rewrite.options.factor, second.rewrite.options.factor) == (2.0, 0.5)


def test_options_have_an_effect():
    for options, quantized in (("", True), ("{keep_float=MatMul}", False)):
        pipeline = Pipeline.parse(f"..fuse-gelu,assign-precision{options},insert-qdq", "arm-int8")
        ops = {node.op_type for node in pipeline.run(mlp()).graph}
        assert ("QuantizeLinear" in ops) == quantized


# The pipeline


def test_parse_asks_for_what_a_pass_needs():
    assert [step.name for step in Pipeline.parse("fold-qdq,canonicalize")] == [
        "fold-qdq", "canonicalize",
    ]  # fmt: skip
    with pytest.raises(OptionError, match="fuse-norms depends on the target: add --target TARGET"):
        Pipeline.parse("fuse-norms")
    with pytest.raises(OptionError, match="unknown target 'x86-int9'.*did you mean 'x86-int8'"):
        Pipeline.parse("fuse-norms", "x86-int9")
    with pytest.raises(OptionError, match="insert-qdq needs the plans of assign-precision"):
        Pipeline.parse("insert-qdq,assign-precision", "x86-int8")


def test_plans_come_before_the_first_pass_that_needs_them():
    pipeline = Pipeline.parse("canonicalize,smooth-activations,insert-qdq", "x86-int8")
    assert [step.name for step in pipeline] == [
        "canonicalize", "assign-precision", "smooth-activations", "insert-qdq",
    ]  # fmt: skip
    assert pipeline.notes[0].startswith("assign-precision runs before smooth-activations")
    assert pipeline.up_to(Stage.FLOAT).notes == pipeline.notes
    named = Pipeline.parse("assign-precision,insert-qdq", "x86-int8")
    assert [step.name for step in named] == ["assign-precision", "insert-qdq"]
    assert not named.added


def test_up_to_a_stage():
    pipeline = Pipeline.default("arm-int8")
    assert [step.name for step in pipeline.up_to(Stage.QDQ)][-1] == "round-to-nearest"
    assert len(pipeline.up_to(Stage.KERNEL).steps) == len(pipeline.steps)
    with pytest.raises(OptionError, match="nothing to do up to stage float: fold-qdq, the first"):
        Pipeline.parse("fold-qdq").up_to(Stage.FLOAT)


def test_a_pass_for_floats_may_run_late():
    pipeline = Pipeline.default("arm-int8")
    pipeline.steps.append(Step("late", Halve(), Stage.FLOAT))
    pipeline.run(mlp())

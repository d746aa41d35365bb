import dataclasses
import re

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import mlp
from golden import model_of, run
from onnxscript import rewriter

import qcompiler
from qcompiler.bundle import Manifest
from qcompiler.ir.errors import CalibrationError, NumericsError, OptionError
from qcompiler.ir.stages import Stage
from qcompiler.numerics import CheckNumerics
from qcompiler.passes.options import options_of
from qcompiler.pipeline import Pipeline, Step
from qcompiler.pipeline_text import PassText, parse_pipeline
from qcompiler.recipe import Recipe
from qcompiler.samples import Samples
from qcompiler.step import Watcher, as_pass
from qcompiler.watch import DumpModels, PrintAfter, check_dumps

KNOWN = ("alpha", "beta", "gamma")
FEEDS = {"x": np.random.default_rng(1).standard_normal((5, 64), dtype=np.float32)}


class Halve(ir.passes.InPlacePass):
    """Multiplies every bias: a pass in ten lines, with an option."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """By how much.

        Attributes:
            factor: What biases are multiplied
                by.
            names: Of the biases; by default all.
            really: Whether at all.
        """

        factor: float = 0.5
        names: tuple[str, ...] | None = None
        really: bool | None = None
        times: int = 1
        note: str = "none"

    def __init__(self, options=None):
        super().__init__()
        self.options = options or self.Options()

    def call(self, model):
        for value in model.graph.initializers.values():
            if len(value.shape) == 1 and value.dtype is ir.DataType.FLOAT:
                array = value.const_value.numpy() * np.float32(self.options.factor)
                value.const_value = ir.tensor(array, name=value.name)
        return ir.passes.PassResult(model, True)


def halving(target="arm-int8"):
    pipeline = Pipeline.default(target)
    pipeline.insert_after("fuse-gelu", "halve", Halve())
    return pipeline


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
        ("smooth-activations{alpha=0.2}", "needs the plans of assign-precision"),
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


def negated_twice(op, x):
    return op.Neg(op.Neg(x))


def identity(op, x):
    return op.Identity(x)


def sum_with_itself(op, x):
    return op.Mul(x, op.Constant(value_float=2.0))


RULE = rewriter.RewriteRule(negated_twice, identity)


@pytest.mark.parametrize("rules", [RULE, [RULE], rewriter.RewriteRuleSet([RULE])])
def test_rewrite_rules_are_passes(rules):
    model = model_of("g (float[2] x) => (float[2] y) { a = Neg (x) b = Neg (a) y = Relu (b) }")
    pipeline = Pipeline.default("arm-int8")
    pipeline.insert_before("canonicalize", "negations", rules)
    assert [node.op_type for node in pipeline.run(model).graph] == ["Relu"]


def test_values_that_a_rule_makes_get_names():
    double = rewriter.RewriteRule(lambda op, x: op.Add(x, x), sum_with_itself)
    model = model_of("g (float[2] x) => (float[2] y) { a = Add (x, x) y = Relu (a) }")
    pipeline = Pipeline.default("arm-int8")
    pipeline.insert_after("canonicalize", "double", double)
    feeds = {"x": np.array([1.0, -2.0], np.float32)}
    np.testing.assert_array_equal(run(pipeline.run(model), feeds)[0], [2.0, 0.0])


def test_an_empty_list_of_rules_is_refused():
    with pytest.raises(OptionError, match="a list of rewrite rules is empty"):
        Pipeline.default("arm-int8").replace("fuse-gelu", [])


class Rule(rewriter.RewriteRuleClassBase):
    """A rule as a class."""

    def pattern(self, op, x):
        return op.Neg(op.Neg(x))

    def rewrite(self, op, x):
        return op.Identity(x)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (negated_twice, "negated_twice.* is no pass: give an onnx_ir.passes.PassBase, or rules of"),
        (None, "the pass to be called 'new' is missing"),
        ("fold-qdq", "is no pass"),
        ([RULE, None], "^None is no pass"),
        (Halve, r"give a pass, not its class: Halve\(\)"),
        (Rule(), r"give the rule of Rule: Rule.rule\(\)"),
        (Rule, r"give the rule of Rule: Rule.rule\(\)"),
    ],
)
def test_what_is_no_pass(given, message):
    pipeline = Pipeline.default("arm-int8")
    for change in (pipeline.insert_before, pipeline.insert_after):
        with pytest.raises(OptionError, match=message):
            change("fold-qdq", "new", given)
    with pytest.raises(OptionError, match="is no pass" if given is None else message):
        pipeline.replace("fold-qdq", given)


def test_a_pass_without_a_name_is_called_as_its_class():
    class RoundQDQTwice(Halve):
        """Of another name."""

    passes = Pipeline.default("arm-int8").insert_after("fold-qdq", RoundQDQTwice())
    passes = passes.insert_before("fold-qdq", Halve()).remove("fuse-gelu")
    passes = passes.configure("halve", factor=1.0).replace("round-qdq-twice", Halve())
    names = [step.name for step in passes]
    assert names[names.index("fold-qdq") - 1 :][:3] == ["halve", "fold-qdq", "round-qdq-twice"]
    assert "fuse-gelu" not in names
    assert repr(passes).startswith("Pipeline(canonicalize, widen-floats, ")
    with pytest.raises(OptionError, match="rules have no name of their own: give one before them"):
        passes.insert_after("fold-qdq", RULE)
    with pytest.raises(OptionError, match="has a pass 'halve'"):
        passes.insert_after("fold-qdq", Halve())
    with pytest.raises(OptionError, match="3 is no pass"):
        passes.insert_after("fold-qdq", 3)


def test_names_of_passes_are_their_own():
    pipeline = halving()
    with pytest.raises(OptionError, match="has a pass 'halve': give the new one another name, or"):
        pipeline.insert_before("fold-qdq", "halve", Halve())
    with pytest.raises(OptionError, match="the name of a pass is a text, not <"):
        pipeline.insert_before("fold-qdq", Halve(), "halve")
    with pytest.raises(OptionError, match="no pass 3 in the pipeline"):
        pipeline.remove(3)


def stumble(graph):
    raise ValueError("a stone")


def test_what_a_pass_raises_comes_with_its_name():
    steps = [Step("walk", Break(stumble), Stage.FLOAT)]
    with pytest.raises(ir.passes.PassError, match="^walk: ValueError: a stone$") as error:
        Pipeline(steps).run(mlp())
    assert isinstance(error.value.__cause__, ValueError)


def test_arguments_of_a_pipeline_are_checked(tmp_path):
    with pytest.raises(OptionError, match="target must be a name or a Target, not 5"):
        Pipeline.default(5)
    with pytest.raises(OptionError, match="recipe must be a qcompiler.Recipe, not {'smooth'"):
        Pipeline.default("x86-int8", {"smooth": False})
    with pytest.raises(OptionError, match=r"an onnx_ir.Model, not 'm.onnx': onnx_ir.load\(path"):
        halving().run("m.onnx")
    with pytest.raises(OptionError, match="watchers: 'x' is no qcompiler.step.Watcher"):
        halving().run(mlp(), watchers=["x"])
    for options, message in (
        ({"watchers": ["x"]}, "watchers: 'x' is no"),
        ({"watchers": 3}, "watchers must be a list of watchers, not 3"),
        ({"stop_after": "qdk"}, "must be one of float, qdq, quantized, kernel, not 'qdk'"),
        ({"stop_after": 2}, "stop_after must be one of .*, not 2"),
    ):
        with pytest.raises(OptionError, match=message):
            qcompiler.compile(mlp(), "arm-int8", tmp_path / "b", **options)


# Watchers


class Note(Watcher):
    """Remembers what it is told."""

    def __init__(self):
        self.told = []

    def start(self, steps, model):
        self.told.append(("start", len(steps)))

    def before(self, step, model):
        self.told.append((step.name, len(model.graph)))

    def after(self, step, model, changed):
        self.told.append((step.name, len(model.graph), changed))


def test_watchers_see_the_model_before_and_after():
    model = model_of("g (float[2] x) => (float[2] y) { a = Neg (x) b = Neg (a) y = Relu (b) }")
    note = Note()
    pipeline = Pipeline([Step("negations", as_pass([RULE]), Stage.FLOAT)])
    pipeline.run(model, watchers=[Watcher(), note])
    assert note.told == [("start", 1), ("negations", 3), ("negations", 2, True)]


def test_print_after():
    texts = []
    Pipeline.default("arm-int8").run(
        mlp(), watchers=[PrintAfter(["fuse-gelu", "fold-qdq"], texts.append)]
    )
    assert texts[0].startswith("# after fuse-gelu, which changed nothing\n")
    assert "QMatMulW8A8" in texts[1]
    assert len(texts) == 2
    with pytest.raises(
        OptionError, match="print after 'fold-qdg': no such pass runs; did you mean"
    ):
        Pipeline.default("arm-int8").run(mlp(), watchers=[PrintAfter(["fold-qdg"], print)])


def test_dumps_run_and_share_their_weights(tmp_path):
    expected = run(mlp(), FEEDS)[0]
    pipeline = Pipeline.default("arm-int8")
    for _ in range(2):  # the second run replaces the files of the first
        pipeline.run(mlp(), watchers=[DumpModels(tmp_path / "dumps")])
    files = sorted(file.name for file in (tmp_path / "dumps").iterdir())
    assert files[:2] == ["00-source.onnx", "01-canonicalize.onnx"]
    assert files[-3:] == [
        f"{len(pipeline.steps)}-bind-kernels.onnx", "qcompiler-dump.txt", "weights.data",
    ]  # fmt: skip
    for name in files[:-2]:
        session = ort.InferenceSession(tmp_path / "dumps" / name)
        assert np.abs(session.run(None, FEEDS)[0] - expected).max() < 0.05 * np.abs(expected).max()
    floats = sum(value.const_value.nbytes for value in mlp().graph.initializers.values())
    assert (tmp_path / "dumps" / "weights.data").stat().st_size < 1.5 * floats


def test_dumps_do_not_replace_other_files(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(OptionError, match=r"for dumps holds other files \(thesis.txt\); name"):
        Pipeline.default("arm-int8").run(mlp(), watchers=[DumpModels(tmp_path)])
    with pytest.raises(OptionError, match="cannot write to .*thesis.txt"):
        Pipeline.default("arm-int8").run(mlp(), watchers=[DumpModels(tmp_path / "thesis.txt")])


def test_dumps_keep_away_from_the_model(tmp_path):
    for name in ("00-mine.onnx", "weights.data"):  # named like dumps, which they are not
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(OptionError, match=f"holds other files .{name}"):
            Pipeline([]).run(mlp(), watchers=[DumpModels(folder)])
        assert (folder / name).read_text() == "mine"
    Pipeline([]).run(mlp(), watchers=[DumpModels(tmp_path / "dumps")])
    source = tmp_path / "dumps" / "00-source.onnx"
    before = source.read_bytes()
    with pytest.raises(OptionError, match="for dumps and the weights .*lie in one another; name"):
        Pipeline([]).run(ir.load(source), watchers=[DumpModels(tmp_path / "dumps")])
    for file, output, what in ((source, tmp_path / "out", "model"),
                               (tmp_path / "m.onnx", tmp_path / "dumps" / "out", "output"),
                               (tmp_path / "m.onnx", tmp_path, "output")):  # fmt: skip
        with pytest.raises(OptionError, match=f"for dumps and the {what} .* lie in one another"):
            check_dumps([DumpModels(tmp_path / "dumps")], file, output)
    assert source.read_bytes() == before


# Numerics


@pytest.fixture
def samples(tmp_path):
    file = tmp_path / "samples.npz"
    np.savez(file, **FEEDS)
    return file


def test_numerics_of_the_default_passes(samples):
    numerics = CheckNumerics(samples)
    Pipeline.default("arm-int8").run(mlp(), watchers=[numerics])
    changes = {change.step: change for change in numerics.changes}
    assert [step for step, change in changes.items() if change.rounds] == [
        "widen-floats", "round-tables", "awq", "hqq", "gptq", "insert-qdq", "round-to-nearest",
        "convert-float16",
    ]  # fmt: skip
    assert not changes["convert-float16"].changed
    assert not changes["fuse-gelu"].changed
    assert changes["assign-precision"].sqnr is None
    assert 30 < changes["insert-qdq"].sqnr < 60
    assert changes["insert-qdq"].max_error > 0
    assert changes["fold-qdq"].sqnr is None or changes["fold-qdq"].sqnr > 60
    assert 30 < changes["bind-kernels"].sqnr_since_source < 60


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (
            {},
            r"^halve changes output 'y' to \d+\.\d dB, less than 60, by at most .* --numerics-bou",
        ),
        (
            {"bound": 0.0, "rounding_bound": 70.0},
            "^insert-qdq changes .*than 70.*set --rounding-bo",
        ),
    ],
)
def test_a_jump_names_its_pass(samples, bounds, message):
    with pytest.raises(NumericsError, match=message):
        halving().run(mlp(), watchers=[CheckNumerics(samples, **bounds)])


def test_a_quantized_model_may_decide_ties_otherwise(samples):
    pipeline = Pipeline.default("arm-int8").select("canonicalize..round-to-nearest")
    quantized = pipeline.run(mlp())
    numerics = CheckNumerics(samples)
    scaled = Step("scale", Halve(Halve.Options(factor=1.02)), Stage.QDQ)
    Pipeline([scaled]).run(quantized, watchers=[numerics])
    assert 15 < numerics.changes[0].sqnr < 60


class Break(ir.passes.InPlacePass):
    """Does to the graph what its first argument says."""

    changes_interface = True

    def __init__(self, change):
        super().__init__()
        self.change = change

    def call(self, model):
        self.change(model.graph)
        return ir.passes.PassResult(model, True)


def rename(graph):
    graph.outputs[0].name = "z"


def infinite(graph):
    graph.initializers["d"].const_value = ir.tensor(np.full(64, np.inf, np.float32), name="d")


def narrow(graph, axis=1):
    axes = ir.Value(name="axes", const_value=ir.tensor(np.array([axis]), name="axes"))
    graph.register_initializer(axes)
    total = ir.node("ReduceSum", [graph.outputs[0], axes], name="total")
    total.outputs[0].name = "total"
    graph.append(total)
    old, graph.outputs[0] = graph.outputs[0], total.outputs[0]
    old.name, total.outputs[0].name = "inner", "y"


def leave_the_axes(graph):
    narrow(graph, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"break renames outputs: \['y'\] become \['z'\]"),
        (leave_the_axes, "after break the model runs no more: ONNX Runtime cannot load"),
        (infinite, "break makes 320 values of output 'y' NaN or Inf"),
        (narrow, r"break changes the shape of output 'y' from \[5, 64\] to \[5, 1\]"),
    ],
)
def test_a_pass_that_breaks_the_model_is_named(samples, change, message):
    pipeline = Pipeline([Step("break", Break(change), Stage.FLOAT)])
    with pytest.raises(NumericsError, match=message):
        pipeline.run(mlp(), watchers=[CheckNumerics(samples)])


def test_samples_and_bounds_are_checked(tmp_path):
    with pytest.raises(CalibrationError, match="no samples: .*nowhere does not exist"):
        CheckNumerics(tmp_path / "nowhere")
    np.savez(tmp_path / "s.npz", z=np.zeros(3))
    with pytest.raises(OptionError, match=re.escape("a bound is a number of dB, not nan")):
        CheckNumerics(tmp_path / "s.npz", bound=float("nan"))
    with pytest.raises(CalibrationError, match="s.npz .* has no array for input 'x', only"):
        Pipeline([]).run(mlp(), watchers=[CheckNumerics(tmp_path / "s.npz")])


def nothing():
    return []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (nothing, "nothing.* no samples|no samples.*nothing"),
        (lambda: [FEEDS["x"][:0]], "checks no numerics: all outputs on it are empty"),
    ],
)
def test_numerics_need_something_to_compare(source, message):
    with pytest.raises(CalibrationError, match=message):
        Pipeline([]).run(mlp(), watchers=[CheckNumerics(Samples(source))])


def test_a_jump_of_a_quantized_model_mentions_ties(samples):
    quantized = Pipeline.default("arm-int8").select("..round-to-nearest").run(mlp())
    scaled = Step("scale", Halve(Halve.Options(factor=1.5)), Stage.QDQ)
    with pytest.raises(NumericsError, match=r"if that may be .ties between two steps may cost"):
        Pipeline([scaled]).run(quantized, watchers=[CheckNumerics(samples)])


# From Python, a whole compilation


def test_compile_takes_text_watchers_and_a_stage(tmp_path):
    texts = []
    report = qcompiler.compile(
        mlp(), "arm-int8", tmp_path / "model.onnx", pipeline="..fold-qdq", stop_after="qdq",
        watchers=[PrintAfter(["round-to-nearest"], texts.append)],
    )  # fmt: skip
    assert report.bundle == tmp_path / "model.onnx"
    assert "QuantizeLinear" in {node.op_type for node in ir.load(report.bundle).graph}
    assert len(texts) == 1
    with pytest.raises(OptionError, match=r"give output=\.\.\.: only a model from a file has"):
        qcompiler.compile(mlp(), "arm-int8", stop_after=Stage.QDQ)
    with pytest.raises(OptionError, match="a pipeline of your own chooses nothing"):
        qcompiler.compile(
            mlp(), "arm-int8", tmp_path / "b", pipeline=Pipeline([]), shapes={"x": (1, 64)}
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": Recipe()}, r"give it to Pipeline.default\(target, recipe\)"),
        ({"calibration": "digits/calib"}, "give the samples to Pipeline.default"),
        ({"target": "x86-int8"}, r"made for arm-int8: .*by Pipeline.default\('x86-int8'\)"),
    ],
)
def test_a_pipeline_of_one_s_own_is_complete(tmp_path, options, message):
    arguments = {"target": "arm-int8", "output": tmp_path / "b", "pipeline": halving()} | options
    with pytest.raises(OptionError, match=message):
        qcompiler.compile(mlp(), **arguments)


def test_the_manifest_has_the_recipe_of_the_pipeline(tmp_path):
    recipe = Recipe(keep_float=("MatMul",))
    pipeline = Pipeline.default("arm-int8", recipe)
    report = qcompiler.compile(mlp(), "arm-int8", tmp_path / "b", pipeline=pipeline)
    written = Recipe.from_dict(Manifest.read(report.bundle).recipe)
    assert written == pipeline.effective_recipe
    assert dataclasses.replace(written, passes={}) == dataclasses.replace(recipe, float="fp32")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("..fuse-gelu", {"recipe": Recipe(keep_float=("x",))}, "keep_float is for assign-precis"),
        ("..fuse-gelu", {"recipe": Recipe(group_size=32)}, "group_size is for assign-precision, w"),
        ("..fold-qdq", {"recipe": Recipe(attention="float32")}, "attention is for fuse-attention"),
        ("fold-qdq", {"recipe": Recipe(calibration="min-max")}, "calibration is for insert-qdq, "),
        ("..fuse-gelu", {"recipe": Recipe(nodes=({"precision": "int8"},))}, "nodes is for assign-"),
        (
            "fold-qdq",
            {"recipe": Recipe(passes={"smooth-activations": {"worth": 0.5}})},
            "passes: smooth-activations is for smooth-activations, which the pipeline leaves out",
        ),
        ("fold-qdq", {"shapes": {"x": (1, 64)}}, "leaves out: add choose-kernels to it, or leave"),
    ],
)
def test_a_text_that_leaves_out_the_reader_of_an_option(tmp_path, text, options, message):
    target = "x86-int4" if "group" in message else "x86-int8"
    with pytest.raises(OptionError, match=message):
        qcompiler.compile(mlp(), target, tmp_path / "b", pipeline=text, timing=False, **options)

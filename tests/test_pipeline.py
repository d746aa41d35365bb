"""Passes and rules in a pipeline, and pipelines in a compilation."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from conftest import mlp
from golden import model_of, run
from onnxscript import rewriter
from pipelines import RULE, Break, Halve, halving, negated_twice, sum_with_itself

import qcompiler
from qcompiler.bundle import Manifest
from qcompiler.ir.errors import OptionError
from qcompiler.ir.stages import Stage
from qcompiler.pipeline import Pipeline, Step
from qcompiler.recipe import Recipe
from qcompiler.watch import PrintAfter


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


OLD_PAIRS = """
g (float[2,6] x) => (float[2,4] y)
{ q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) dw = DequantizeLinear (w, s)
  h = MatMul (d, dw) qh = QuantizeLinear (h, s, z) y = DequantizeLinear (qh, s, z) }
"""


def test_a_model_of_an_older_opset_is_made_canonical_before_our_passes():
    weights = {"s": np.float32(0.1), "z": np.uint8(9), "w": np.ones((6, 4), np.int8)}
    model = model_of(OLD_PAIRS, weights)
    model.opset_imports[""] = 13
    feeds = {"x": np.ones((2, 6), np.float32)}
    expected = run(model, feeds)[0]
    pipeline = Pipeline.parse("fold-qdq")
    model = pipeline.run(model)
    assert any(node.op_type.startswith("QMatMul") for node in model.graph)
    np.testing.assert_array_equal(run(model, feeds)[0], expected)
    assert pipeline.notes == (
        "canonicalize runs before fold-qdq: what that writes may need opset 21, and the model has "
        "13",
    )


def test_passes_of_others_take_older_models_as_they_are():
    model = model_of("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    model.opset_imports[""] = 13
    assert Pipeline([Step("halve", Halve(), Stage.FLOAT)]).run(model).opset_imports[""] == 13
    pipeline = Pipeline.parse("canonicalize,fuse-gelu").replace("canonicalize", Halve())
    assert pipeline.run(model).opset_imports[""] == 13


def test_a_node_without_a_name_is_told_by_what_it_makes():
    text = "g (float[2,8,6,6] x) => (float[2,4,4,4] y) { c = Conv (x, k) r = Relu (c) y = Exp (r) }"
    model = model_of(text, {"k": np.ones((4, 8, 3, 3), np.float32)})
    model.graph.node(0).name = None
    with pytest.raises(OptionError, match="the input of \"Conv of 'c'\", whose step its bias"):
        Pipeline.parse("assign-precision,round-to-nearest", "arm-int8").run(model)

"""Recipes as files: what is refused, options of passes, and the way back to TOML."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import mlp
from terminal import ARM, MODEL, fails, qcompile

import qcompiler
from qcompiler.bundle import Manifest
from qcompiler.ir.errors import OptionError
from qcompiler.passes.node_rules import ACTIVATIONS, PRECISIONS, ROUNDINGS, NodeRule
from qcompiler.pipeline import Pipeline
from qcompiler.recipe import Recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[node]]\nprecision = 'int8'", "unknown key 'node'; did you mean 'nodes'"),
        ("nodes = 'all'", r"nodes must be a list of rules, \[\[nodes\]\] in TOML, not 'all'"),
        ("nodes = [1]", "rule 1 of nodes: must be a table, not 1"),
        ("[[nodes]]\nprecison = 'int8'", "unknown key 'precison'; did you mean 'precision'"),
        ("[[nodes]]\nbits = 8", "unknown key 'bits'; the keys are match, op, precision,"),
        ("[[nodes]]\nmatch = 'a'", "it says nothing of the nodes: give precision, group_size"),
        ("[[nodes]]\nmatch = 3\nprecision = 'int8'", "match must be a text, not 3"),
        ("[[nodes]]\nmatch = ''\nprecision = 'int8'", "match must be a text, not ''"),
        ("[[nodes]]\nmatch = 're:('\nprecision = 'int8'", r"'re:\(' is no regular expression: mis"),
        ("[[nodes]]\nop = ['Conv']\nprecision = 'int8'", r"op must be a text, not \['Conv'\]"),
        ("[[nodes]]\nprecision = 'int5'", "unknown precision 'int5'; did you mean 'int"),
        ("[[nodes]]\nprecision = 8", "precision must be a text, not 8"),
        ("[[nodes]]\ngroup_size = 33", "group_size 33: must be 16, 32, 64, 128 or 256"),
        ("[[nodes]]\nzero_points = 1", "zero_points must be a text, not 1"),
        ("[[nodes]]\nactivation = 'statik'", "unknown activation 'statik'; did you mean 'static'"),
        (
            "[[nodes]]\nrounding = 'up'",
            "unknown rounding 'up'; one of nearest, hqq, awq, gptq, awq",
        ),
        ("[[nodes]]\ncalibration = 'mean'", "rule 1 of nodes: unknown calibration method 'mean'"),
        ("passes = 3", r"passes must be tables, \[passes.NAME\] in TOML, not 3"),
        ("[passes]\nsmooth-activations = 1", "passes: smooth-activations must be a table of opt"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(OptionError, match=f"{path}: .*{message}|{path}: {message}"):
        Recipe.read(path)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ({"smooth-activation": {}}, "no pass 'smooth-activation'; did you mean 'smooth-activatio"),
        ({"smoth-quant": {}}, "no pass 'smoth-quant'; did you mean 'smooth-quant'"),
        ({"x": {}}, "passes: no pass 'x'; one of canonicalize, widen-fl"),
        ({"smooth-activations": {"alfa": [0.5]}}, "no option 'alfa'; did you mean 'alpha'"),
        ({"smooth-activations": {"alpha": ["half"]}}, "alpha takes a number, not 'half'"),
        ({"smooth-activations": {"worth": True}}, "worth takes a number, not True"),
        ({"smooth-activations": {"worth": -1}}, "worth must be above 0, not -1"),
        ({"canonicalize": {"fast": True}}, "canonicalize has no option 'fast', and no others"),
        ({"assign-precision": {"group_size": 32}}, "group_size is what the recipe calls group_siz"),
        ({"fuse-attention": {"precision": "int8"}}, "precision is what the recipe calls attention"),
    ],
)
def test_bad_options_of_passes(passes, message):
    with pytest.raises(OptionError, match=message):
        Pipeline.default("x86-int8", Recipe(passes=passes))


def test_a_pass_that_another_key_leaves_out():
    with pytest.raises(OptionError, match="'smooth-quant' is left out by smooth = false"):
        Pipeline.default("x86-int8", Recipe(smooth=False, passes={"smooth-quant": {"worth": 1.0}}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[passes.smooth-activations]\nalph = [0.5]",
            "smooth-activations has no option 'alph'",
        ),
        ("[passes.smooth-activations]\nalpha = [2.0]", "smooth-activations: alpha must be numbers"),
        ("[passes.smooth-activations]\nalpha = 'x'", "smooth-activations: alpha takes a number"),
        ("[passes.fold-qqd]\nx = 1", "no pass 'fold-qqd'; did you mean 'fold-qdq'"),
        (
            "[passes.assign-precision]\ngroup_size = 32",
            "assign-precision: group_size is what",
        ),
    ],
)
def test_what_is_wrong_with_options_of_passes_names_the_file(tmp_path, text, said):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(OptionError, match=re.escape(f"{file}: passes: {said}")):
        Pipeline.default("x86-int8", Recipe.read(file))


def test_where_a_recipe_was_read_is_no_part_of_it(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("group_size = 64")
    recipe = Recipe.read(file)
    assert recipe == Recipe(group_size=64)
    assert recipe.to_dict() == Recipe(group_size=64).to_dict()
    with pytest.raises(OptionError, match="unknown key 'source'"):
        Recipe.from_dict({"source": "x"})


def test_options_reach_their_pass_also_by_another_name():
    for name in ("smooth-activations", "smooth-quant"):
        recipe = Recipe(passes={name: {"alpha": [0.25, 1], "worth": 1}})
        pipeline = Pipeline.default("x86-int8", recipe)
        (step,) = (step for step in pipeline if step.name == "smooth-activations")
        assert (step.rewrite.options.alpha, step.rewrite.options.worth) == ((0.25, 1), 1)
    usual = Pipeline.default("x86-int8").effective_recipe.passes["smooth-activations"]
    assert usual["worth"] == 0.75


ODD = Recipe(
    keep_float=("a b", 'quo"te', "back\\slash"),
    calibration="percentile=99.9",
    nodes=(
        {"match": "/a/\U0001f600\x7f\n[0]*", "precision": "int8", "zero_points": "none"},
        {"op": "MatMul", "group_size": 32},
    ),
    passes={"smooth-activations": {"alpha": [0.5, 1e-7], "worth": 1}, "a.b": {"c": "d"}},
)


@pytest.mark.parametrize("recipe", [Recipe(), ODD, Pipeline.default("x86-int4").effective_recipe])
def test_toml_and_back(tmp_path, recipe):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.read(path) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_bundle_is_a_recipe_that_gives_the_same_bytes(tmp_path):
    recipe = Recipe(
        nodes=({"op": "MatMul", "precision": "int4"}, {"match": "node_3", "group_size": 16}),
        passes={"smooth-activations": {"alpha": [0.5]}},
    )
    first = qcompiler.compile(mlp(), "x86-int8", tmp_path / "a", recipe=recipe).bundle
    written = Recipe.read(first)
    assert written == Recipe.read(first / "manifest.json")
    assert written.passes["smooth-activations"]["alpha"] == (0.5,)
    second = qcompiler.compile(mlp(), "x86-int8", tmp_path / "b", recipe=written).bundle
    toml = tmp_path / "recipe.toml"
    toml.write_text(written.to_toml())
    third = qcompiler.compile(mlp(), "x86-int8", tmp_path / "c", recipe=Recipe.read(toml)).bundle
    for file in sorted(first.iterdir()):
        for other in (second, third):
            assert (other / file.name).read_bytes() == file.read_bytes(), file.name


def test_rules_and_options_in_a_bundle_without_kernels(tmp_path):
    recipe = Recipe(nodes=({"op": "MatMul", "precision": "int4"},))
    made = qcompiler.compile(mlp(), "x86-int8", tmp_path / "a", recipe=recipe)
    ops = {decision.op for decision in made.decisions}
    assert any(op.startswith("QMatMulW4A8") or "QMatMulW4A8" in op for op in ops), ops
    feed = {"x": np.ones((3, 64), np.float32)}
    assert np.isfinite(qcompiler.load(made.bundle).run(None, feed)[0]).all()


def test_a_recipe_s_notes_are_reported(tmp_path):
    rules = ({"op": "MatMul", "precision": "int4"}, {"precision": "int8"})
    made = qcompiler.compile(mlp(), "arm-int8", tmp_path / "a", recipe=Recipe(nodes=rules))
    assert any("rule 1 (op 'MatMul') has no effect" in note for note in made.notes)


def test_the_documentation_has_every_key_and_value():
    text = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text()
    for example in re.findall(r"```toml\n(.*?)```", text, re.DOTALL):
        recipe = Recipe.from_dict(tomllib.loads(example))
        Pipeline.default("x86-int4", recipe)
    rows = {key: row for row in text.split("\n") for key in re.findall(r"^\| `(\w+)` \|", row)}
    rules = [field.name for field in dataclasses.fields(NodeRule)]
    assert {*Recipe.names_of_keys(), *rules} - set(rows) == {"nodes", "passes"}
    for key, words in {
        "precision": PRECISIONS, "activation": ACTIVATIONS, "rounding": ROUNDINGS,
    }.items():  # fmt: skip
        assert re.findall(r'`"(\w+)"`', rows[key].split("|")[2]) == list(words), key


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text(
        '[[nodes]]\nop = "MatMul"\nprecision = "int4"\ngroup_size = 16\n'
        "[passes.smooth-activations]\nalpha = [0.5]\n"
    )
    assert qcompile(MODEL, *ARM, "--recipe", "r.toml", "-o", "a", "-q").exit_code == 0
    shown = " ".join(qcompile("inspect", "a").stdout.split())
    assert "1 rule for nodes" in shown
    assert "smooth-activations: alpha = [0.5]" in shown
    assert "worth" not in shown
    Path("s.toml").write_text(qcompile("inspect", "a", "--recipe").stdout)
    assert Recipe.read("s.toml") == Recipe.read("a")
    for recipe in ("a", "a/manifest.json", "s.toml"):
        made = qcompile(MODEL, "--target", "arm-int8", "--recipe", recipe, "-o", "b", "-q")
        assert made.exit_code == 0, made.output
        assert Manifest.read(Path("b")) == Manifest.read(Path("a"))
    usual = qcompile(MODEL, *ARM, "-o", "c", "-q")
    assert usual.exit_code == 0
    assert "keep_float = ['Conv']" in " ".join(qcompile("inspect", "c").stdout.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", MODEL, "--recipe"], "is no bundle: only those have a recipe"),
        ([MODEL, *ARM, "--recipe", "."], ". is not a bundle: it has no manifest.json"),
    ],
)
def test_recipes_of_what_is_no_bundle(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    fails(1, message, *args)

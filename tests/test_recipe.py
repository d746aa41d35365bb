"""Rules and pass options of a recipe: what they do, what is refused, and the way back to TOML."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import mlp
from golden import model_of
from terminal import ARM, MODEL, fails, qcompile

import qcompiler
from qcompiler.bundle import Manifest
from qcompiler.ir.decisions import decision_of, plan_of
from qcompiler.ir.errors import OptionError
from qcompiler.ir.types import PerAxis, PerGroup
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.node_names import names_of
from qcompiler.passes.node_rules import ACTIVATIONS, PRECISIONS, ROUNDINGS, NodeRule
from qcompiler.pipeline import Pipeline
from qcompiler.recipe import Recipe
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
TWO = (
    "g (float[m,64] x) => (float[m,64] y) { a = MatMul (x, v) b = Relu (a) c = MatMul (b, w) "
    "y = Softmax (c) }"
)
WEIGHTS = {name: RNG.standard_normal((64, 64), dtype=np.float32) for name in ("v", "w")}
CONV = (
    "g (float[1,16,8,8] x) => (float[1,16,8,8] z, float[1,16,8,32] p) "
    "{ a = Conv (x, k) b = Relu (a) c = Conv (b, k) z = Softmax (c) p = MatMul (x, t) }"
)
KERNELS = {
    "k": RNG.standard_normal((16, 16, 1, 1), dtype=np.float32),
    "t": RNG.standard_normal((8, 32), dtype=np.float32),
}
NAMES = ("up", "act", "down", "soft")


def assigned(rules, target="x86-int8", model=None, keep=(), names=NAMES, **options):
    """The nodes of a model and the pass that planned them."""
    model = model or model_of(TWO, WEIGHTS)
    for node, name in zip(model.graph, names, strict=False):
        node.name = name
    recipe = Recipe(keep_float=keep, nodes=rules)
    chosen = AssignPrecision.Options(recipe.keep_float, **options)
    rewrite = AssignPrecision(TARGETS[target].scheme, chosen, recipe.nodes)
    rewrite(model)
    return {node.name: node for node in model.graph}, rewrite


def stored(nodes):
    """How the weights of the planned nodes are stored, None where they are float."""
    plans = {name: plan_of(nodes[name]) for name in ("up", "down")}
    return [plan and plan.weight.storage.name.lower() for plan in plans.values()]


@pytest.mark.parametrize(
    ("rules", "want"),
    [
        ([], ["int4", "int4"]),
        ([{"precision": "int8"}], ["int8", "int8"]),
        ([{"match": "up", "precision": "int8"}], ["int8", "int4"]),
        ([{"match": "d*", "precision": "float"}], ["int4", None]),
        ([{"match": "re:(up|down)", "precision": "int8"}], ["int8", "int8"]),
        ([{"match": "re:u|ow", "precision": "float"}, {"precision": "int8"}], "no name"),
        ([{"op": "MatMul", "precision": "int8"}], ["int8", "int8"]),
        ([{"op": "Mat*", "match": "up", "precision": "int8"}], ["int8", "int4"]),
        ([{"match": "up + down", "precision": "int8"}], ["int8", "int8"]),
        (
            [{"op": "MatMul", "precision": "int8"}, {"match": "down", "precision": "int4"}],
            ["int8", "int4"],
        ),
        (
            [{"match": "down", "precision": "float"}, {"op": "MatMul", "precision": "int8"}],
            ["int8", "int8"],
        ),
    ],
)
def test_later_rules_win(rules, want):
    if want == "no name":
        with pytest.raises(OptionError, match="no name of the model fits 're:u|ow'"):
            assigned(rules, "x86-int4")
        return
    assert stored(assigned(rules, "x86-int4")[0]) == want


def test_rules_join_key_by_key():
    rules = [
        {"op": "MatMul", "precision": "int4", "group_size": 64},
        {"match": "down", "group_size": 16},
        {"match": "up", "rounding": "nearest"},
    ]
    nodes, rewrite = assigned(rules)
    up, down = (plan_of(nodes[name]) for name in ("up", "down"))
    assert (up.weight.granularity, down.weight.granularity) == (PerGroup(0, 64), PerGroup(0, 16))
    assert up.activation == down.activation == plan_of(assigned([])[0]["up"]).activation
    assert up.requested and down.requested and not plan_of(assigned([])[0]["up"]).requested
    assert not rewrite.notes


def test_the_forms_of_a_product():
    nodes, _ = assigned([{"match": "up", "precision": "int4", "activation": "float"}])
    assert plan_of(nodes["up"]).activation is None
    assert plan_of(nodes["up"]).weight.granularity == PerGroup(0, 32)
    rules = [{"match": "up", "precision": "int8", "activation": "dynamic"}]
    nodes, _ = assigned(rules, "cuda-int4")
    assert plan_of(nodes["up"]).weight.granularity == PerAxis(1)
    assert plan_of(nodes["up"]).activation.type.granularity == PerGroup(-1, 64)
    nodes, _ = assigned([{"match": "up", "precision": "int8"}], "cuda-fp8")
    assert plan_of(nodes["up"]).activation.type.storage is ir.DataType.INT8
    assert plan_of(nodes["down"]).activation.type.storage is ir.DataType.FLOAT8E4M3FN


@pytest.mark.parametrize(
    ("scopes", "module"),
    [
        ("['', 'm', 'm.layer.0.query', 'linear']", "m.layer.0.query"),
        ("['', 'linear']", ""),
        ("[]", ""),
        ("no list", ""),
        ("{1: 2}", ""),
        ("['', 3, 'linear']", ""),
    ],
)
def test_nodes_of_torch_go_by_their_modules(scopes, module):
    def made():
        model = model_of(TWO, WEIGHTS)
        model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = scopes
        return model

    assert names_of(made().graph[0])[1:] == ([module] if module else [])
    if module:
        rules = [{"match": "*.query", "precision": "int4"}]
        assert stored(assigned(rules, model=made())[0]) == ["int4", "int8"]
        nodes = assigned([], model=made(), keep=("m.layer.?.query",))[0]
        assert decision_of(nodes["up"]).why == "kept float by request (m.layer.?.query)"
        with pytest.raises(OptionError, match=r"did you mean 'm.layer.0.query'"):
            assigned([], model=made(), keep=("m.layer.0.queri",))


def test_what_keeps_float_has_the_last_word():
    nodes, rewrite = assigned([{"match": "up", "precision": "int4"}], keep=("up",))
    assert stored(nodes) == [None, "int8"]
    assert rewrite.notes == (
        "recipe: rule 1 (match 'up') has no effect: what comes later overrules it",
    )


def test_a_rule_that_later_ones_overrule_is_told_of():
    rules = [{"match": "up", "precision": "float"}, {"op": "MatMul", "precision": "int4"}]
    assert "rule 1 (match 'up') has no effect" in assigned(rules)[1].notes[0]
    assert not assigned(rules[::-1])[1].notes


@pytest.mark.parametrize(
    ("rule", "target", "message"),
    [
        ({"match": "dwn", "precision": "int4"}, "x86-int8", "fits 'dwn'; did you mean 'down'"),
        ({"op": "Matmul", "precision": "int4"}, "x86-int8", "no op 'Matmul'; did you mean 'MatMul"),
        ({"op": "Relu", "match": "up", "precision": "float"}, "x86-int8", "none has such a name"),
        ({"op": "Softmax", "precision": "int8"}, "x86-int8", "'soft': Softmax is sensitive"),
        ({"match": "act", "group_size": 32}, "x86-int4", "'act': holds no weights to quantize"),
        (
            {"precision": "fp8"},
            "x86-int8",
            r"rule 1 \(of all nodes\): precision 'fp8' is possible for none of its 4 nodes: 'up': "
            "int8 targets do not multiply fp8",
        ),
        (
            {"precision": "fp8", "activation": "float"},
            "cuda-fp8",
            "fp8 targets multiply no fp8 weights by float activations$",
        ),
        (
            {"group_size": 32},
            "x86-int8",
            'int4 ones have groups, and int8 ones beside activation = "float"$',
        ),
        (
            {"precision": "int8", "activation": "float", "zero_points": "float"},
            "x86-int8",
            "only groups of int4 weights may have zero points",
        ),
        (
            {"precision": "int8", "activation": "float", "scales": "int8"},
            "x86-int4",
            "only scales of int4 groups without integer zero points are stored in 8 bits",
        ),
        ({"calibration": "mse"}, "x86-int8", "activations are dynamic, nothing of them is calibr"),
        (
            {"precision": "int8", "zero_points": "integer"},
            "x86-int4",
            "only groups of int4 weights may have zero points",
        ),
        ({"rounding": "gptq"}, "cuda-fp8", "only integers are rounded otherwise than to nearest"),
    ],
)
def test_a_rule_that_no_node_follows_is_refused(rule, target, message):
    with pytest.raises(OptionError, match=message):
        assigned([rule], target)


def test_a_node_that_cannot_follow_says_so_where_others_can():
    rules = [{"activation": "dynamic"}]
    names = ("one", "act", "two", "soft", "product")
    nodes, rewrite = assigned(rules, model=model_of(CONV, KERNELS), names=names)
    assert plan_of(nodes["product"]).activation.scale == "dynamic"
    assert plan_of(nodes["one"]).activation.scale == "static"
    reason = "activation 'dynamic' of the recipe is not possible: convolutions have static"
    assert reason in decision_of(nodes["one"]).why
    assert not rewrite.notes


def test_a_rule_may_ask_for_static_activations_of_products():
    rules = [{"op": "MatMul", "activation": "static", "calibration": "min-max"}]
    nodes, _ = assigned(rules)
    plan = plan_of(nodes["up"])
    assert str(plan.activation) == "static quant<uint8:float, tensor, asymmetric>"
    assert plan.calibration == "min-max"
    assert plan.output is None


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"precision": "int4"}, "'one': convolutions are int8 or float"),
        ({"activation": "dynamic"}, "'one': convolutions have static activations"),
        ({"group_size": 32}, "'one': these weights have a scale per channel"),
        ({"zero_points": "float"}, "'one': only groups of int4 weights may have zero points"),
    ],
)
def test_what_convolutions_cannot_be(rule, message):
    with pytest.raises(OptionError, match=message):
        assigned([{"op": "Conv", **rule}], model=model_of(CONV, KERNELS), names=("one",))


def test_rules_about_a_model_that_is_quantized():
    text = (
        "g (float[m,64] x) => (float[m,64] y) { q = QuantizeLinear (x, s, z) "
        "d = DequantizeLinear (q, s, z) y = MatMul (d, v) }"
    )
    model = model_of(text, WEIGHTS | {"s": np.float32(0.1), "z": np.uint8(128)})
    with pytest.raises(OptionError, match=r"rule 1 \(op 'MatMul'\): the source is quantized alrea"):
        assigned([{"op": "MatMul", "precision": "int4"}], model=model, names=())


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


def test_calibration_of_single_nodes(tmp_path):
    """The scales of what one convolution reads and stores follow its rule, and no others do."""
    scales = {}
    for method in (None, "min-max"):
        model = model_of(CONV.replace("x, k", "x, j"), KERNELS | {"j": KERNELS["k"] / 8})
        for node, name in zip(model.graph, ("one", "act", "two", "soft", "product"), strict=True):
            node.name = name
        rules = ({"match": "one", "calibration": method},) if method else ()
        made = qcompiler.compile(
            model, "arm-int8", tmp_path / f"{method}.onnx", stop_after="qdq",
            calibration=lambda: [np.random.default_rng(1).standard_normal((1, 16, 8, 8), "f")],
            recipe=Recipe(
                calibration="percentile=90",
                nodes=rules,
                passes={
                    "keep-sensitive": {"runs": 0, "own": 0.1},
                    "equalize-layers": {"gain": 1e3},
                    "assign-precision": {"outputs": True},
                },
            ),
        )  # fmt: skip
        graph = ir.load(made.bundle).graph
        scales[method] = {
            node.inputs[0].name: float(node.inputs[1].const_value.numpy())
            for node in graph
            if node.op_type == "QuantizeLinear" and node.inputs[1].const_value is not None
        }
    wider = {name: scales["min-max"][name] / scale for name, scale in scales[None].items()}
    assert len(wider) == 3
    assert sorted(ratio > 1.2 for ratio in wider.values()) == [False, True, True]


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

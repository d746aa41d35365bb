"""Zero points of 4-bit groups, integers or floats: rounded, folded, written for ORT, asked for."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import assert_rewrites, model_of, run, sqnr
from offset_groups import FEEDS, TEXT, W, type_of
from terminal import fails, qcompile

import qcompiler
from qcompiler.ir.decisions import plan_of, region_of
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import constant
from qcompiler.ir.types import PerAxis, QuantType
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.matrix_weights import matrix_weight
from qcompiler.passes.node_rules import NodeRule
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.passes.rounded_weight import place_dequantize
from qcompiler.passes.weight_grid import rounded_on, weight_grid
from qcompiler.pipeline import Pipeline
from qcompiler.recipe import Recipe
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(1)
STORED = pytest.mark.parametrize(
    ("kind", "scales"), [("integer", "float"), ("float", "float"), ("float", "int8")]
)


def planned(target, model=None, **options):
    model = model or model_of(TEXT, {"w": W})
    options = {"zero_points": "float", "group_size": 32} | options
    rules = [NodeRule(op="MatMul", scales=options.pop("scales", None) or "float")]
    AssignPrecision(TARGETS[target].scheme, AssignPrecision.Options(**options), rules)(model)
    return model


@pytest.mark.parametrize(
    ("kind", "scales", "op"),
    [
        ("integer", None, "QMatMulW4Z4"),
        ("float", None, "QMatMulW4"),
        ("float", "int8", "QMatMulW4S8"),
    ],
)
@pytest.mark.parametrize("target", ["cuda-int4", "arm-int4"])
def test_folds_to_ops_that_equal_its_pairs(target, kind, scales, op):
    model = planned(target, zero_points=kind, scales=scales)
    InsertQDQ()(model)
    RoundToNearest()(model)
    before = run(model, FEEDS, plainly=True)[0]
    assert sqnr(FEEDS["x"] @ W, before) > 18
    assert FoldQDQ()(model).modified
    ops, a = {node.op_type for node in model.graph}, "A16" if target == "cuda-int4" else "A8"
    moved = {f"GroupSums{a}", "MatMul", "Add"} if kind == "float" else set()
    levels = {"Cast", "Mul"} if scales else set()
    assert ops - {"Quantize"} == {op + a} | moved | levels
    assert sqnr(before, run(model, FEEDS, plainly=True)[0]) > 120


def test_float_zero_points_are_an_add_before_they_are_folded():
    after = """
        inputs x
        v4 = DequantizeLinear {'axis': '0', 'block_size': '32'} (v2, v3)
        v7 = Gather {'axis': '0'} (v5, v6)
        v8 = Add  (v4, v7)
        y = MatMul  (x, v8)
        outputs y
    """
    model = planned("cuda-int4")
    model = assert_rewrites(RoundToNearest(), model, after, FEEDS, exact=False, floor_db=18)
    after = """
        inputs x
        v2 = qcompiler.GroupSumsA16 {'block_size': '32'} (x)
        v5 = qcompiler.QMatMulW4A16 {'block_size': '32'} (x, v3, v4)
        v7 = MatMul  (v2, v6)
        y = Add  (v5, v7)
        outputs y
    """
    assert_rewrites(FoldQDQ(), model, after, FEEDS, exact=False, floor_db=30)


@pytest.mark.parametrize("target", ["cuda-int4", "arm-int4"])
def test_products_of_one_value_share_the_sums_of_its_groups(target):
    text = TEXT.replace("y = MatMul (x, w)", "a = MatMul (x, w) b = MatMul (x, v) y = Add (a, b)")
    model = planned(target, model_of(text, {"w": W, "v": W[::-1].copy()}))
    InsertQDQ()(model)
    RoundToNearest()(model)
    before = run(model, FEEDS, plainly=True)[0]
    FoldQDQ()(model)
    ops = [node.op_type for node in model.graph]
    assert sum(op.startswith("GroupSums") for op in ops) == 1 and ops.count("MatMul") == 2
    assert sqnr(before, run(model, FEEDS, plainly=True)[0]) > 120


def test_a_kernel_adds_the_offsets_in_float16():
    depth = 128  # a multiple of 32, which the kernel for GPUs asks for
    weight = {"w": RNG.standard_normal((depth, 64), dtype=np.float32) + np.float32(0.3)}
    text = f"g (float[m,{depth}] x) => (float[m,64] y) {{ y = MatMul (x, w) }}"
    x = {"x": RNG.standard_normal((9, depth), dtype=np.float32)}
    recipes = [Recipe(zero_points="float", group_size=32, float=name) for name in ("fp32", "fp16")]
    exact, half = (
        Pipeline.default("cuda-int4", recipe).run(model_of(text, weight)) for recipe in recipes
    )
    (anchor,) = (region for node in half.graph if (region := region_of(node)) is not None)
    assert anchor.anchor == "QMatMulW4A16" and [step.op for step in anchor.steps] == ["Add"]
    results = [run(model, x, plainly=True)[0] for model in (exact, half)]
    assert sqnr(*results) > 55 and sqnr(x["x"] @ weight["w"], results[1]) > 18


@pytest.mark.parametrize("near_miss", ["groups", "axis", "shape", "computed"])
def test_an_add_that_is_no_offset_is_left(near_miss):
    type = type_of()
    rounded = rounded_on(W, type, weight_grid(W, type, "max"))
    model = model_of(TEXT, {"w": W})
    (product,) = model.graph
    add = place_dequantize(model.graph, product.inputs[1], type, rounded)
    product.replace_input_with(1, add.outputs[0])
    assert matrix_weight(add.outputs[0]) is not None
    gather = add.inputs[1].producer()
    rows = constant(gather.inputs[1]).copy()
    if near_miss == "groups":
        rows[31] = 1
        gather.inputs[1].const_value = ir.tensor(rows, name=gather.inputs[1].name)
    if near_miss == "axis":
        gather.attributes["axis"] = ir.AttrInt64("axis", 1)
    if near_miss == "shape":
        table = np.vstack([rounded.offset, rounded.offset])
        gather.inputs[0].const_value = ir.tensor(table, name=gather.inputs[0].name)
    if near_miss == "computed":
        add.replace_input_with(1, model.graph.inputs[0])
    assert matrix_weight(add.outputs[0]) is None


@pytest.mark.parametrize("target", ["x86-int4", "arm-int4", "cuda-int4"])
@STORED
def test_a_bundle_is_fast_in_onnx_runtime(target, kind, scales, tmp_path):
    recipe = Recipe(zero_points=kind, group_size=32, nodes=[NodeRule(op="MatMul", scales=scales)])
    bundle = qcompiler.compile(
        model_of(TEXT, {"w": W}), target, tmp_path / "b", recipe=recipe, timing=False
    ).bundle
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = qcompiler.load(
        bundle, native=False, providers=["CPUExecutionProvider"], session_options=options
    )
    assert sqnr(FEEDS["x"] @ W, session.run(None, FEEDS)[0]) > 18
    ops = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert "MatMulNBits" in ops and "DequantizeLinear" not in ops


@STORED
def test_a_file_for_onnx_runtime_holds_the_same_values(kind, scales, tmp_path):
    recipe = Recipe(zero_points=kind, group_size=32, nodes=[NodeRule(op="MatMul", scales=scales)])
    file = qcompiler.compile(
        model_of(TEXT, {"w": W}), "cuda-int4", tmp_path / "m.onnx", recipe=recipe, emit="ort"
    ).bundle
    (product,) = (node for node in ir.load(file).graph if node.op_type == "MatMulNBits")
    assert (product.inputs[3].dtype is ir.DataType.FLOAT) == (kind == "float")
    type = type_of(kind, two_level=scales == "int8")
    floats = rounded_on(W, type, weight_grid(W, type, "max")).floats(type)
    assert sqnr(FEEDS["x"] @ floats, ort.InferenceSession(file).run(None, FEEDS)[0]) > 100


def test_a_recipe_says_it_and_reads_it_back():
    recipe = Recipe(zero_points="float", nodes=[NodeRule(op="MatMul", zero_points="none")])
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert 'zero_points = "float"' in recipe.to_toml()
    model = planned("x86-int4", zero_points="integer")
    assert str(plan_of(model.graph[0]).weight).endswith("axis=0/32, asymmetric>")


def test_on_the_command_line(tmp_path):
    ir.save(model_of(TEXT, {"w": W}), tmp_path / "m.onnx")
    given = (tmp_path / "m.onnx", "--target", "arm-int4", "-o", tmp_path / "b")
    fails(1, "unknown zero_points 'flot'; did you mean 'float'?", *given, "--zero-points", "flot")
    assert qcompile(*given, "--zero-points", "float", "-q").exit_code == 0
    assert "GroupSumsA8" in qcompile("inspect", tmp_path / "b").stdout
    assert 'zero_points = "float"' in qcompile("inspect", tmp_path / "b", "--recipe").stdout
    given = (tmp_path / "m.onnx", "--target", "arm-int8", "-o", tmp_path / "c")
    fails(1, "zero_points 'float': int8 weights have no groups", *given, "--zero-points", "float")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(zero_points="int"), "unknown zero_points 'int'.*did you mean 'integer'"),
        (lambda: Recipe(zero_points=True), "unknown zero_points True; one of none, integer, float"),
        (lambda: NodeRule(zero_points="flot"), "did you mean 'float'"),
        (
            lambda: planned("x86-int8", group_size=None),
            "'float': int8 weights have no groups",
        ),
        (lambda: type_of(symmetric=False), "only integers in groups of rows, without zero points"),
        (
            lambda: QuantType(ir.DataType.INT4, granularity=PerAxis(1), offset=True),
            "only integers in groups of rows",
        ),
        (lambda: QuantType(ir.DataType.INT4, offset=1), "offset 1 is neither True nor False"),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_scales_of_two_levels_have_no_integer_zero_points():
    with pytest.raises(OptionError, match="scales 'int8' is possible for none.*without integer"):
        planned("x86-int4", zero_points="integer", scales="int8")


def test_a_recipe_may_ask_for_scales_of_two_levels_everywhere():
    recipe = Recipe(zero_points="float", scales="int8")
    assert Recipe.from_dict(recipe.to_dict()) == recipe and "scales" not in Recipe().to_dict()
    for rules, ending in (
        ([], "two-level, offset>"),
        ([NodeRule(op="MatMul", scales="float")], "/32, offset>"),
        ([NodeRule(op="MatMul", zero_points="none")], "two-level>"),
    ):
        model = model_of(TEXT, {"w": W})
        options = AssignPrecision.Options(zero_points="float", scales="int8")
        AssignPrecision(TARGETS["x86-int4"].scheme, options, rules)(model)
        assert str(plan_of(model.graph[0]).weight).endswith(ending)
    with pytest.raises(OptionError, match="have no integer zero points beside them"):
        Recipe(zero_points="integer", scales="int8")
    with pytest.raises(OptionError, match="scales 'int8': int8 weights have no groups"):
        AssignPrecision(TARGETS["x86-int8"].scheme, AssignPrecision.Options(scales="int8"))
    rules = [NodeRule(op="MatMul", zero_points="integer")]
    rewrite = AssignPrecision(TARGETS["x86-int4"].scheme, options, rules)
    with pytest.raises(OptionError, match="'integer' is possible for none.*scales of 8 bits"):
        rewrite(model_of(TEXT, {"w": W}))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"activation": "dynamic", "zero_points": "integer"}, "int8 ones beside activation"),
        ({"activation": "float", "zero_points": "float"}, "int4 weights may have float zero"),
    ],
)
def test_a_rule_for_nodes_without_groups_is_refused(more, message):
    rules = [NodeRule(op="MatMul", precision="int8", **more)]
    with pytest.raises(OptionError, match=message):
        AssignPrecision(TARGETS["x86-int4"].scheme, rules=rules)(model_of(TEXT, {"w": W}))


@pytest.mark.parametrize("group", [32, 0])
@pytest.mark.parametrize("target", ["x86-int4", "cuda-int4"])
def test_groups_of_8_bits_have_whole_zero_points(target, group, tmp_path):
    source = model_of(TEXT, {"w": W})
    rule = NodeRule(op="MatMul", precision="int8", activation="float", group_size=group)
    noise = {}
    for zero_points in ("none", "integer"):
        recipe = Recipe(float="fp32", nodes=[rule, NodeRule(op="MatMul", zero_points=zero_points)])
        made = qcompiler.compile(
            source, target, tmp_path / "y.onnx", recipe=recipe, emit="ort", timing=False
        ).bundle
        (node,) = (node for node in ir.load(made).graph if node.op_type == "MatMulNBits")
        assert node.attributes.get_int("bits") == 8
        assert (len(node.inputs) == 4) == (zero_points == "integer")
        session = ort.InferenceSession(made, providers=["CPUExecutionProvider"])
        noise[zero_points] = sqnr(run(source, FEEDS)[0], session.run(None, FEEDS)[0])
        bundle = qcompiler.compile(source, target, tmp_path / "b", recipe=recipe, timing=False)
        loaded = qcompiler.load(bundle.bundle, native=False, providers=["CPUExecutionProvider"])
        assert sqnr(run(source, FEEDS)[0], loaded.run(None, FEEDS)[0]) > 40
    assert noise["integer"] > noise["none"] > 40

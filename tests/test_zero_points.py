"""Zero points of 4-bit groups, integers or floats: rounded, folded, written for ORT, asked for."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import assert_rewrites, model_of, run, sqnr
from terminal import fails, qcompile

import qcompiler
from qcompiler.ir.decisions import plan_of, region_of
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import constant
from qcompiler.ir.two_level import on_two_levels, split_scale
from qcompiler.ir.types import PerAxis, PerGroup, QuantType
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.gptq import GPTQ, gptq
from qcompiler.passes.hqq import HQQ, hqq
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.matrix_weights import matrix_weight
from qcompiler.passes.node_rules import NodeRule
from qcompiler.passes.offset_grid import fitted_offsets, whole_range
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.passes.rounded_weight import RoundedWeight, place_dequantize
from qcompiler.passes.weight_grid import Grid, rounded_on, weight_grid
from qcompiler.pipeline import Pipeline
from qcompiler.recipe import Recipe
from qcompiler.targets.catalog import TARGETS

K, N = 88, 24
RNG = np.random.default_rng(0)
W = (RNG.standard_t(4, (K, N)) + RNG.standard_normal((1, N))).astype(np.float32)
FEEDS = {"x": RNG.standard_normal((2, 5, K), dtype=np.float32) + np.float32(0.2)}
TEXT = f"g (float[b,m,{K}] x) => (float[b,m,{N}] y) {{ y = MatMul (x, w) }}"
KINDS = {"none": {}, "integer": {"symmetric": False}, "float": {"offset": True}}


def type_of(kind="float", group=32, **more):
    """K is no multiple of 32: the last group is shorter."""
    return QuantType(ir.DataType.INT4, granularity=PerGroup(0, group), **KINDS[kind], **more)


def planned(target, model=None, **options):
    model = model or model_of(TEXT, {"w": W})
    options = {"zero_points": "float", "group_size": 32} | options
    rules = [NodeRule(op="MatMul", scales=options.pop("scales", None) or "float")]
    AssignPrecision(TARGETS[target].scheme, AssignPrecision.Options(**options), rules)(model)
    return model


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("bits", [None, 2])
def test_what_lies_on_a_grid_with_a_minimum_is_found_again(two_level, bits):
    """As of Q4_1 of llama.cpp: the ends of the range are the ends of the codes."""
    type = type_of(two_level=two_level, bits=bits)
    first, last = type.range
    codes = RNG.integers(first, last + 1, (K, N)).astype(np.float32)
    codes[::32], codes[1::32] = first, last
    scale = RNG.uniform(1, 2, (3, N)).astype(np.float32)
    offset = RNG.standard_normal((3, N)).astype(np.float32)
    if two_level:
        scale, offset = on_two_levels(scale), on_two_levels(offset, zero=True)
    rows = np.arange(K) // 32
    weight = codes * scale[rows] + offset[rows]
    for range in ("max", "mse"):
        rounded = rounded_on(weight, type, weight_grid(weight, type, range))
        assert (rounded.stored.astype(int) == codes).all()
        assert sqnr(weight, rounded.floats(type)) > (44 if two_level else 120)


def test_offsets_of_least_squares_beat_the_range_and_integer_zero_points():
    errors = {}
    for kind, range in (("float", "max"), ("float", "mse"), ("integer", "mse"), ("none", "mse")):
        type = type_of(kind)
        rounded = rounded_on(W, type, weight_grid(W, type, range))
        errors[kind, range] = np.square(W - rounded.floats(type)).sum()
    best = errors.pop(("float", "mse"))
    assert best < 0.95 * min(errors.values())


def test_little_is_left_to_win_by_trying_every_grid():
    """Of one group per column, against 60 x 60 scales and offsets."""
    type, weight = type_of(), W[:32]
    counts = RNG.uniform(0.1, 1, (32, 1)).astype(np.float32)

    def error(scale, offset):
        codes = np.clip(np.rint((weight - offset) / scale), -8, 7)
        return (counts * np.square(weight - codes * scale - offset)).sum(0)

    scale, offset = whole_range(weight, type)
    tried = [
        error(scale * part, offset + move * scale)
        for part in np.linspace(0.6, 1.1, 60)
        for move in np.linspace(-2, 2, 60)
    ]
    found, best = error(*fitted_offsets(weight, type, counts)), np.min(tried, axis=0)
    assert found.sum() < 1.1 * best.sum() and found.sum() < 0.9 * error(scale, offset).sum()


def test_a_step_at_0_where_most_weights_are_close_to_it():
    """A few weights far out make steps wide: the ends of the range are no longer what matters."""
    type, weight = type_of(), RNG.standard_normal((32, 40)).astype(np.float32) / 50
    weight[0], weight[1] = 1, RNG.uniform(-2, -0.5, 40)

    def error(scale, offset):
        return np.square(weight - np.clip(np.rint((weight - offset) / scale), -8, 7) * scale
                         - offset).sum(0)  # fmt: skip

    step = (weight.max(0) - weight.min(0)) / 15
    ends = error(step, weight.min(0) + 8 * step)
    scale, offset = whole_range(weight, type)
    assert (error(scale, offset) <= 1.001 * ends).all()
    assert error(scale, offset).sum() < 0.5 * ends.sum()
    assert (np.abs(offset / scale - np.rint(offset / scale)) < 1e-5).mean() > 0.5


def test_rows_that_count_for_nothing_and_constant_groups():
    type, weight = type_of(), W.copy()
    weight[:32, 3], weight[32:64, 4] = 0.7, 0.0
    for rows in (None, np.zeros((K, 1), np.float32), (np.arange(K) < 5).astype("f4")[:, None]):
        importance = None if rows is None else rows[:, 0]
        for range in ("max", "mse"):
            grid = weight_grid(weight, type, range, importance)
            floats = rounded_on(weight, type, grid).floats(type)
            assert np.isfinite(grid.scale).all() and (grid.scale > 0).all()
            np.testing.assert_allclose(floats[:32, 3], 0.7, rtol=1e-6)
            np.testing.assert_allclose(floats[32:64, 4], 0, atol=1e-12)
            assert sqnr(weight, floats) > 15


@pytest.mark.parametrize("kind", ["integer", "float"])
@pytest.mark.parametrize("group", [16, 24, 128])
def test_gptq_and_hqq_know_them(kind, group):
    type = type_of(kind, group)
    x = FEEDS["x"].reshape(-1, K) @ RNG.standard_normal((K, K)).astype(np.float32)
    nearest = rounded_on(W, type, weight_grid(W, type, "max"))
    by_gptq, _ = gptq(W, x.T @ x / len(x), type, GPTQ.Options())
    errors = [np.square(x @ (W - r.floats(type))).sum() for r in (nearest, by_gptq)]
    assert errors[1] < 0.5 * errors[0]
    fitted = hqq(W, type, HQQ.Options())
    if kind == "float":  # hqq starts from a whole number, and moves on
        start = np.rint(nearest.offset / nearest.scale) * nearest.scale
        nearest = rounded_on(W, type, Grid(nearest.scale, None, start))
    squares = [np.square(W - r.floats(type)).sum() for r in (nearest, fitted)]
    assert squares[1] < squares[0] if kind == "float" else squares[1] == squares[0]
    for rounded in (by_gptq, fitted):
        again = RoundedWeight.from_arrays(rounded.to_arrays(), type)
        np.testing.assert_array_equal(again.floats(type), rounded.floats(type))


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
@pytest.mark.parametrize("kind", ["integer", "float"])
@pytest.mark.parametrize("scales", ["float", "int8"])
def test_a_bundle_is_fast_in_onnx_runtime(target, kind, scales, tmp_path):
    if (kind, scales) == ("integer", "int8"):
        pytest.skip("refused: see below")
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


@pytest.mark.parametrize("kind", ["integer", "float"])
@pytest.mark.parametrize("scales", ["float", "int8"])
def test_a_file_for_onnx_runtime_holds_the_same_values(kind, scales, tmp_path):
    if (kind, scales) == ("integer", "int8"):
        pytest.skip("refused: see below")
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


def test_int8_offsets_keep_their_zeros():
    offsets = np.asarray([[0, 0], [1, 0], [-2, 0]], np.float32)
    groups, _ = split_scale(offsets, zero=True)
    assert groups[0].tolist() == [0, 0] and groups[:, 1].tolist() == [0, 0, 0]
    np.testing.assert_allclose(on_two_levels(offsets, zero=True), offsets, rtol=0.01)


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

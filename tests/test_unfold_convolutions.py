"""unfold-convolutions: windows as rows of a product, and when that is worth it."""

import itertools

import numpy as np
import onnx
import pytest
from choosing import choosing, planned
from golden import assert_rewrites, model_of, run
from onnx import helper, numpy_helper

import qcompiler
from qcompiler.ir.decisions import decision_of, plan_of
from qcompiler.ir.graph import constant
from qcompiler.ir.joined_regions import dilation_of_windows
from qcompiler.ir.sites import Choice
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.node_rules import NodeRule
from qcompiler.passes.unfold_convolutions import UnfoldConvolutions
from qcompiler.targets.catalog import get_target

RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.standard_normal((12, 8, 3)).astype(np.float32),
    "v": RNG.standard_normal((5, 12, 3)).astype(np.float32),
    "one": RNG.standard_normal((12, 8, 1)).astype(np.float32),
    "grouped": RNG.standard_normal((12, 2, 3)).astype(np.float32),
    "flat": RNG.standard_normal((12, 8, 3, 1)).astype(np.float32),
    "b": RNG.standard_normal(12).astype(np.float32),
    "half": np.float32(0.5),
}
X = {"x": RNG.standard_normal((2, 8, 11)).astype(np.float32)}
HEAD = "g (float[n,8,t] x) => (float[n,c,u] y)"
CONV = HEAD + " { c = Conv <pads = [1, 1]> (x, w, b) y = Neg (c) }"


def ops(model):
    return [node.op_type for node in model.graph]


def unfolded(text, weights=WEIGHTS, feeds=X):
    """The model after the pass, which changed no number."""
    model = planned(text, weights)
    expected = run(model, feeds)
    assert UnfoldConvolutions()(model).modified
    verify(model, Stage.FLOAT, "unfold-convolutions")
    for left, right in zip(run(model, feeds), expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5 * np.abs(right).max())
    assert not UnfoldConvolutions()(model).modified
    return model


def test_windows_are_rows_of_a_product():
    assert_rewrites(
        UnfoldConvolutions(), planned(CONV, WEIGHTS),
        """inputs x
v2 = Transpose {'perm': '(0, 2, 1)'} (x)
v4 = Pad  (v2, v3)
v9 = Slice  (v4, v5, v6, v7, v8)
v12 = Slice  (v4, v10, v11, v7, v8)
v15 = Slice  (v4, v13, v14, v7, v8)
v16 = Concat {'axis': '2'} (v9, v12, v15)
v18 = MatMul  (v16, v17)
v20 = Add  (v18, v19)
v21 = Transpose {'perm': '(0, 2, 1)'} (v20)
y = Neg  (v21)
outputs y""",
    )  # fmt: skip


@pytest.mark.parametrize(
    "attributes",
    [
        f"pads = [{begin}, {end}], strides = [{stride}], dilations = [{dilation}]"
        for begin, end, stride, dilation in itertools.product((0, 2), (0, 1), (1, 2, 3), (1, 2))
    ],
)
@pytest.mark.parametrize("kernel", ["w", "one"])
@pytest.mark.parametrize("tokens", [5, 11, 12])
def test_all_forms_compute_the_same(attributes, kernel, tokens):
    feeds = {"x": RNG.standard_normal((2, 8, tokens)).astype(np.float32)}
    model = unfolded(
        f"{HEAD} {{ c = Conv <{attributes}> (x, {kernel}, b) y = Neg (c) }}", feeds=feeds
    )
    assert "Conv" not in ops(model)


PADS = {"causal": np.int64([0, 0, 2, 0, 0, 0]), "channels": np.int64([0, 1, 1, 0, 1, 1])}


def test_zeros_before_a_causal_convolution_are_its_own():
    """And no longer stand between two Transposes."""
    text = (
        HEAD + " { p = Pad (x, causal) c = Conv <pads = [0, 1]> (p, w, b) r = Relu (c) "
        "q = Pad (r, causal) d = Conv (q, v) y = Neg (d) }"
    )
    model = unfolded(text, WEIGHTS | PADS)
    assert ops(model).count("Transpose") == 2 and ops(model).count("Pad") == 2
    numbers = model.graph.initializers
    pads = [constant(value).tolist() for name, value in numbers.items() if "pads" in name]
    assert sorted(pads) == [[0, 2, 0, 0, 0, 0], [0, 2, 0, 0, 1, 0]]


def test_a_pad_that_is_read_elsewhere_stays():
    text = HEAD.replace("y)", "y, float[n,8,u] z)") + " { p = Pad (x, causal) z = Neg (p) "
    model = unfolded(text + "c = Conv (p, w, b) y = Neg (c) }", WEIGHTS | PADS)
    assert ops(model).count("Pad") == 2


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_other_pads_may_name_their_axes(mode):
    """Between Transposes, which ONNX Runtime moves across them."""
    text = (
        f'{HEAD} {{ c = Conv (x, w, b) p = Pad <mode = "{mode}"> (c, ends, , last) '
        "d = Conv (p, v) y = Neg (d) }"
    )
    model = unfolded(text, WEIGHTS | {"ends": np.int64([2, 1]), "last": np.int64([-1])})
    (pad,) = (node for node in model.graph if node.op_type == "Pad")
    assert constant(pad.inputs[1]).tolist() == [0, 0, 2, 0, 0, 1]


def test_other_pads_are_left_to_themselves():
    weights = WEIGHTS | PADS | {"w": RNG.standard_normal((12, 10, 3)).astype(np.float32)}
    model = unfolded(f"{HEAD} {{ p = Pad (x, channels) c = Conv (p, w, b) y = Neg (c) }}", weights)
    assert ops(model).count("Pad") == 1 and ops(model)[0] == "Pad"


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_padding_by_itself(mode):
    unfolded(f'{HEAD} {{ c = Conv <auto_pad = "{mode}"> (x, w, b) y = Neg (c) }}')


def test_a_bias_is_no_must():
    assert "Add" not in ops(unfolded(HEAD + " { c = Conv (x, w) y = Neg (c) }"))


@pytest.mark.parametrize(
    ("between", "moved"),
    [
        ("r = Gelu (c)", True),
        ("s = Sigmoid (c) r = Mul (c, s)", True),
        ("s = Mul (c, half) e = Erf (s) r = Mul (e, c)", True),
        ("s = Neg (c) r = Mul (c, s)", False),
        ("s = Mul (half, c) q = Neg (s) r = Relu (q)", False),
    ],
)
def test_transposes_between_two_meet_behind_elementwise_ops(between, moved):
    text = f"{HEAD} {{ c = Conv (x, w, b) {between} d = Conv (r, v) y = Neg (d) }}"
    assert ops(unfolded(text)).count("Transpose") == (2 if moved else 4)


def test_one_behind_the_last_op_is_undone_by_the_models_own():
    text = HEAD + " { c = Conv (x, w, b) r = Gelu (c) t = Transpose <perm = [0, 2, 1]> (r)"
    assert ops(unfolded(text + " y = Neg (t) }")).count("Transpose") == 1
    # What others read in the other order stays there for them.
    model = unfolded(text + " u = Transpose <perm = [0, 2, 1]> (t) z = Neg (u)"
                     " s = Neg (r) y = Add (s, z) }")  # fmt: skip
    assert ops(model).count("Transpose") <= 3


def test_outputs_keep_their_names_and_layout():
    text = HEAD.replace("y)", "y, float[n,c,u] z)")
    model = unfolded(
        text + " { c = Conv (x, w, b) r = Relu (c) e = Exp (r) y = Neg (e) z = Neg (r) }"
    )
    assert [value.name for value in model.graph.outputs] == ["y", "z"]


def test_the_product_is_int8_by_tokens_and_keeps_the_name():
    model = planned(CONV, WEIGHTS)
    model.graph.node(0).name = "first"
    UnfoldConvolutions()(model)
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    assert product.name == "first"
    plan = plan_of(product)
    assert (str(plan.weight), str(plan.activation)) == _plan_of_a_product()
    assert "a convolution of 3 taps, its windows as rows" in decision_of(product).why


def _plan_of_a_product():
    """As assign-precision plans one of these sizes."""
    matrix = {"m": np.ones((24, 12), np.float32)}
    model = planned("g (float[n,t,24] x) => (float[n,t,12] y) { y = MatMul (x, m) }", matrix)
    plan = plan_of(model.graph.node(0))
    return str(plan.weight), str(plan.activation)


@pytest.mark.parametrize(
    "conv",
    [
        "Conv <group = 4> (x, grouped, b)",
        "Conv (x, computed, b)",
    ],
    ids=["groups", "computed weight"],
)
def test_others_stay(conv):
    text = f"{HEAD} {{ computed = Neg (w) c = {conv} y = Neg (c) }}"
    model = planned(text, WEIGHTS)
    assert not UnfoldConvolutions()(model).modified


def test_many_taps_stay():
    """A spectrum as a convolution: a Slice for each tap would take longer than all of it."""
    text = "g (float[n,1,t] x) => (float[n,c,u] y) { c = Conv (x, spectrum) y = Neg (c) }"
    weights = {"spectrum": RNG.standard_normal((34, 1, 64)).astype(np.float32)}
    assert not UnfoldConvolutions()(planned(text, weights)).modified


def test_a_shared_weight_is_stored_once():
    text = HEAD + " { c = Conv (x, w) n = Neg (x) d = Conv (n, w) r = Exp (c) y = Sub (r, d) }"
    model = unfolded(text, WEIGHTS | {"w": WEIGHTS["w"] / 9})
    assert [name for name in model.graph.initializers if "columns" in name] == ["w_columns"]


def test_one_tap_with_a_stride_is_one_slice():
    model = unfolded(HEAD + " { c = Conv <strides = [2]> (x, one) y = Neg (c) }")
    (part,) = (node for node in model.graph if node.op_type == "Slice")
    # Nothing that is in no graph reads it, which would keep it from being fused.
    assert [use.node.op_type for use in part.outputs[0].uses()] == ["MatMul"]


def test_images_stay():
    text = "g (float[n,8,t,1] x) => (float[n,c,u,v] y) { c = Conv (x, flat, b) y = Neg (c) }"
    assert not UnfoldConvolutions()(planned(text, WEIGHTS)).modified


def test_what_a_recipe_asks_of_a_convolution_is_left_to_it():
    model = model_of(CONV, WEIGHTS)
    rules = [NodeRule(op="Conv", precision="int8")]
    AssignPrecision(get_target("x86-int8").scheme, rules=rules)(model)
    assert not UnfoldConvolutions()(model).modified


def weighed(times, **options):
    model = planned(CONV, WEIGHTS)
    return UnfoldConvolutions(choosing(times, **options))(model).modified


FAST = {"kernel": 10.0, "ort": 90.0, "float": 95.0}


def by_op(conv, product):
    return lambda site: conv if site.op == "Conv" else product


def test_it_is_unfolded_where_the_product_is_faster():
    float_, int8 = {"float": 100.0, "ort": 60.0}, FAST
    assert weighed(by_op(float_, int8))
    assert not weighed(by_op(float_, int8 | {"kernel": 55.0}))  # a border is 10, and a node
    assert weighed(by_op(float_, int8 | {"kernel": 55.0}), observed=False)  # int8 is none
    assert not weighed(by_op(float_, int8), kernels=False)
    assert not weighed(by_op(float_, int8), forced={"MatMul": "slower"})
    assert not weighed(by_op(float_, int8), forced={"Conv": "slower"})
    assert not weighed(None)


@pytest.mark.parametrize("dilation", [1, 2])
def test_windows_cost_nothing_where_they_are_read_in_place(dilation):
    """Else a border, and one more for each tap."""
    conv = CONV.replace("<pads", f"<dilations = [{dilation}], pads")
    products = {"kernel": 30.0, "ort": 90.0, "float": 95.0}
    times, asked = by_op({"float": 60.0, "ort": 60.0}, products), []

    def supports(region):
        asked.append(region)
        return "none" if region.anchor == "WindowedQMatMulW8A8" else None

    choose = choosing(times)
    assert UnfoldConvolutions(choose)(planned(conv, WEIGHTS)).modified
    choose = choosing(times)
    choose.supports = supports
    assert not UnfoldConvolutions(choose)(planned(conv, WEIGHTS)).modified
    (windows,) = {region for region in asked if region.anchor == "WindowedQMatMulW8A8"}
    assert windows.sizes == (("K", 24), ("N", 12), ("R", 3), ("S", 1))
    assert dilation_of_windows(windows) == dilation


@pytest.mark.parametrize(("frames", "windows"), [("t", 128), (7510, 7500)])
def test_what_the_graph_does_not_say_of_frames_suits_a_wide_span(frames, windows):
    """Between the first tap and the last are more frames than there are windows."""
    text = f"g (float[n,8,{frames}] x) => (float[n,c,u] y)"
    dilation = 100 if frames == "t" else 5
    model = planned(
        text + f" {{ c = Conv <dilations = [{dilation}]> (x, w, b) y = Neg (c) }}", WEIGHTS
    )
    sites = []

    def times(site):
        sites.append(site)
        return {"float": 100.0, "ort": 60.0} if site.op == "Conv" else FAST

    assert UnfoldConvolutions(choosing(times))(model).modified
    conv, product = sites[:2]
    assert conv.result(conv.inputs[0]) == (1, 12, windows)
    assert product.inputs == ((windows, 24),)


def test_choices_made_before_are_made_again():
    product = Choice("first", "MatMul 24x12", "kernel", "")
    for made, expected in (([product], True), ([], False)):
        model = planned(CONV, WEIGHTS)
        model.graph.node(0).name = "first"
        changed = UnfoldConvolutions(choosing(None, made=made))(model).modified
        assert changed is expected


def speech(path, channels=256):
    """Two wide convolutions, in a file."""
    shapes = {"w": (256, channels, 3), "v": (256, 256, 3)}
    weights = [
        numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32) / 30, name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "first", pads=[1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "v"], ["d"], "second", pads=[1, 1], strides=[2]),
        helper.make_node("Relu", ["d"], ["e"], "relu_2"),
        helper.make_node("ReduceMean", ["e"], ["y"], "mean", keepdims=0),
    ]
    x = helper.make_tensor_value_info("x", 1, ["n", channels, "t"])
    graph = helper.make_graph(
        nodes, "g", [x], [helper.make_tensor_value_info("y", 1, None)], weights
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def test_speech_needs_no_samples(tmp_path):
    model = speech(tmp_path / "speech.onnx")
    report = qcompiler.compile(model, target="x86-int8", timing=False, output=tmp_path / "b")
    made = {decision.node: decision for decision in report.decisions}
    assert made["first"].action == made["second"].action == "kernel"
    again = qcompiler.compile(model, target="x86-int8", choices=tmp_path / "b",
                              output=tmp_path / "c")  # fmt: skip
    one, other = (folder / "model.onnx" for folder in (report.bundle, again.bundle))
    assert one.read_bytes() == other.read_bytes()
    # Convolutions of x86-int4 are int8, and so are these.
    few = qcompiler.compile(model, target="x86-int4", timing=False, output=tmp_path / "e")
    assert {d.node: d.op for d in few.decisions}["first"].startswith("WindowedQMatMulW8A8")

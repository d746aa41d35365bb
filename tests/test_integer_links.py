"""Ops between convolutions: which hand on integers, in which forms, and what ORT makes of them."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from convolution_chains import CHAIN, FEEDS, RNG, WEIGHTS, prepared
from golden import model_of, run, sqnr

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decision_of, drop_plan, operand_plan_of, plan_of
from qcompiler.ir.graph import dequantize_of
from qcompiler.ir.types import TensorStats
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.join_integers import JoinIntegers
from qcompiler.passes.lower_convolutions import LowerConvolutions
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.passes.shift_weights import ShiftWeights
from qcompiler.targets.catalog import TARGETS


def observer(model):
    """Ranges as the feeds have them."""

    def observe(_, names):
        probed = model.clone()
        values = {v.name: v for n in probed.graph for v in n.outputs}
        given = {name: FEEDS[name] for name in names if name in FEEDS}
        probed.graph.outputs[:] = [values[name] for name in names if name in values]
        arrays = run(probed, FEEDS) if probed.graph.outputs else []
        found = given | {v.name: a for v, a in zip(probed.graph.outputs, arrays, strict=True)}
        return {n: TensorStats(float(a.min()), float(a.max())) for n, a in found.items()}

    return observe


def quantized(model, observe=None):
    """The same, with pairs and rounded weights."""
    InsertQDQ(observe or observer(model))(model)
    RoundToNearest()(model)
    return model


def ort_ops(model, tmp_path):
    """The ops of what ONNX Runtime makes of a folded model."""
    FoldQDQ()(model)
    ShiftWeights()(model)
    dialect.declare(model)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]


BETWEEN = {
    "t = Add (a, x)": ["QLinearAdd"],
    "b = Add (a, x) t = Relu (b)": ["QLinearAdd"],
    "b = Add (a, x) t = Clip (b, zero, six)": ["QLinearAdd"],
    "b = Sigmoid (a) t = Mul (a, b)": ["QLinearSigmoid", "QLinearMul"],
    "t = Add (a, three)": ["QLinearAdd"],
    "t = Add (each, a)": ["QLinearAdd"],
    "t = Sub (a, three)": ["QLinearAdd"],
    "t = Mul (a, each)": ["QLinearMul"],
    "t = Mul (a, minus)": ["QLinearMul"],
    "t = Mul (half, a)": [],
    "b = Div (a, three) t = Add (b, x)": ["QLinearAdd"],
    "t = LeakyRelu <alpha = 0.1> (a)": ["QLinearLeakyRelu"],
    "b = Relu (a) t = Add (a, b)": ["QLinearAdd", "QLinearLeakyRelu"],
    "t = HardSigmoid <alpha = 0.3> (a)": ["QLinearAdd"],
    "t = HardSwish (a)": ["QLinearAdd", "QLinearMul"],
    "t = MaxPool <kernel_shape = [2,2]> (a)": ["MaxPool"],
    "t = Transpose <perm = [0,1,3,2]> (a)": ["Transpose"],
    "t = Reshape (a, shape)": ["Reshape"],
    "t = Slice (a, begin, end, axis)": ["Slice"],
    "t = Pad (a, pads)": ["Pad"],
    't = Pad <mode = "reflect"> (a, pads)': ["Pad"],
    't = Resize <mode = "nearest"> (a, , scales)': ["Resize"],
    "g = GlobalAveragePool (a) t = Mul (a, g)": ["QLinearGlobalAveragePool", "QLinearMul"],
    "g = ReduceMean (a, hw) t = Mul (a, g)": ["QLinearGlobalAveragePool", "QLinearMul"],
}


@pytest.mark.parametrize("body", BETWEEN)
def test_hands_on_integers(body, tmp_path):
    model = prepared(body)
    floats = run(model_of(CHAIN % body, WEIGHTS), FEEDS)[0]
    quantized(model)
    pairs = run(model, FEEDS, plainly=True)[0]
    assert sqnr(floats, pairs) > 25
    assert sqnr(np.log(floats), np.log(pairs)) > 20
    ops = ort_ops(model, tmp_path)
    assert sorted(op for op in ops if op not in _ENDS) == sorted(BETWEEN[body])
    assert ops.count("QuantizeLinear") == 1
    assert ops.count("DequantizeLinear") == 1
    np.testing.assert_allclose(run(model, FEEDS)[0], pairs, rtol=0.2)


_ENDS = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "Exp")


def test_passes_do_nothing_the_second_time():
    model = prepared("b = HardSwish (a) t = Add (b, x)")
    assert not JoinIntegers()(model).modified
    quantized(model)
    count = len(list(model.graph))
    assert not InsertQDQ()(model).modified
    assert len(list(model.graph)) == count


def test_links_leave_with_the_plans_around_them():
    model = prepared("t = HardSwish (a)")
    (link,) = (node for node in model.graph if operand_plan_of(node))
    drop_plan(next(node for node in model.graph if node.op_type == "Conv"))
    assert JoinIntegers()(model).modified
    assert operand_plan_of(link) is None
    assert decision_of(link).action == "float"


@pytest.mark.parametrize("body", [
    "t = AveragePool <kernel_shape = [2,2]> (a)",  # loses in integers
    't = Resize <mode = "linear"> (a, , scales)',  # would be cut off, not rounded
    "t = Tanh (a)",
    "b, i = MaxPool <kernel_shape = [1,1]> (a) j = Cast <to = 1> (i) t = Add (b, j)",
    "t = Pad (a, pads, three)",
    "t = Div (three, a)",
])  # fmt: skip
def test_floats_where_integers_lose_or_have_no_form(body):
    model = prepared(body)
    assert not any(operand_plan_of(node) for node in model.graph if node.op_type in body)


def test_a_requested_float_stays_so():
    model = prepared("t = HardSwish (a)", keep_float=("HardSwish",))
    (node,) = (node for node in model.graph if node.op_type == "HardSwish")
    assert operand_plan_of(node) is None
    assert decision_of(node).why == "kept float by request (HardSwish)"


def test_nothing_is_rounded_on_the_way_out():
    model = prepared("t = Relu (a)", chain=CHAIN.replace("y = Exp (c)", "s = Neg (c) y = Exp (s)"))
    assert not any(map(operand_plan_of, model.graph))


CONCAT = CHAIN.replace("c = Conv (t, w)", "c = Conv (t, w8)")


@pytest.mark.parametrize(("body", "shared"), [
    ("t = Concat <axis = 1> (a, x)", True),
    ("b = Relu (a) t = Concat <axis = 1> (b, x)", False),  # it is saturation that does the Relu
    ("b = Conv (x, w) d = Relu (a) e = Conv <pads = [1,1,1,1]> (x, w) f = Relu (e) "
     "t = Concat <axis = 1> (d, f)", True),
    ("z = Neg (a) t = Concat <axis = 1> (a, x) u = Exp (z)", False),  # Neg reads it as well
])  # fmt: skip
def test_what_is_only_joined_takes_the_scale_of_the_whole(body, shared, tmp_path):
    model = prepared(body, chain=CONCAT)
    floats = run(model_of(CONCAT % body, WEIGHTS), FEEDS)[0]
    quantized(model)
    (concat,) = (node for node in model.graph if node.op_type == "Concat")
    (quantize,) = (use.node for use in concat.outputs[0].uses())
    operand = dequantize_of(concat.inputs[0])
    assert (operand.inputs[1] is quantize.inputs[1]) == shared
    assert sqnr(floats, run(model, FEEDS, plainly=True)[0]) > 25
    assert "QLinearConcat" in ort_ops(model, tmp_path)


HEAD = (
    "g (float[1,4,16,16] x) => (float[1,6] y) { a = Conv (x, v) b = Relu (a) "
    "p = GlobalAveragePool (b) t = Flatten (p) y = MatMul (t, m) %s }"
)


def test_a_head_reads_the_integers_of_its_pool():
    weights = WEIGHTS | {"m": RNG.standard_normal((4, 6), dtype=np.float32)}
    model = prepared("", weights, HEAD)
    assert "its input is integers already" in decision_of(model.graph[-1]).why
    quantized(model)
    FoldQDQ()(model)
    assert [node.op_type for node in model.graph][-1] == "QMatMulU8S8"
    assert sqnr(run(model_of(HEAD % "", weights), FEEDS)[0], run(model, FEEDS)[0]) > 25


NEAR_OUTPUT = "g (float[1,4,16,16] x) => (float[1,4,14,14] y) { %s y = Conv (x, v) }"


def test_a_result_that_leaves_the_graph_is_rounded_if_asked_for(tmp_path):
    model = prepared("", chain=NEAR_OUTPUT)
    assert decision_of(model.graph[0]).why == "its result leaves the graph"
    model = prepared("", chain=NEAR_OUTPUT, outputs=True)
    floats = run(model, FEEDS)[0]
    quantized(model)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert sqnr(floats, run(model, FEEDS, plainly=True)[0]) > 25
    assert "QLinearConv" in ort_ops(model, tmp_path)


@pytest.mark.parametrize(
    "shape", [(4, 4, 3), (4, 1, 3, 3), (4, 2, 3, 3), (4, 4, 1, 1), (4, 4, 2, 2, 2)]
)
@pytest.mark.parametrize("more", ["dilations", "strides", "auto_pad", "bias"])
def test_convolutions_of_every_form(shape, more):
    rank, group = len(shape) - 2, 4 // shape[1]
    attributes = {
        "dilations": f"dilations = {[2] * rank}", "strides": f"strides = {[2] * rank}",
        "auto_pad": 'auto_pad = "SAME_UPPER"', "bias": "",
    }[more]  # fmt: skip
    attributes = ", ".join(filter(None, [f"group = {group}", attributes]))
    sizes = ",".join(["9"] * rank)
    text = (
        f"g (float[2,4,{sizes}] x) => (float[b,n,{','.join('pqr'[:rank])}] y) "
        f"{{ c = Conv <{attributes}> (x, k{', b' if more == 'bias' else ''}) y = Exp (c) }}"
    )
    weights = {"k": RNG.standard_normal(shape, dtype=np.float32) / 4, "b": np.float32([1, 2, 3, 0])}
    feeds = {"x": RNG.standard_normal((2, 4, *[9] * rank), dtype=np.float32)}
    model = model_of(text, weights)
    AssignPrecision(TARGETS["x86-int8"].scheme)(model)
    LowerConvolutions()(model)
    floats = run(model, feeds)[0]
    conv = model.graph[0]
    assert plan_of(conv) is not None
    assert "auto_pad" not in conv.attributes
    quantized(model, lambda m, names: {n: TensorStats(-7.0, 7.0) for n in names})
    assert sqnr(np.log(floats), np.log(run(model, feeds, plainly=True)[0])) > 20
    FoldQDQ()(model)
    assert "QConv" in [node.op_type for node in model.graph]


PRODUCT = "g (float[2,3,8,4] q, float[2,3,4,8] k) => (float[2,3,8,8] y) { y = MatMul (q, k) %s }"


def test_products_of_two_activations_in_8_bits_if_asked_for(tmp_path):
    model = prepared("", chain=PRODUCT)
    assert "its second operand is an activation" in decision_of(model.graph[0]).why
    model = prepared("", chain=PRODUCT, products=True)
    assert decision_of(model.graph[0]).why.startswith("both its operands static quant<uint8")
    feeds = {
        "q": RNG.standard_normal((2, 3, 8, 4), dtype=np.float32),
        "k": RNG.standard_normal((2, 3, 4, 8), dtype=np.float32),
    }
    floats = run(model, feeds)[0]
    quantized(model, lambda m, names: {n: TensorStats(-3.5, 3.5) for n in names})
    assert sqnr(floats, run(model, feeds)[0]) > 30
    assert "MatMulIntegerToFloat" in ort_ops(model, tmp_path)

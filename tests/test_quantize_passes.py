"""insert-qdq, round-to-nearest and fold-qdq: each alone, and their numbers in stock ORT."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_rewrites, model_of, run, sqnr, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.dialect import is_ours
from qcompiler.ir.errors import CalibrationError, ModelError
from qcompiler.ir.stages import Stage, verify
from qcompiler.ir.types import TensorStats
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 8), dtype=np.float32)
X = {"x": RNG.standard_normal((3, 64), dtype=np.float32)}
MATMUL = "g (float[m,64] x) => (float[m,8] y) { y = MatMul (x, w) }"


def assigned(text, weights, target="x86-int8"):
    model = model_of(text, weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    AssignPrecision(TARGETS[target].scheme)(model)
    return model


def test_insert_makes_one_exact_pair_per_tensor():
    model = assigned(
        "g (float[m,64] x) => (float[m,8] y, float[m,8] z) { y = MatMul (x, w) z = MatMul (x, v) }",
        {"w": W, "v": W * 2},
    )
    assert_rewrites(
        InsertQDQ(),
        model,
        """inputs x
        v3 = Abs  (x)
        v5 = ReduceMax {'keepdims': '1'} (v3, v4)
        v8 = Slice  (v5, v6, v7, v4)
        v10 = Max  (v8, v9)
        v12 = Div  (v10, v11)
        v13 = QuantizeLinear {'axis': '-1', 'block_size': '64', 'output_dtype': '3'} (x, v12)
        v14 = DequantizeLinear {'axis': '-1', 'block_size': '64'} (v13, v12)
        y = MatMul  (v14, v15)
        z = MatMul  (v14, v16)
        outputs y, z""",
        X,
        exact=False,
        floor_db=35,
    )
    verify(model, Stage.QDQ, "insert-qdq")


def test_insert_needs_calibration_for_convolutions():
    model = assigned(
        "g (float[1,2,8,8] x) => (float[1,4,6,6] y) { t = Conv (x, w) r = Relu (t) y = Neg (r) }",
        {"w": np.ones((4, 2, 3, 3), np.float32)},
    )
    with pytest.raises(CalibrationError, match="needed by node_0: .*--calib.*--keep-float Conv"):
        InsertQDQ()(model)


@pytest.mark.parametrize(
    ("target", "printed"),
    [
        ("x86-int8", "v4 = DequantizeLinear {'axis': '1'} (v2, v3)"),
        ("x86-int4", "v4 = DequantizeLinear {'axis': '0', 'block_size': '32'} (v2, v3)"),
        ("cuda-fp8", "v3 = Cast {'to': '1'} (v2)\nv5 = Mul  (v3, v4)"),
    ],
)
def test_rounds_weights_by_scheme(target, printed):
    last = "v5" if "fp8" in target else "v4"
    assert_rewrites(
        RoundToNearest(),
        assigned(MATMUL, {"w": W}, target),
        f"inputs x\n{printed}\ny = MatMul  (x, {last})\noutputs y",
        X,
        exact=False,
        floor_db=15,
    )


def test_rounding_keeps_the_float_weight_for_other_readers():
    model = assigned(
        "g (float[m,64] x, int64[1] i) => (float[m,8] y, float[1,8] z) "
        "{ y = MatMul (x, w) z = Gather (w, i) }",
        {"w": W},
    )
    RoundToNearest()(model)
    assert "w" in model.graph.initializers
    np.testing.assert_array_equal(run(model, X | {"i": np.array([3])})[1], W[3:4])


def test_rounding_shares_a_shared_weight():
    model = assigned(
        "g (float[m,64] x) => (float[m,8] y, float[m,8] z) "
        "{ y = MatMul (x, w) t = Neg (x) z = MatMul (t, w) }",
        {"w": W},
    )
    RoundToNearest()(model)
    assert [n.op_type for n in model.graph].count("DequantizeLinear") == 1
    assert "w" not in model.graph.initializers


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rounding_refuses_weights_that_are_not_finite(bad):
    weight = W.copy()
    weight[3, 4] = bad
    with pytest.raises(ModelError, match="'w' of 'node_0' holds 1 NaN or Inf.*--keep-float node_0"):
        RoundToNearest()(assigned(MATMUL, {"w": weight}))


@pytest.mark.parametrize("shape", [(64, 8), (64, 1)])
@pytest.mark.parametrize("target", ["x86-int8", "x86-int4", "cuda-int4", "cuda-fp8"])
def test_rounding_survives_zero_and_tiny_channels(target, shape):
    weight = np.zeros(shape, np.float32)
    weight[0, 0] = 1e-38
    model = assigned(
        f"g (float[m,64] x) => (float[m,{shape[1]}] y) {{ y = MatMul (x, w) }}",
        {"w": weight},
        target,
    )
    RoundToNearest()(model)
    assert np.isfinite(run(model, X)[0]).all()


FOLDED = {
    "x86-int8": """inputs x
        v2, v3 = qcompiler.Quantize {'block_size': '64'} (x)
        y = qcompiler.QMatMulW8A8  (v2, v3, v4, v5)
        outputs y""",
    "x86-int4": """inputs x
        v2, v3 = qcompiler.Quantize {'block_size': '64'} (x)
        y = qcompiler.QMatMulW4A8 {'block_size': '32'} (v2, v3, v4, v5)
        outputs y""",
    "cuda-int4": """inputs x
        y = qcompiler.QMatMulW4A16 {'block_size': '64'} (x, v2, v3)
        outputs y""",
    "cuda-fp8": """inputs x
        v2, v3 = qcompiler.QuantizeFp8 {'block_size': '64'} (x)
        y = qcompiler.QMatMulFp8  (v2, v3, v4, v5)
        outputs y""",
}


@pytest.mark.parametrize("target", FOLDED)
def test_folds_each_scheme_and_keeps_its_numbers(target):
    model = assigned(MATMUL, {"w": W}, target)
    InsertQDQ()(model)
    RoundToNearest()(model)
    # ORT runs W4 at its own accuracy level 4 in places: that costs it a few dB, not the fold.
    assert_rewrites(FoldQDQ(), model, FOLDED[target], X, exact=False, floor_db=40)
    verify(model, Stage.QUANTIZED, "fold-qdq")


def test_folding_shares_one_quantize():
    model = assigned(
        "g (float[m,64] x) => (float[m,8] y, float[m,8] z) { y = MatMul (x, w) z = MatMul (x, v) }",
        {"w": W, "v": W * 2},
    )
    InsertQDQ()(model)
    RoundToNearest()(model)
    FoldQDQ()(model)
    assert [n.op_type for n in model.graph] == ["Quantize", "QMatMulW8A8", "QMatMulW8A8"]


def test_folding_keeps_the_integers():
    """Quantize divides by the scale of the pair it replaces: no tie comes out otherwise."""
    model = assigned(
        "g (float[m,64] x) => (float[m,64] y) { y = MatMul (x, w) }",
        {"w": np.eye(64, dtype=np.float32)},
    )
    InsertQDQ()(model)
    RoundToNearest()(model)
    # Ties: 127 is the scale's top, so every half step below it is a tie.
    ties = (np.arange(3 * 64, dtype=np.float32).reshape(3, 64) - 96) / 2
    ties[:, 0] = 127
    before = run(model, {"x": ties})[0]
    FoldQDQ()(model)
    np.testing.assert_array_equal(run(model, {"x": ties})[0], before)


@pytest.mark.parametrize(
    "body",
    [
        # unsigned, 0 stands for 0: no token of int8
        "q = QuantizeLinear <axis = -1, block_size = 64> (x, s) "
        "xf = DequantizeLinear <axis = -1, block_size = 64> (q, s) "
        "wf = DequantizeLinear <axis = 1> (w, ws) y = MatMul (xf, wf)",
        # weights with one scale per row of K cannot leave the product
        "wf = DequantizeLinear <axis = 0> (w, wk) y = MatMul (x, wf)",
        # int8 weights under float activations have no op of ours
        "wf = DequantizeLinear <axis = 1> (w, ws) y = MatMul (x, wf)",
    ],
)
def test_leaves_pairs_that_mean_something_else(body):
    model = model_of(
        f"g (float[3,64] x, float[3,1] s) => (float[3,8] y) {{ {body} }}",
        {"w": np.ones((64, 8), np.int8), "ws": np.ones(8, np.float32), "wk": np.ones(64, "f4")},
    )
    FoldQDQ()(model)
    assert not any(is_ours(node.domain) for node in model.graph), text_of(model)


CONV = (
    "g (float[n,2,8,8] x) => (float[n,4,6,6] y) "
    "{ c = Conv (x, w, b) r = Relu (c) d = Conv <group = 2, pads = [1,1,1,1]> (r, v) y = Neg (d) }"
)
CONV_WEIGHTS = {
    "w": RNG.standard_normal((4, 2, 3, 3), dtype=np.float32),
    "b": RNG.standard_normal(4, dtype=np.float32),
    "v": RNG.standard_normal((4, 2, 3, 3), dtype=np.float32),
}
IMAGES = {"x": RNG.standard_normal((2, 2, 8, 8), dtype=np.float32)}


def observed(model, names):
    """Ranges of the named tensors on IMAGES, through an ORT run of the model."""
    copy = model.clone()
    values = {v.name: v for n in copy.graph for v in n.outputs}
    wanted = [name for name in names if name in values]
    copy.graph.outputs[:] = [values[name] for name in wanted]
    arrays = dict(zip(wanted, run(copy, IMAGES), strict=True)) | IMAGES
    return {n: TensorStats(float(arrays[n].min()), float(arrays[n].max())) for n in names}


def test_static_convolutions_end_to_end():
    model = assigned(CONV, CONV_WEIGHTS)
    reference = run(model, IMAGES)[0]
    InsertQDQ(observed)(model)
    verify(model, Stage.QDQ, "insert-qdq")
    RoundToNearest()(model)
    qdq = run(model, IMAGES)[0]
    assert sqnr(reference, qdq) > 30
    FoldQDQ()(model)
    verify(model, Stage.QUANTIZED, "fold-qdq")
    assert [n.op_type for n in model.graph] == [
        "QuantizeLinear", "QConv", "QConv", "DequantizeLinear", "Neg",
    ]  # fmt: skip
    # ORT's QLinearConv rounds its requantization once; the float pair rounds twice.
    assert sqnr(qdq, run(model, IMAGES)[0]) > 35


def test_a_relu_stays_when_zero_is_not_the_smallest_step():
    model = assigned(CONV, CONV_WEIGHTS)
    InsertQDQ(lambda model, names: {name: TensorStats(-4.0, 4.0) for name in names})(model)
    RoundToNearest()(model)
    FoldQDQ()(model)
    ops = [n.op_type for n in model.graph if n.op_type in ("Relu", "QConv", "Conv")]
    assert ops == ["Conv", "Relu", "QConv"]


def test_the_domain_of_dialect_ops_is_declared_and_dropped():
    model = assigned(MATMUL, {"w": W})
    InsertQDQ()(model)
    RoundToNearest()(model)
    FoldQDQ()(model)
    assert {name for _, name, _ in model.functions} == {"Quantize", "QMatMulW8A8"}
    assert all(isinstance(f, ir.Function) for f in model.functions.values())


def test_a_dead_channel_keeps_its_bias():
    """At the scale its zero weights would give, the int32 bias would saturate and be lost."""
    weights = CONV_WEIGHTS | {"w": CONV_WEIGHTS["w"].copy(), "b": np.array([5, 0.1, -7, 2], "f4")}
    weights["w"][0] = 0
    weights["w"][2] = 1e-9
    model = assigned(CONV, weights)
    reference = run(model, IMAGES)[0]
    for rewrite in (InsertQDQ(observed), RoundToNearest(), FoldQDQ()):
        rewrite(model)
    assert [n.op_type for n in model.graph].count("QConv") == 2
    assert sqnr(reference, run(model, IMAGES)[0]) > 30


def test_other_readers_of_an_input_keep_their_precision():
    model = assigned(
        "g (float[n,2,8,8] x) => (float[n,4,6,6] y, float[n,2,8,8] e) "
        "{ c = Conv (x, w) y = Neg (c) e = Exp (x) }",
        CONV_WEIGHTS,
    )
    expected = run(model, IMAGES)[1]
    InsertQDQ(observed)(model)
    np.testing.assert_array_equal(run(model, IMAGES)[1], expected)


def test_a_token_scale_of_another_kind():
    """`Quantize` divides the largest magnitude by 127: ONNX Runtime rounds by any other scale."""
    model = with_token_scales()
    constant = ir.tensor(np.float32(20), name="twenty")
    value = ir.Value(name="twenty", const_value=constant, type=ir.TensorType(constant.dtype))
    model.graph.register_initializer(value)
    (division,) = (node for node in model.graph if node.op_type == "Div")
    division.replace_input_with(1, value)
    x = RNG.standard_normal((5, 64), dtype=np.float32)
    expected = run(model, {"x": x})[0]
    FoldQDQ()(model)
    ours = [node.op_type for node in model.graph if is_ours(node.domain)]
    assert ours == ["QMatMulW8A8"], text_of(model)
    np.testing.assert_allclose(run(model, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)


def test_leaves_scales_along_another_axis():
    model = with_token_scales()
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and "block_size" in node.attributes:
            node.attributes["axis"] = ir.AttrInt64("axis", 1)
    FoldQDQ()(model)
    assert not any(is_ours(node.domain) for node in model.graph), text_of(model)


def with_token_scales():
    model = assigned(MATMUL, {"w": W})
    InsertQDQ()(model)
    RoundToNearest()(model)
    return model


@pytest.mark.parametrize(
    "text",
    [
        # int4 with one scale per column has no op of ours
        "g (float[3,64] x) => (float[3,8] y) "
        "{ wf = DequantizeLinear <axis = 1> (w, ws) y = MatMul (x, wf) }",
        # activations that are not float32
        "g (float16[3,64] x) => (float16[3,8] y) "
        "{ wf = DequantizeLinear <axis = 0, block_size = 32> (w, wh) y = MatMul (x, wf) }",
    ],
)
def test_leaves_imported_int4_that_has_no_op(text):
    int4 = ir.DataType.INT4.numpy()
    weights = {
        "w": RNG.integers(-8, 8, (64, 8)).astype(int4),
        "ws": np.ones(8, np.float32),
        "wh": np.ones((2, 8), np.float16),
    }
    assert not FoldQDQ()(model_of(text, weights)).modified


def test_imported_weights_are_said_to_be_quantized_already():
    model = assigned(
        "g (float[3,64] x) => (float[3,8] y) "
        "{ wf = DequantizeLinear <axis = 1> (w, ws) y = MatMul (x, wf) }",
        {"w": np.ones((64, 8), np.int8), "ws": np.ones(8, np.float32)},
    )
    assert "already quantized in the source" in decision_of(list(model.graph)[-1]).why


def test_a_plan_that_came_to_nothing_is_not_reported_as_done():
    model = assigned(MATMUL, {"w": W})
    FoldQDQ()(model)
    (node,) = model.graph
    assert decision_of(node).action == "float"
    assert not decision_of(node).expected


def test_names_that_are_taken():
    """Generated names step aside for the model's own."""
    model = assigned(
        "g (float[m,64] x) => (float[m,8] y, float[m,64] x_q, float[m,64] w_scale) "
        "{ y = MatMul (x, w) x_q = Neg (x) w_scale = Abs (x) }",
        {"w": W},
    )
    for rewrite, stage in ((InsertQDQ(), Stage.QDQ), (RoundToNearest(), Stage.QDQ),
                           (FoldQDQ(), Stage.QUANTIZED)):  # fmt: skip
        rewrite(model)
        verify(model, stage, "test")
    assert [value.name for value in model.graph.outputs] == ["y", "x_q", "w_scale"]
    run(model, X)


BRANCHES = (
    "g (float[m,64] x, bool c) => (float[m,8] y) { y = If (c) "
    "<then_branch = a () => (float[m,8] p) { p = MatMul (x, w) }, "
    "else_branch = b () => (float[m,8] n) { t = MatMul (x, w) n = Neg (t) }> }"
)


@pytest.mark.parametrize("target", TARGETS)
def test_branches_share_what_is_outside_them(target):
    model = assigned(BRANCHES, {"w": W}, target)
    feeds = [X | {"c": np.array(flag)} for flag in (True, False)]
    expected = [run(model, feed)[0] for feed in feeds]
    for rewrite, stage in ((InsertQDQ(), Stage.QDQ), (RoundToNearest(), Stage.QDQ),
                           (FoldQDQ(), Stage.QUANTIZED)):  # fmt: skip
        rewrite(model)
        verify(model, stage, "test")
    for feed, want in zip(feeds, expected, strict=True):
        assert sqnr(want, run(model, feed)[0]) > 15


def test_results_are_typed_where_shape_inference_found_nothing():
    model = assigned(
        "g (float[m,64] x) => (float[m,8] z) { y = MatMul (x, w) z = Neg (y) }", {"w": W}
    )
    next(iter(model.graph)).outputs[0].type = None
    for rewrite in (InsertQDQ(), RoundToNearest(), FoldQDQ()):
        rewrite(model)
    verify(model, Stage.QUANTIZED, "fold-qdq")

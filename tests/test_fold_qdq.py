"""fold-qdq: pairs and what they surround become ops of ours, with the same integers."""

import numpy as np
import onnx_ir as ir
import pytest
from calibrated import planned
from golden import assert_rewrites, model_of, run, sqnr, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.dialect import is_ours
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 8), dtype=np.float32)
X = {"x": RNG.standard_normal((3, 64), dtype=np.float32)}
MATMUL = "g (float[m,64] x) => (float[m,8] y) { y = MatMul (x, w) }"

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
    model = planned(MATMUL, {"w": W}, target)
    InsertQDQ()(model)
    RoundToNearest()(model)
    # ORT runs W4 at its own accuracy level 4 in places: that costs it a few dB, not the fold.
    assert_rewrites(FoldQDQ(), model, FOLDED[target], X, exact=False, floor_db=40)
    verify(model, Stage.QUANTIZED, "fold-qdq")


def test_folding_shares_one_quantize():
    model = planned(
        "g (float[m,64] x) => (float[m,8] y, float[m,8] z) { y = MatMul (x, w) z = MatMul (x, v) }",
        {"w": W, "v": W * 2},
    )
    InsertQDQ()(model)
    RoundToNearest()(model)
    FoldQDQ()(model)
    assert [n.op_type for n in model.graph] == ["Quantize", "QMatMulW8A8", "QMatMulW8A8"]


def test_folding_keeps_the_integers():
    """Quantize divides by the scale of the pair it replaces: no tie comes out otherwise."""
    model = planned(
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


def test_the_domain_of_dialect_ops_is_declared_and_dropped():
    model = planned(MATMUL, {"w": W})
    InsertQDQ()(model)
    RoundToNearest()(model)
    FoldQDQ()(model)
    assert {name for _, name, _ in model.functions} == {"Quantize", "QMatMulW8A8"}
    assert all(isinstance(f, ir.Function) for f in model.functions.values())


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


def test_tokens_whose_depth_has_a_name_alone():
    """As after a Reshape to [batch, seq, -1], which inference cannot see through."""
    text = MATMUL.replace("float[m,64] x", "float[m,depth] x")
    assert text != MATMUL
    model = planned(text, {"w": W})
    InsertQDQ()(model)
    RoundToNearest()(model)
    FoldQDQ()(model)
    ours = [node.op_type for node in model.graph if is_ours(node.domain)]
    assert ours == ["Quantize", "QMatMulW8A8"], text_of(model)


def test_leaves_scales_along_another_axis():
    model = with_token_scales()
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and "block_size" in node.attributes:
            node.attributes["axis"] = ir.AttrInt64("axis", 1)
    FoldQDQ()(model)
    assert not any(is_ours(node.domain) for node in model.graph), text_of(model)


def with_token_scales():
    model = planned(MATMUL, {"w": W})
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
    model = planned(
        "g (float[3,64] x) => (float[3,8] y) "
        "{ wf = DequantizeLinear <axis = 1> (w, ws) y = MatMul (x, wf) }",
        {"w": np.ones((64, 8), np.int8), "ws": np.ones(8, np.float32)},
    )
    assert "already quantized in the source" in decision_of(list(model.graph)[-1]).why


def test_a_plan_that_came_to_nothing_is_not_reported_as_done():
    model = planned(MATMUL, {"w": W})
    FoldQDQ()(model)
    (node,) = model.graph
    assert decision_of(node).action == "float"
    assert not decision_of(node).expected


def test_names_that_are_taken():
    """Generated names step aside for the model's own."""
    model = planned(
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
    model = planned(BRANCHES, {"w": W}, target)
    feeds = [X | {"c": np.array(flag)} for flag in (True, False)]
    expected = [run(model, feed)[0] for feed in feeds]
    for rewrite, stage in ((InsertQDQ(), Stage.QDQ), (RoundToNearest(), Stage.QDQ),
                           (FoldQDQ(), Stage.QUANTIZED)):  # fmt: skip
        rewrite(model)
        verify(model, stage, "test")
    for feed, want in zip(feeds, expected, strict=True):
        assert sqnr(want, run(model, feed)[0]) > 15


def test_results_are_typed_where_shape_inference_found_nothing():
    model = planned(
        "g (float[m,64] x) => (float[m,8] z) { y = MatMul (x, w) z = Neg (y) }", {"w": W}
    )
    next(iter(model.graph)).outputs[0].type = None
    for rewrite in (InsertQDQ(), RoundToNearest(), FoldQDQ()):
        rewrite(model)
    verify(model, Stage.QUANTIZED, "fold-qdq")

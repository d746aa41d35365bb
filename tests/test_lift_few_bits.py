"""lift-qoperators: weights of few bits in blocks, in text and in stock ORT."""

import numpy as np
import onnx_ir as ir
import pytest
from foreign import RNG, assert_lifts, foreign
from golden import assert_rewrites, run, sqnr

from qcompiler.ir.decisions import decision_of
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.passes.lift_qoperators import LiftQOperators
from qcompiler.pipeline import Pipeline
from qcompiler.targets.catalog import get_target

LIFT = LiftQOperators(LiftQOperators.Options(float_products=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("points", ["", "zp"])
@pytest.mark.parametrize("k", [64, 40])
def test_matmul_nbits(bits, points, k):
    n, block = 8, 16
    blocks = -(-k // block)
    weights = {
        "w": RNG.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8),
        "s": RNG.uniform(0.01, 0.1, (n, blocks)).astype(np.float32),
        "zp": RNG.integers(0, 256, (n, -(-blocks * bits // 8))).astype(np.uint8),
        "b": RNG.standard_normal(n).astype(np.float32),
    }
    call = f"<K = {k}, N = {n}, bits = {bits}, block_size = {block}>"
    operands = ", ".join(["v2", "v3"] + ["v4"] * bool(points))
    last = 3 + bool(points)
    model = foreign(
        f"g (float[3,{k}] x) => (float[3,{n}] y) "
        f"{{ y = com.microsoft.MatMulNBits {call} (x, w, s, {points}, , b) }}",
        weights,
    )
    feeds = {"x": RNG.standard_normal((3, k)).astype(np.float32)}
    expected = run(model, feeds, plainly=True)[0]
    assert_rewrites(
        LIFT,
        model,
        f"""inputs x
        v{last + 1} = DequantizeLinear {{'axis': '0', 'block_size': '{block}'}} ({operands})
        v{last + 2} = MatMul  (x, v{last + 1})
        y = Add  (v{last + 2}, v{last + 3})
        outputs y""",
    )
    np.testing.assert_allclose(run(model, feeds, plainly=True)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("turn", "op"), [(0, "MatMul"), (1, "MatMulNBits")])
def test_groups_that_are_in_order_are_named_for_nothing(turn, op):
    weights = {
        "w": RNG.integers(0, 256, (8, 2, 16)).astype(np.uint8),
        "s": RNG.uniform(0.01, 0.1, (8, 2)).astype(np.float32),
        "groups": np.roll(np.arange(64) // 32, turn).astype(np.int32),
    }
    call = "<K = 64, N = 8, bits = 4, block_size = 32>"
    model = foreign(
        f"g (float[3,64] x) => (float[3,8] y) {{ y = com.microsoft.MatMulNBits {call} "
        "(x, w, s, , groups) }",
        weights,
    )
    feeds = {"x": RNG.standard_normal((3, 64)).astype(np.float32)}
    expected = run(model, feeds, plainly=True)[0]
    LIFT(model)
    assert model.graph[-1].op_type == op
    np.testing.assert_allclose(run(model, feeds, plainly=True)[0], expected, rtol=1e-4, atol=1e-4)
    if turn:
        assert "g_idx permutes its groups" in decision_of(model.graph[-1]).why


def of_few_bits(level, after="", result="float[3,8] y", points=""):
    weights = {
        "w": RNG.integers(0, 256, (8, 2, 8)).astype(np.uint8),
        "zp": RNG.integers(0, 256, (8, 1)).astype(np.uint8),
        "s": RNG.uniform(0.01, 0.1, (8, 2)).astype(np.float32),
        "v": RNG.standard_normal((8, 8)).astype(np.float32),
    }
    out = "m" if after else "y"
    return foreign(
        f"g (float[n,32] x) => ({result}) {{ {out} = com.microsoft.MatMulNBits "
        f"<K = 32, N = 8, bits = 4, block_size = 16{level}> (x, w, s, {points}) {after} }}".replace(
            ", )", ")"
        ),
        weights,
    )


FEW = {"x": RNG.standard_normal((3, 32)).astype(np.float32)}


@pytest.mark.parametrize("target", ["x86-int8", "x86-int4", "cuda-int8"])
@pytest.mark.parametrize("level", ["", ", accuracy_level = 0", ", accuracy_level = 1"])
@pytest.mark.parametrize("points", ["", "zp"])
def test_a_product_of_floats_answers_with_the_same_bits(level, target, points):
    model = of_few_bits(level, points=points)
    expected = run(model, FEW)[0]
    model = Pipeline.default(get_target(target)).run(model)
    np.testing.assert_array_equal(run(model, FEW)[0], expected)
    (node,) = model.graph
    assert node.op_type == "MatMulNBits" and decision_of(node).action == "qdq"
    assert f"at accuracy_level {level[-1:] or 0} it multiplies floats" in decision_of(node).why


@pytest.mark.parametrize(("level", "said"), [("", "was 0"), (", accuracy_level = 1", "was 1"),
                                             (", accuracy_level = 4", None)])  # fmt: skip
def test_the_accuracy_that_a_product_had(level, said):
    model = of_few_bits(level)
    assert LIFT(model).modified
    FoldQDQ()(model)
    why = decision_of(model.graph[-1]).why
    assert (f"accuracy_level {said}" in why) if said else ("accuracy_level" not in why)


@pytest.mark.parametrize(("points", "op"), [("", "QMatMulW4A16"), ("zp", "QMatMulW4Z4A16")])
def test_a_scheme_of_float_activations_has_an_op_for_it(points, op):
    model = of_few_bits("", points=points)
    expected = run(model, FEW)[0]
    model = Pipeline.default(get_target("cuda-int4")).run(model)
    ops = [node.op_type.split("_")[0] for node in model.graph]
    assert ops == ["Cast", op, "Cast"]  # its floats are float16
    assert decision_of(model.graph[1]).action == "kernel"
    assert sqnr(expected, run(model, FEW, plainly=True)[0]) > 60


@pytest.mark.parametrize("target", ["x86-int4", "arm-int4"])
@pytest.mark.parametrize(("points", "op"), [("", "QMatMulW4A16"), ("zp", "QMatMulW4Z4A16")])
def test_a_product_of_8_bits_answers_with_the_same_bits_too(target, points, op):
    model = of_few_bits(", accuracy_level = 4", points=points)
    expected = run(model, FEW)[0]
    model = Pipeline.default(get_target(target)).run(model)
    assert [node.op_type for node in model.graph] == [op]
    np.testing.assert_array_equal(run(model, FEW)[0], expected)


def test_what_follows_a_product_that_stays_has_a_type():
    model = of_few_bits("", "e = Exp (m) y = LayerNormalization (e, one)", "float[n,8] y")
    for value in (node.outputs[0] for node in model.graph):
        value.type = value.shape = None
    InferShapes()(model)
    product, exp, _ = model.graph
    assert product.op_type == "MatMulNBits" and product.inputs[1].name == "w"
    for node in (product, exp):
        assert node.outputs[0].dtype is ir.DataType.FLOAT and node.outputs[0].shape == ["n", 8]


def test_floats_beside_a_product_that_stays_are_kept():
    model = Pipeline.default(get_target("x86-int8")).run(of_few_bits("", "y = MatMul (m, v)"))
    product = model.graph[-1]
    assert product.op_type == "MatMul"
    assert decision_of(product).why == "the source is quantized, and keeps this op float"


def test_a_branch_keeps_its_own():
    """ORT 1.31 fails to open a model whose branches hold a product with weights in blocks."""
    weights = {
        "w": RNG.integers(0, 256, (8, 2, 8)).astype(np.uint8), "s": np.ones((8, 2), np.float32),
    }  # fmt: skip
    call = "com.microsoft.MatMulNBits <K = 32, N = 8, bits = 4, block_size = 16> (x, w, s)"
    model = foreign(
        f"g (float[3,32] x, bool c) => (float[3,8] y) {{ y = If (c) <then_branch = a () => "
        f"(float[3,8] p) {{ p = {call} }}, else_branch = b () => (float[3,8] n) "
        f"{{ t = {call} n = Neg (t) }}> }}",
        weights,
    )
    assert not LIFT(model).modified
    feeds = {"x": RNG.standard_normal((3, 32)).astype(np.float32), "c": np.array(True)}
    assert run(model, feeds)[0].shape == (3, 8)
    reasons = [decision_of(node).why for node in model.graph.all_nodes()]
    assert sum("inside a branch" in why for why in reasons) == 2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("points", ["", ", zp"])
def test_gather_of_blocks(bits, points):
    weights = {
        "w": RNG.integers(0, 256, (9, 40 * bits // 8)).astype(np.uint8),
        "s": RNG.uniform(0.01, 0.1, (9, 3)).astype(np.float32),
        "zp": RNG.integers(0, 256, (9, -(-3 * bits // 8))).astype(np.uint8),
    }
    model = foreign(
        "g (int64[2,3] i) => (float[2,3,40] y) { y = com.microsoft.GatherBlockQuantized "
        f"<bits = {bits}, block_size = 16, quantize_axis = 1> (w, i, s{points}) }}",
        weights,
    )
    operands = "(v2, v3, v4)" if points else "(v2, v3)"
    assert_lifts(
        model,
        f"""inputs i
        v{5 if points else 4} = DequantizeLinear {{'axis': '1', 'block_size': '16'}} {operands}
        y = Gather {{'axis': '0'}} (v{5 if points else 4}, i)
        outputs y""",
        {"i": np.array([[8, 0, 3], [1, 1, 7]])},
    )


@pytest.mark.parametrize("storage", ["INT4", "UINT4"])
def test_gather_of_a_typed_table(storage):
    kind = ir.DataType[storage].numpy()
    weights = {
        "w": RNG.integers(0, 8, (9, 32)).astype(kind), "zp": np.full((9, 2), 3).astype(kind),
        "s": RNG.uniform(0.01, 0.1, (9, 2)).astype(np.float32),
    }  # fmt: skip
    assert_lifts(
        foreign(
            "g (int64[3] i) => (float[3,32] y) { y = com.microsoft.GatherBlockQuantized "
            "<block_size = 16, quantize_axis = 1> (w, i, s, zp) }",
            weights,
        ),
        """inputs i
        v5 = DequantizeLinear {'axis': '1', 'block_size': '16'} (v2, v3, v4)
        y = Gather {'axis': '0'} (v5, i)
        outputs y""",
        {"i": np.array([8, 0, 3])},
    )


def test_zero_points_in_the_middle_are_none():
    weights = {
        "w": RNG.integers(0, 256, (8, 2, 8)).astype(np.uint8), "s": np.ones((8, 2), np.float32),
        "zp": np.full((8, 1), 0x88, np.uint8),
    }  # fmt: skip
    model = foreign(
        "g (float[3,32] x) => (float[3,8] y) { y = com.microsoft.MatMulNBits "
        "<K = 32, N = 8, bits = 4, block_size = 16> (x, w, s, zp) }",
        weights,
    )
    LIFT(model)
    assert len(next(iter(model.graph)).inputs) == 2

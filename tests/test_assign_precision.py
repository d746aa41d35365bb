import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_rewrites, assert_step, model_of, run, steps_through

from qcompiler.ir.decisions import decision_of, plan_of
from qcompiler.ir.errors import OptionError
from qcompiler.ir.types import PerAxis, PerGroup
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.targets.catalog import TARGETS

W = np.ones((64, 8), np.float32)


def planned(text, weights, target="x86-int8", **options):
    model = model_of(text, weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    AssignPrecision(TARGETS[target].scheme, AssignPrecision.Options(**options))(model)
    return list(model.graph)


MATMUL = "g (float[2,64] x) => (float[2,8] y) { y = MatMul (x, w) }"


def test_int8_is_per_channel_and_per_token():
    (node,) = planned(MATMUL, {"w": W})
    plan = plan_of(node)
    assert plan.weight.storage is ir.DataType.INT8
    assert plan.weight.granularity == PerAxis(1)
    assert plan.weight.range == (-127, 127)
    assert plan.activation.scale == "dynamic"
    assert plan.activation.type.granularity == PerGroup(-1, 64)


@pytest.mark.parametrize(("target", "size"), [("x86-int4", 32), ("cuda-int4", 64)])
def test_int4_takes_the_first_group_size_that_divides(target, size):
    (node,) = planned(MATMUL, {"w": W}, target)
    assert plan_of(node).weight.granularity == PerGroup(0, size)


def test_w4a16_leaves_activations_alone():
    (node,) = planned(MATMUL, {"w": W}, "cuda-int4")
    assert plan_of(node).activation is None


def test_group_size_by_request_even_if_it_does_not_divide():
    (node,) = planned(MATMUL, {"w": W}, "x86-int4", group_size=16)
    assert plan_of(node).weight.granularity == PerGroup(0, 16)
    (node,) = planned(MATMUL, {"w": W}, "x86-int4", group_size=128)
    assert plan_of(node).weight.granularity == PerGroup(0, 128)
    (node,) = planned(MATMUL.replace("64", "72"), {"w": W[:1].repeat(72, 0)}, "x86-int4")
    assert plan_of(node).weight.granularity == PerGroup(0, 32)


@pytest.mark.parametrize(
    ("text", "weights", "why"),
    [
        (
            "g (float[2,64] x, float[64,8] w) => (float[2,8] y) { y = MatMul (x, w) }",
            {},
            "second operand is an activation",
        ),
        (
            "g (float[3,2,64] x) => (float[3,2,8] y) { y = MatMul (x, w) }",
            {"w": np.ones((3, 64, 8), np.float32)},
            "shape [3, 64, 8]",
        ),
        (
            "g (double[2,64] x) => (double[2,8] y) { y = MatMul (x, w) }",
            {"w": np.ones((64, 8))},
            "weight is DOUBLE",
        ),
        ("g (float[64] x) => (float[8] y) { y = MatMul (x, w) }", {"w": W}, "a vector"),
        ("g (float[2,8] x) => (float[2,8] y) { y = Softmax (x) }", {}, "Softmax is sensitive"),
        (
            "g (int64[2] x) => (float[2,8] y) { y = Gather (w, x) }",
            {"w": W},
            "stays float unless a rule of the recipe names its precision",
        ),
        (
            "g (float[1,1,h,8] x) => (float[1,1,m,n] y) "
            '{ t = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (x, w) y = Relu (t) }',
            {"w": np.ones((1, 1, 3, 3), np.float32)},
            "auto_pad",
        ),
        (
            "g (float[1,1,8,8] x) => (float[1,1,6,6] y) { y = Conv (x, w) }",
            {"w": np.ones((1, 1, 3, 3), np.float32)},
            "leaves the graph",
        ),
        (
            "g (float[1,1,8,8] x) => (float[1,1,m,n] y) "
            "{ t = ConvTranspose <strides = [2,1]> (x, w) y = Exp (t) }",
            {"w": np.ones((1, 1, 3, 3), np.float32)},
            "no integer form of ConvTranspose: its axes have different strides, [2, 1]",
        ),
    ],
)
def test_says_why_a_node_stays_float(text, weights, why):
    node = planned(text, weights)[0]
    assert plan_of(node) is None
    assert decision_of(node).action == "float"
    assert why in decision_of(node).why


@pytest.mark.parametrize("pattern", ["node_0", "node_*", "MatMul", "Mat*"])
def test_keep_float_by_name_pattern_or_op(pattern):
    (node,) = planned(MATMUL, {"w": W}, keep_float=(pattern,))
    assert decision_of(node).why == f"kept float by request ({pattern})"


def test_keep_float_takes_the_name_of_merged_products():
    text = "g (float[m,64] x) => (float[m,48] a, float[m,48] b) { a = MatMul (x, w) "
    text += "b = MatMul (x, w) }"
    nodes = planned(text, {"w": W}, keep_float=("node_0 + node_1",))
    assert [node.name for node in nodes] == ["node_0", "node_1"]
    assert all(f"({node.name})" in decision_of(node).why for node in nodes)
    with pytest.raises(OptionError, match="keep_float 'node_2' matches no node name"):
        planned(text, {"w": W}, keep_float=("node_0 + node_2",))


def test_keep_float_that_matches_nothing_is_an_error():
    with pytest.raises(OptionError, match="'Matmul' matches no node.*did you mean 'MatMul'"):
        planned(MATMUL, {"w": W}, keep_float=("Matmul",))


TIED = (
    "g (int64[2] ids) => (float[2,6] y) { x = Gather (table, ids) h = Relu (x) "
    "t = Transpose <perm = [%s]> (table) y = MatMul (h, t) }"
)


@pytest.mark.parametrize(("perm", "keep", "turned"), [
    ("1, 0", (), True), ("0, 1", (), False), ("1, 0", ("MatMul",), False),
])  # fmt: skip
def test_a_weight_that_an_embedding_shares_is_turned_if_it_is_quantized(perm, keep, turned):
    table = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    model = model_of(TIED % perm, {"table": table})
    feeds = {"ids": np.array([3, 5])}
    before = run(model, feeds)
    AssignPrecision(TARGETS["x86-int8"].scheme, AssignPrecision.Options(keep))(model)
    product = model.graph[-1]
    assert (plan_of(product) is not None) == turned
    assert ("Transpose" not in [node.op_type for node in model.graph]) == turned
    assert len(model.graph.initializers) == 1 + turned
    np.testing.assert_array_equal(run(model, feeds)[0], before[0])


PLAN = """# weight quant<int8:float, axis=1, narrow>
# activation dynamic quant<int8:float, axis=-1/64>"""
FEEDS = {"x": np.random.default_rng(1).standard_normal((2, 64), np.float32)}


def assert_plans(text, before, after, feeds=FEEDS):
    model = model_of(text, {"w": W})
    assert_step("assign-precision", model, before, after, feeds, notes=True)


def test_golden_a_plan_and_a_reason_on_an_unchanged_graph():
    assert_plans(
        "g (float[2,64] x) => (float[2,8] y) { p = MatMul (x, w) y = Softmax (p) }",
        """inputs x
        v3 = MatMul  (x, v2)
        y = Softmax  (v3)
        outputs y""",
        f"""inputs x
        v3 = MatMul  (x, v2)
        {PLAN}
        y = Softmax  (v3)
        # float: Softmax is sensitive: not rounded to 8 bits
        outputs y""",
    )


def test_golden_products_without_a_weight_on_the_right():
    before = """inputs x, z
    v3 = MatMul  (x, z)
    y = MatMul  (v4, v3)
    outputs y"""
    after = """inputs x, z
    v3 = MatMul  (x, z)
    # float: its second operand is an activation: no quantized form yet
    y = MatMul  (v4, v3)
    # float, unexpected: its weight is on the left, only right operands are quantized
    outputs y"""
    text = "g (float[8,64] x, float[64,8] z) => (float[64,8] y) { p = MatMul (x, z) "
    feeds = {"x": np.ones((8, 64), np.float32), "z": np.ones((64, 8), np.float32)}
    assert_plans(text + "y = MatMul (w, p) }", before, after, feeds)


def test_golden_a_weight_that_an_embedding_shares():
    # Canonicalizing folds the Transpose of a table as small as this one.
    model = model_of(
        "g (float[2,64] x, int64[2] i) => (float[2,8] y, float[2,64] z) "
        "{ t = Transpose <perm = [1, 0]> (table) y = MatMul (x, t) z = Gather (table, i) }",
        {"table": np.random.default_rng(0).standard_normal((8, 64), np.float32)},
    )
    after = f"""inputs x, i
    y = MatMul  (x, v4)
    {PLAN}
    z = Gather  (v5, i)
    # float: a table stays float unless a rule of the recipe names its precision
    outputs y, z"""
    rewrite, feeds = steps_through("assign-precision")[-1].rewrite, FEEDS | {"i": np.array([3, 5])}
    assert_rewrites(rewrite, model, after, feeds, notes=True)


def test_golden_a_convolution_may_not_leave_the_graph_a_product_may():
    static = "static quant<uint8:float, tensor, asymmetric>"
    weights = {"w": W, "k": np.ones((8, 2, 1, 1), np.float32)}
    feeds = FEEDS | {"i": np.ones((1, 2, 4, 4), np.float32)}
    model = model_of(
        "g (float[2,64] x, float[1,2,4,4] i) => (float[2,8] y, float[1,8,4,4] z, "
        "float[1,8,4,4] r) { y = MatMul (x, w) p = Conv (i, k) z = Sin (p) r = Conv (i, k, b) }",
        weights | {"b": np.ones(8, np.float32)},
    )
    before = """inputs x, i
    y = MatMul  (x, v5)
    v7 = Conv  (i, v6)
    z = Sin  (v7)
    r = Conv  (i, v6, v8)
    outputs y, z, r"""
    after = f"""inputs x, i
    y = MatMul  (x, v5)
    {PLAN}
    v7 = Conv  (i, v6)
    # weight quant<int8:float, axis=0, narrow>
    # activation {static}
    # output {static}
    z = Sin  (v7)
    r = Conv  (i, v6, v8)
    # float: its result leaves the graph
    outputs y, z, r"""
    assert_step("assign-precision", model, before, after, feeds, notes=True)

"""fuse-regions and bind-kernels: what is outlined, what is not, and that the numbers stay."""

import numpy as np
import pytest
from golden import assert_step, model_of, run

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decisions
from qcompiler.ir.region import Region, Step
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.bind_kernels import BindKernels, bound_domain, bound_regions
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.fuse_regions import FuseRegions
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
W, B = RNG.standard_normal((64, 8), dtype=np.float32), RNG.standard_normal(8, dtype=np.float32)
X = {"x": RNG.standard_normal((3, 64), dtype=np.float32)}
R = {"r": RNG.standard_normal((3, 8), dtype=np.float32)}


def folded(text, target="x86-int8", scales="float", **weights):
    model = model_of(text, {"w": W, "b": B} | weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    AssignPrecision(TARGETS[target].scheme, AssignPrecision.Options(scales=scales))(model)
    for rewrite in (InsertQDQ(), RoundToNearest(), FoldQDQ()):
        rewrite(model)
    return model


def everything(region):
    return None


def unread(model):
    return {name for name, value in model.graph.initializers.items() if not value.uses()}


def fused(text, supports=everything, **weights):
    model = folded(text, **weights)
    feeds = X | (R if "float[m,8] r" in text else {})
    before, idle = run(model, feeds), unread(model)
    FuseRegions(supports)(model)
    verify(model, Stage.KERNEL, "fuse-regions")
    assert unread(model) <= idle  # ONNX Runtime warns of each
    for got, want in zip(run(model, feeds), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not FuseRegions(supports)(model).modified
    return [node.op_type for node in model.graph]


def test_grows_over_bias_activation_and_residual():
    ops = fused(
        "g (float[m,64] x, float[m,8] r) => (float[m,8] y) "
        "{ p = MatMul (x, w) a = Add (p, b) h = Gelu (a) y = Add (r, h) }"
    )
    assert ops == ["Quantize_K64", "QMatMulW8A8_K64_N8_AddC_Gelu_AddT"]


def test_repeats_a_scalar_per_channel():
    ops = fused(
        "g (float[m,64] x) => (float[m,8] y) { p = MatMul (x, w) y = Mul (c, p) }", c=np.float32(3)
    )
    assert ops == ["Quantize_K64", "QMatMulW8A8_K64_N8_MulC"]


def test_keeps_the_order_of_a_subtraction():
    ops = fused("g (float[m,64] x) => (float[m,8] y) { p = MatMul (x, w) y = Sub (b, p) }")
    assert ops[1].startswith("QMatMulW8A8_K64_N8_SubC_")


def test_takes_both_ways_to_where_they_join():
    ops = fused(
        "g (float[m,64] x) => (float[m,8] y) "
        "{ p = MatMul (x, w) a = Sigmoid (p) c = Tanh (p) y = Mul (a, c) }"
    )
    assert ops[1].startswith("QMatMulW8A8_K64_N8_Sigmoid_Tanh_Mul_")


def test_a_way_out_on_the_side_ends_a_region():
    ops = fused(
        "g (float[m,64] x) => (float[m,8] y, float[m,8] a) "
        "{ p = MatMul (x, w) a = Sigmoid (p) c = Tanh (p) y = Mul (a, c) }"
    )
    assert ops[1:] == ["QMatMulW8A8_K64_N8", "Sigmoid", "Tanh", "Mul"]


def test_uses_the_result_twice():
    ops = fused("g (float[m,64] x) => (float[m,8] y) { p = MatMul (x, w) y = Mul (p, p) }")
    assert ops[1].startswith("QMatMulW8A8_K64_N8_Mul")


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ("a = Sigmoid (p) y = Mul (p, a)", "Sigmoid_Mul"),
        ("a = HardSigmoid <alpha = 0.1666667> (p) y = Mul (a, p)", "HardSigmoid_Mul"),
        ("a = Add (p, three) c = Clip (a, zero, six) d = Mul (c, p) y = Div (d, six)",
         "AddC_Clip_Mul_DivC"),
        ("a = Add (p, r) c = Tanh (a) y = Sub (a, c)", "AddT_Tanh_Sub"),
    ],
)  # fmt: skip
def test_takes_both_ways_from_a_value(steps, name):
    numbers = {"three": np.float32(3), "six": np.float32(6), "zero": np.float32(0)}
    text = "g (float[m,64] x, float[m,8] r) => (float[m,8] y) { p = MatMul (x, w) "
    (quantize, region) = fused(text + steps + " }", **numbers)
    assert quantize == "Quantize_K64"
    assert region.startswith(f"QMatMulW8A8_K64_N8_{name}_")


@pytest.mark.parametrize(
    "steps",
    [
        "a = Sigmoid (p) c = Relu (p) d = Neg (p) e = Mul (a, c) y = Mul (e, d)",  # three ways
        "a = Sigmoid (p) z = Relu (a) y = Mul (p, a)",  # the side way is read elsewhere
        "a = Softmax (p) y = Mul (p, a)",  # the side way is not elementwise
    ],
)
def test_leaves_other_forks(steps):
    def elementwise(region):
        return "no" if any(step.op == "Softmax" for step in region.steps) else None

    text = "g (float[m,64] x) => (float[m,8] y, float[m,8] z) { p = MatMul (x, w) "
    steps += "" if " z =" in steps else " z = Identity (x8)"
    ops = fused(text + steps + " }", elementwise, x8=np.zeros((3, 8), np.float32))
    assert ops[:2] == ["Quantize_K64", "QMatMulW8A8_K64_N8"]


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        # the product has two readers
        (
            "g (float[m,64] x) => (float[m,8] y, float[m,8] z) "
            "{ p = MatMul (x, w) y = Relu (p) z = Neg (p) }",
            ["Relu", "Neg"],
        ),
        # the product leaves the graph
        (
            "g (float[m,64] x) => (float[m,8] p, float[m,8] y) { p = MatMul (x, w) y = Relu (p) }",
            ["Relu"],
        ),
        # another length: not provably the same shape
        (
            "g (float[m,64] x, float[k,8] r) => (float[m,8] y) "
            "{ p = MatMul (x, w) y = Add (p, r) }",
            ["Add"],
        ),
        # a constant that is no row of channels
        (
            "g (float[m,64] x) => (float[m,8] y) { p = MatMul (x, w) y = Add (p, c) }",
            ["Add"],
        ),
        # reads more than one element
        ("g (float[m,64] x) => (float[m,8] y) { p = MatMul (x, w) y = Softmax (p) }", ["Softmax"]),
    ],
)
def test_stops_where_a_step_does_not_fit(text, rest):
    def elementwise(region):
        return "no" if any(step.op not in ("Relu", "Add") for step in region.steps) else None

    model = folded(text, c=np.ones((3, 8), np.float32))
    FuseRegions(elementwise)(model)
    assert [n.op_type for n in model.graph][2:] == rest


def test_says_why_a_region_has_no_kernel():
    model = folded("g (float[m,64] x) => (float[m,8] y) { y = MatMul (x, w) }")
    assert not FuseRegions(lambda region: f"no kernel for {region.anchor} here")(model).modified
    assert {d.why for d in decisions(model)} == {
        "no kernel for Quantize here",
        "no kernel for QMatMulW8A8 here",
    }


def test_binding_names_the_domain_by_content():
    text = "g (float[m,64] x) => (float[m,8] y) { p = MatMul (x, w) y = Add (p, b) }"
    domains = []
    for fingerprint in ("one", "one", "other"):
        model = folded(text)
        expected = run(model, X)[0]
        FuseRegions(everything)(model)
        assert BindKernels(fingerprint)(model).modified
        assert not BindKernels(fingerprint)(model).modified
        verify(model, Stage.KERNEL, "bind-kernels")
        np.testing.assert_allclose(run(model, X)[0], expected, rtol=1e-5, atol=1e-5)
        domains.append(bound_domain(model))
    assert domains[0] == domains[1] != domains[2]
    assert domains[0].startswith("qcompiler.")
    assert [region.name for region in bound_regions(model)] == [
        "QMatMulW8A8_K64_N8_AddC",
        "Quantize_K64",
    ]
    assert {d.action for d in decisions(model)} == {"kernel"}


def test_region_names_differ_when_regions_do():
    sizes = (("K", 64), ("N", 8))
    chain = Region("QMatMulW8A8", sizes, ("channel",), (Step("Add", (0, -1)),))
    swapped = Region("QMatMulW8A8", sizes, ("channel",), (Step("Add", (-1, 0)),))
    tensor = Region("QMatMulW8A8", sizes, ("tensor",), (Step("Add", (0, -1)),))
    clipped = Region("QMatMulW8A8", sizes, (), (Step("Gelu", (0,), (("approximate", "tanh"),)),))
    exact = Region("QMatMulW8A8", sizes, (), (Step("Gelu", (0,)),))
    names = {region.name for region in (chain, swapped, tensor, clipped, exact)}
    assert len(names) == 5
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize("name", dialect.OPS)
def test_every_op_has_a_body_of_standard_ops(name):
    function = dialect.function_of(name, 21)
    assert all(node.domain == "" for node in function)
    assert [value.name for value in function.inputs] == list(dialect.OPS[name].inputs)
    assert [value.name for value in function.outputs] == list(dialect.OPS[name].outputs)


def assert_outlines(text, before, after, **checks):
    feeds = X | (R if "float[m,8] r" in text else {})
    assert_step("fuse-regions", model_of(text, {"w": W, "b": B}), before, after, feeds, **checks)


def test_golden_a_product_with_its_epilogue():
    assert_outlines(
        "g (float[m,64] x, float[m,8] r) => (float[m,8] y) "
        "{ p = MatMul (x, w) a = Add (p, b) h = Gelu (a) y = Add (r, h) }",
        """inputs x, r
        v3, v4 = qcompiler.Quantize {'block_size': '64'} (x)
        v7 = qcompiler.QMatMulW8A8  (v3, v4, v5, v6)
        v9 = Add  (v7, v8)
        v10 = Gelu  (v9)
        y = Add  (r, v10)
        outputs y""",
        """inputs x, r
        v3, v4 = qcompiler.region.Quantize_K64  (x)
        y = qcompiler.region.QMatMulW8A8_K64_N8_AddC_Gelu_AddT  (v3, v4, v5, v6, v7, r)
        outputs y""",
    )


def test_golden_a_product_that_two_read():
    assert_outlines(
        "g (float[m,64] x) => (float[m,8] y, float[m,8] z) "
        "{ p = MatMul (x, w) a = Add (p, b) y = Relu (a) z = Neg (a) }",
        """inputs x
        v3, v4 = qcompiler.Quantize {'block_size': '64'} (x)
        v7 = qcompiler.QMatMulW8A8  (v3, v4, v5, v6)
        v9 = Add  (v7, v8)
        y = Relu  (v9)
        z = Neg  (v9)
        outputs y, z""",
        """inputs x
        v3, v4 = qcompiler.region.Quantize_K64  (x)
        v8 = qcompiler.region.QMatMulW8A8_K64_N8_AddC  (v3, v4, v5, v6, v7)
        y = Relu  (v8)
        z = Neg  (v8)
        outputs y, z""",
    )


def test_golden_a_product_that_leaves_the_graph():
    assert_outlines(
        "g (float[m,64] x) => (float[m,8] p, float[m,8] y) { p = MatMul (x, w) y = Relu (p) }",
        """inputs x
        v3, v4 = qcompiler.Quantize {'block_size': '64'} (x)
        p = qcompiler.QMatMulW8A8  (v3, v4, v5, v6)
        y = Relu  (p)
        outputs p, y""",
        """inputs x
        v3, v4 = qcompiler.region.Quantize_K64  (x)
        p = qcompiler.region.QMatMulW8A8_K64_N8  (v3, v4, v5, v6)
        y = Relu  (p)
        outputs p, y""",
    )


def test_golden_a_product_without_a_kernel():
    assert_outlines(
        "g (float[m,64] x) => (float[m,8] y) { p = MatMul (x, w) y = Relu (p) }",
        """inputs x
        v2, v3 = qcompiler.Quantize {'block_size': '64'} (x)
        v6 = qcompiler.QMatMulW4A8 {'block_size': '32'} (v2, v3, v4, v5)
        y = Relu  (v6)
        outputs y""",
        """inputs x
        v2, v3 = qcompiler.Quantize {'block_size': '64'} (x)
        # body, unexpected: no arm-int4 kernels yet
        v6 = qcompiler.QMatMulW4A8 {'block_size': '32'} (v2, v3, v4, v5)
        # body, unexpected: no arm-int4 kernels yet
        y = Relu  (v6)
        outputs y""",
        target="arm-int4",
        notes=True,
    )

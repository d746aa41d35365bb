"""fuse-requantize: which products quantize their own result, and that the numbers stay."""

from __future__ import annotations

import numpy as np
import pytest
from golden import assert_step, model_of, run
from test_merge_siblings import FEEDS, WEIGHTS, rewritten
from test_regions import everything, folded

from qcompiler.ir.decisions import decisions
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.fuse_regions import FuseRegions
from qcompiler.passes.fuse_requantize import FuseRequantize, separate_results
from qcompiler.targets.x86 import supports

RNG = np.random.default_rng(7)
MLP = WEIGHTS | {
    "e": RNG.standard_normal((16, 8), np.float32),
    "f": RNG.standard_normal((16, 8), np.float32),
    "mask": np.float32([1] * 15 + [0]),
    "other": np.float32([2] * 16),
    "row": np.ones((1, 16), np.float32),
}
ONE = "g (float[m,64] x) => (float[m,8] p) "
NEXT = "h = MatMul (x, c) i = Add (h, v) j = Relu (i) "


def joined(text: str) -> list[str]:
    """The ops after joining, of ops that make floats of no more than 8 bits."""
    model = folded(text, **MLP)
    FuseRegions(supports)(model)
    return rewritten(model, FuseRequantize(everything))


def first_of(ops: list[str]) -> str:
    assert ops[0] == "Quantize_K64"
    return ops[1]


def test_joins_a_product_with_the_quantize_that_reads_it():
    ops = joined(f"{ONE}{{ {NEXT} p = MatMul (j, e) }}")
    assert ops == [
        "Quantize_K64",
        "RequantizedQMatMulW8A8_K64_N16_AddC_Relu_yqys",
        "QMatMulW8A8_K16_N8",
    ]


def test_two_products_may_read_it():
    text = "g (float[m,64] x) => (float[m,8] p, float[m,8] q) "
    ops = joined(f"{text}{{ {NEXT} p = MatMul (j, e) q = MatMul (j, f) }}")
    assert first_of(ops) == "RequantizedQMatMulW8A8_K64_N16_AddC_Relu_yqys"
    assert ops[2:] == ["QMatMulW8A8_K16_N8"] * 2


def test_stores_what_is_read_elsewhere_too():
    text = "g (float[m,64] x) => (float[m,8] p, float[m,16] z) "
    ops = joined(f"{text}{{ {NEXT} p = MatMul (j, e) z = Sin (j) }}")
    assert first_of(ops) == "RequantizedQMatMulW8A8_K64_N16_AddC_Relu_yyqys"
    assert "Sin" in ops


def test_stores_what_leaves_the_graph():
    text = "g (float[m,64] x) => (float[m,8] p, float[m,16] j) "
    ops = joined(f"{text}{{ {NEXT} p = MatMul (j, e) }}")
    assert first_of(ops) == "RequantizedQMatMulW8A8_K64_N16_AddC_Relu_yyqys"


@pytest.mark.parametrize("product", ["Mul (j, mask)", "Mul (mask, j)"])
def test_takes_in_a_factor_of_each_channel(product):
    text = "g (float[m,64] x) => (float[m,8] p, float[m,16] z) "
    ops = joined(f"{text}{{ {NEXT} k = {product} p = MatMul (k, e) z = Sin (j) }}")
    assert first_of(ops).startswith("RequantizedQMatMulW8A8_K64_N16_smoothed_AddC_Relu_yyqys")
    assert "Mul" not in ops


@pytest.mark.parametrize(
    "between",
    [
        "k = Softmax (j)",
        "i2 = Sin (j) k = Mul (i2, mask)",
        "k = Sin (j)",
    ],
)
def test_leaves_what_is_quantized_otherwise(between):
    ops = joined(f"g (float[m,64] x) => (float[m,8] p) {{ {NEXT} {between} p = MatMul (k, e) }}")
    assert not any(op.startswith("Requantized") for op in ops)


def test_leaves_a_factor_that_may_be_a_matrix_of_one_row():
    """What else reads the result keeps the product from taking it in by itself."""
    text = "g (float[m,64] x) => (float[m,8] p, float[m,16] z) "
    ops = joined(f"{text}{{ {NEXT} k = Mul (j, row) p = MatMul (k, e) z = Sin (j) }}")
    assert not any(op.startswith("Requantized") for op in ops)
    assert "Mul" in ops


def test_branches_may_read_the_integers():
    model = folded(
        f"g (float[m,64] x, bool flag) => (float[m,8] p) {{ {NEXT} p = If (flag) <"
        "then_branch = t () => (float[m,8] y) { y = MatMul (j, e) }, "
        "else_branch = s () => (float[m,8] z) { z = MatMul (j, f) }> }",
        **MLP,
    )
    FuseRegions(supports)(model)
    feeds = FEEDS | {"flag": np.array(True)}
    before = run(model, feeds)
    FuseRequantize(everything)(model)
    verify(model, Stage.KERNEL, "fuse-requantize")
    assert [node.op_type.split("_")[0] for node in model.graph.all_nodes()] == [
        "Quantize", "RequantizedQMatMulW8A8", "If", "QMatMulW8A8", "QMatMulW8A8",
    ]  # fmt: skip
    np.testing.assert_array_equal(run(model, feeds)[0], before[0])


def test_of_two_factors_one_is_taken_in():
    text = "g (float[m,64] x) => (float[m,8] p, float[m,8] q) "
    body = "k = Mul (j, mask) p = MatMul (k, e) l = Mul (j, other) q = MatMul (l, f)"
    ops = joined(f"{text}{{ {NEXT} {body} }}")
    assert first_of(ops).startswith("RequantizedQMatMulW8A8_K64_N16_smoothed_AddC_Relu_yyqys")
    assert [op.split("_")[0] for op in ops[2:]].count("Quantize") == 1
    assert ops.count("Mul") == 1


@pytest.mark.parametrize("between", ["", "k = Mul (j, mask) z = Sin (j)"])
def test_results_are_taken_apart_again(between):
    text = "g (float[m,64] x) => (float[m,8] p, float[m,16] z) " if between else ONE
    last = f"{between} p = MatMul (k, e)" if between else "p = MatMul (j, e)"
    model = folded(f"{text}{{ {NEXT} {last} }}", **MLP)
    FuseRegions(supports)(model)
    FuseRequantize(everything)(model)
    before = run(model, FEEDS)
    separate_results(model)
    verify(model, Stage.KERNEL, "separate_results")
    ops = [node.op_type.split("_")[0] for node in model.graph]
    assert ops[:3] == ["Quantize", "QMatMulW8A8", "Quantize"]
    assert "j" in {value.name for node in model.graph for value in node.outputs}
    for got, want in zip(run(model, FEEDS), before, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("scales", "product"), [
    ("float", "QMatMulW4A8"), ("int8", "QMatMulW4S8A8"),
])  # fmt: skip
def test_products_by_four_bits_quantize_their_results_too(scales, product):
    text = f"{ONE}{{ {NEXT} p = MatMul (j, e) }}"
    model = folded(text, "x86-int4", scales=scales, **MLP)
    FuseRegions(supports)(model)
    before = run(model, FEEDS)
    ops = rewritten(model, FuseRequantize(supports))
    assert first_of(ops) == f"Requantized{product}_K64_N16_G32_AddC_Relu_yqys"
    separate_results(model)
    verify(model, Stage.KERNEL, "separate_results")
    ops = [node.op_type.split("_")[0] for node in model.graph]
    assert ops == ["Quantize", product, "Quantize", product]
    np.testing.assert_array_equal(run(model, FEEDS)[0], before[0])


@pytest.mark.parametrize("supported", [True, False])
def test_asks_for_a_kernel_and_says_what_was_done(supported):
    model = folded(f"{ONE}{{ {NEXT} p = MatMul (j, e) }}", **MLP)
    FuseRegions(supports)(model)
    result = FuseRequantize(lambda region: None if supported else "too wide")(model)
    assert result.modified == supported
    whys = [decision.why for decision in decisions(model)]
    assert supported == any("fused with Add + Relu; quantizes its result" in why for why in whys)


def test_golden_the_two_products_of_an_mlp():
    assert_step(
        "fuse-requantize",
        model_of(ONE + "{ h = MatMul (x, c) i = Add (h, v) p = MatMul (i, e) }", MLP),
        """inputs x
        v2, v3 = qcompiler.region.Quantize_K64  (x)
        v7 = qcompiler.region.QMatMulW8A8_K64_N16_AddC  (v2, v3, v4, v5, v6)
        v8, v9 = qcompiler.region.Quantize_K16  (v7)
        p = qcompiler.region.QMatMulW8A8_K16_N8  (v8, v9, v10, v11)
        outputs p""",
        """inputs x
        v2, v3 = qcompiler.region.Quantize_K64  (x)
        v7, v8 = qcompiler.region.RequantizedQMatMulW8A8_K64_N16_AddC_yqys  (v2, v3, v4, v5, v6)
        p = qcompiler.region.QMatMulW8A8_K16_N8  (v7, v8, v9, v10)
        outputs p""",
        FEEDS,
    )

"""fuse-quantize: which products quantize their own input, and that the numbers stay."""

from __future__ import annotations

import numpy as np
import pytest
from golden import assert_step, model_of
from test_merge_siblings import FEEDS, WEIGHTS, outlined, rewritten
from test_regions import everything

from qcompiler.ir.decisions import decisions
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.fuse_quantize import FuseQuantize
from qcompiler.passes.merge_siblings import MergeSiblings

ONE = "g (float[m,64] x) => (float[m,8] p) "
TWO = "g (float[m,64] x) => (float[m,8] p, float[m,16] q) "


def joined(text: str, *, merge: bool = False) -> list[str]:
    """The ops after joining, of siblings that were merged before if so asked."""
    model = outlined(text)
    if merge:
        MergeSiblings(everything)(model)
    return rewritten(model, FuseQuantize(everything))


def test_joins_a_quantize_with_its_only_reader():
    ops = joined(ONE + "{ i = MatMul (x, a) j = Add (i, u) p = Relu (j) }")
    assert ops == ["DynamicQMatMulW8A8_K64_N8_AddC_Relu"]


def test_joins_it_with_merged_siblings():
    text = TWO + "{ p = MatMul (x, a) q = MatMul (x, c) }"
    assert joined(text, merge=True) == ["DynamicQMatMulW8A8_K64_N24_8x16"]


def test_leaves_what_two_products_read():
    ops = joined(TWO + "{ p = MatMul (x, a) q = MatMul (x, c) }")
    assert ops == ["Quantize_K64", "QMatMulW8A8_K64_N8", "QMatMulW8A8_K64_N16"]


def test_leaves_what_a_branch_reads():
    model = outlined(
        "g (float[m,64] x, bool f) => (float[m,8] p) { h = Neg (x) p = If (f) <"
        "then_branch = t () => (float[m,8] y) { y = MatMul (h, a) }, "
        "else_branch = e () => (float[m,8] z) { z = MatMul (h, d) }> }"
    )
    before = [node.op_type for node in model.graph.all_nodes()]
    FuseQuantize(everything)(model)
    verify(model, Stage.KERNEL, "fuse-quantize")
    assert [node.op_type for node in model.graph.all_nodes()] == before


@pytest.mark.parametrize("supported", [True, False])
def test_asks_for_a_kernel_and_says_what_was_done(supported):
    model = outlined(ONE + "{ p = MatMul (x, a) }")
    result = FuseQuantize(lambda region: None if supported else "too wide")(model)
    assert result.modified == supported
    assert supported == ("quantizes its input" in decisions(model)[-1].why)


def assert_joins(text: str, before: str, after: str | None = None, *, notes: bool = False) -> None:
    model = model_of(text, WEIGHTS | {"wide": np.hstack([WEIGHTS["a"]] * 130)})
    assert_step("fuse-quantize", model, before, after, FEEDS, notes=notes)


def test_golden_a_product_quantizes_its_input():
    assert_joins(
        ONE + "{ i = MatMul (x, a) j = Add (i, u) p = Relu (j) }",
        """inputs x
        v2, v3 = qcompiler.region.Quantize_K64  (x)
        p = qcompiler.region.QMatMulW8A8_K64_N8_AddC_Relu  (v2, v3, v4, v5, v6)
        outputs p""",
        """inputs x
        p = qcompiler.region.DynamicQMatMulW8A8_K64_N8_AddC_Relu  (x, v2, v3, v4)
        # body, unexpected: fused with Add + Relu; quantizes its input
        outputs p""",
        notes=True,
    )


def test_golden_integers_that_two_products_read():
    assert_joins(
        TWO + "{ i = MatMul (x, a) p = Relu (i) q = MatMul (x, c) }",
        """inputs x
        v3, v4 = qcompiler.region.Quantize_K64  (x)
        p = qcompiler.region.QMatMulW8A8_K64_N8_Relu  (v3, v4, v5, v6)
        q = qcompiler.region.QMatMulW8A8_K64_N16  (v3, v4, v7, v8)
        outputs p, q""",
    )


def test_golden_a_product_too_wide_to_quantize():
    assert_joins(
        "g (float[m,64] x) => (float[m,1040] p) { p = MatMul (x, wide) }",
        """inputs x
        v2, v3 = qcompiler.region.Quantize_K64  (x)
        p = qcompiler.region.QMatMulW8A8_K64_N1040  (v2, v3, v4, v5)
        outputs p""",
    )


def test_golden_floats_that_leave_the_graph_and_are_read_elsewhere():
    assert_joins(
        "g (float[m,64] x) => (float[m,64] h, float[m,8] p, float[m,64] z) "
        "{ h = Sin (x) p = MatMul (h, a) z = Cos (h) }",
        """inputs x
        h = Sin  (x)
        v4, v5 = qcompiler.region.Quantize_K64  (h)
        p = qcompiler.region.QMatMulW8A8_K64_N8  (v4, v5, v6, v7)
        z = Cos  (h)
        outputs h, p, z""",
        """inputs x
        h = Sin  (x)
        p = qcompiler.region.DynamicQMatMulW8A8_K64_N8  (h, v4, v5)
        z = Cos  (h)
        outputs h, p, z""",
    )

"""fuse-quantize: which products quantize their own input, and that the numbers stay."""

from __future__ import annotations

import pytest
from test_merge_siblings import outlined, rewritten
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

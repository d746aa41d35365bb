"""merge-siblings: which products become one, which do not, and that the numbers stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_step, model_of, run
from test_regions import everything, folded

from qcompiler.ir.decisions import decisions
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.fuse_regions import FuseRegions
from qcompiler.passes.merge_siblings import MergeSiblings

RNG = np.random.default_rng(1)
WEIGHTS = {
    "a": RNG.standard_normal((64, 8), np.float32),
    "c": RNG.standard_normal((64, 16), np.float32),
    "d": RNG.standard_normal((64, 8), np.float32),
    "u": RNG.standard_normal(8, np.float32),
    "v": RNG.standard_normal(16, np.float32),
    "three": np.float32(3),
}
THREE = "g (float[m,64] x) => (float[m,8] p, float[m,16] q, float[m,8] r) "
TWO = "g (float[m,64] x) => (float[m,8] p, float[m,16] q) "
FEEDS = {"x": RNG.standard_normal((3, 64), np.float32)}


def outlined(text: str) -> ir.Model:
    model = folded(text, **WEIGHTS)
    FuseRegions(everything)(model)
    return model


def rewritten(
    model: ir.Model, rewrite: ir.passes.PassBase, feeds: Mapping[str, Any] = FEEDS
) -> list[str]:
    """The ops after a pass that changes no number, is done in one go and leaves no function."""
    before = run(model, feeds)
    rewrite(model)
    verify(model, Stage.KERNEL, type(rewrite).__name__)
    for got, want in zip(run(model, feeds), before, strict=True):
        np.testing.assert_array_equal(got, want)
    assert not rewrite(model).modified
    assert len(model.functions) == len({node.op_type for node in model.graph if node.domain})
    return [node.op_type for node in model.graph]


def merged(text: str) -> list[str]:
    """The ops after merging."""
    return rewritten(outlined(text), MergeSiblings(everything))


def test_merges_products_of_one_input():
    ops = merged(THREE + "{ p = MatMul (x, a) q = MatMul (x, c) r = MatMul (x, d) }")
    assert ops == ["Quantize_K64", "QMatMulW8A8_K64_N32_8x16x8"]


def test_fills_a_missing_bias_or_factor_with_one_that_changes_nothing():
    ops = merged(
        THREE + "{ i = MatMul (x, a) j = Add (i, u) p = Mul (j, three) "
        "q = MatMul (x, c) k = MatMul (x, d) r = Add (k, u) }"
    )
    assert ops == ["Quantize_K64", "QMatMulW8A8_K64_N32_AddC_MulC_8x16x8"]


@pytest.mark.parametrize("group", [16, 32])
def test_merges_products_of_floats_where_groups_are_the_same(group):
    rng = np.random.default_rng(2)
    codes = {
        name: rng.integers(-8, 8, (64, n)).astype(ml_dtypes.int4)
        for name, n in (("a", 8), ("c", 16))
    }
    scales = {
        "s": rng.random((4, 8), np.float32),
        "t": rng.random((64 // group, 16), np.float32),
    }
    model = model_of(
        TWO + "{ f = DequantizeLinear <axis = 0, block_size = 16> (a, s) p = MatMul (x, f) "
        f"h = DequantizeLinear <axis = 0, block_size = {group}> (c, t) q = MatMul (x, h) }}",
        codes | scales,
    )
    FoldQDQ()(model)
    FuseRegions(everything)(model)
    ops = rewritten(model, MergeSiblings(everything))
    if group == 16:
        assert ops == ["QMatMulW4A16_K64_N24_G16_8x16"]
    else:
        assert ops == ["QMatMulW4A16_K64_N8_G16", "QMatMulW4A16_K64_N16_G32"]


def test_merges_products_by_four_bits():
    model = folded(TWO + "{ p = MatMul (x, a) q = MatMul (x, c) }", "x86-int4", **WEIGHTS)
    FuseRegions(everything)(model)
    ops = rewritten(model, MergeSiblings(everything))
    assert ops == ["Quantize_K64", "QMatMulW4A8_K64_N24_G32_8x16"]


def test_says_which_products_it_merged():
    model = outlined(TWO + "{ p = MatMul (x, a) q = MatMul (x, c) }")
    MergeSiblings(everything)(model)
    decision = decisions(model)[-1]
    assert (decision.node, decision.why) == ("node_0 + node_1", "2 products of one input")


@pytest.mark.parametrize(
    "text",
    [
        TWO + "{ p = MatMul (x, a) y = Neg (x) q = MatMul (y, c) }",  # two inputs
        TWO + "{ i = MatMul (x, a) p = Relu (i) q = MatMul (x, c) }",  # an activation of one
        TWO + "{ i = MatMul (x, a) p = Relu (i) j = MatMul (x, c) q = Tanh (j) }",
        # one needs the other's result
        "g (float[m,64] x) => (float[m,8] q) "
        "{ p = MatMul (x, a) z = Sigmoid (p) r = MatMul (x, d) q = Mul (r, z) }",
    ],
)
def test_leaves_others_alone(text):
    model = outlined(text)
    before = [node.op_type for node in model.graph]
    assert merged(text) == before


def test_leaves_what_has_no_kernel():
    model = outlined(TWO + "{ p = MatMul (x, a) q = MatMul (x, c) }")
    assert not MergeSiblings(lambda region: "no" if region.widths else None)(model).modified


def test_merges_only_within_a_branch():
    text = (
        "g (float[m,64] x, bool f) => (float[m,8] p, float[m,16] q) { p = MatMul (x, a) "
        "q = If (f) <then_branch = t () => (float[m,16] y) { y = MatMul (x, c) }, "
        "else_branch = e () => (float[m,16] z) { z = MatMul (x, c) }> }"
    )
    model = outlined(text)
    MergeSiblings(everything)(model)
    verify(model, Stage.KERNEL, "merge-siblings")
    assert not any(node.op_type.endswith("8x16") for node in model.graph.all_nodes())


WIDE = {"w": np.hstack([WEIGHTS["a"]] * 6), "v": np.hstack([WEIGHTS["d"]] * 12),
        "b": np.hstack([WEIGHTS["u"]] * 6)}  # fmt: skip


def assert_merges(text: str, before: str, after: str | None = None, *, notes: bool = False) -> None:
    assert_step("merge-siblings", model_of(text, WIDE), before, after, FEEDS, notes=notes)


def test_golden_two_products_become_one_with_two_results():
    assert_merges(
        "g (float[m,64] x) => (float[m,48] y, float[m,96] z) "
        "{ p = MatMul (x, w) y = Add (p, b) q = MatMul (x, v) z = Sin (q) }",
        """inputs x
        v3, v4 = qcompiler.region.Quantize_K64  (x)
        y = qcompiler.region.QMatMulW8A8_K64_N48_AddC  (v3, v4, v5, v6, v7)
        v10 = qcompiler.region.QMatMulW8A8_K64_N96  (v3, v4, v8, v9)
        z = Sin  (v10)
        outputs y, z""",
        """inputs x
        v3, v4 = qcompiler.region.Quantize_K64  (x)
        # body, unexpected: outlined
        y, v8 = qcompiler.region.QMatMulW8A8_K64_N144_AddC_48x96  (v3, v4, v5, v6, v7)
        # body, unexpected: 2 products of one input
        z = Sin  (v8)
        outputs y, z""",
        notes=True,
    )


def test_golden_products_with_different_activations():
    assert_merges(
        "g (float[m,64] x) => (float[m,48] y, float[m,96] z) "
        "{ p = MatMul (x, w) y = Relu (p) z = MatMul (x, v) }",
        """inputs x
        v3, v4 = qcompiler.region.Quantize_K64  (x)
        y = qcompiler.region.QMatMulW8A8_K64_N48_Relu  (v3, v4, v5, v6)
        z = qcompiler.region.QMatMulW8A8_K64_N96  (v3, v4, v7, v8)
        outputs y, z""",
    )


def test_golden_products_of_different_inputs_that_share_a_weight():
    assert_merges(
        "g (float[m,64] x) => (float[m,48] y, float[m,48] z) "
        "{ y = MatMul (x, w) n = Sin (x) z = MatMul (n, w) }",
        """inputs x
        v3, v4 = qcompiler.region.Quantize_K64  (x)
        y = qcompiler.region.QMatMulW8A8_K64_N48  (v3, v4, v5, v6)
        v7 = Sin  (x)
        v8, v9 = qcompiler.region.Quantize_K64  (v7)
        z = qcompiler.region.QMatMulW8A8_K64_N48  (v8, v9, v5, v6)
        outputs y, z""",
    )


def test_golden_a_result_that_leaves_the_graph_and_one_that_two_read():
    assert_merges(
        "g (float[m,64] x) => (float[m,48] p, float[m,48] y, float[m,96] r, float[m,96] s) "
        "{ p = MatMul (x, w) y = Sin (p) q = MatMul (x, v) r = Cos (q) s = Neg (q) }",
        """inputs x
        v5, v6 = qcompiler.region.Quantize_K64  (x)
        p = qcompiler.region.QMatMulW8A8_K64_N48  (v5, v6, v7, v8)
        y = Sin  (p)
        v11 = qcompiler.region.QMatMulW8A8_K64_N96  (v5, v6, v9, v10)
        r = Cos  (v11)
        s = Neg  (v11)
        outputs p, y, r, s""",
        """inputs x
        v5, v6 = qcompiler.region.Quantize_K64  (x)
        p, v9 = qcompiler.region.QMatMulW8A8_K64_N144_48x96  (v5, v6, v7, v8)
        y = Sin  (p)
        r = Cos  (v9)
        s = Neg  (v9)
        outputs p, y, r, s""",
    )

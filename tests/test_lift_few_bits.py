"""lift-qoperators: weights of few bits in blocks, in text and in stock ORT."""

import numpy as np
import onnx_ir as ir
import pytest
from foreign import RNG, assert_lifts, foreign
from golden import assert_rewrites, run

from qcompiler.ir.decisions import decision_of
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.lift_qoperators import LiftQOperators


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
        LiftQOperators(),
        model,
        f"""inputs x
        v{last + 1} = DequantizeLinear {{'axis': '0', 'block_size': '{block}'}} ({operands})
        v{last + 2} = MatMul  (x, v{last + 1})
        y = Add  (v{last + 2}, v{last + 3})
        outputs y""",
    )
    np.testing.assert_allclose(run(model, feeds, plainly=True)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("level", "said"), [("", "was 0"), (", accuracy_level = 1", "was 1"),
                                             (", accuracy_level = 4", None)])  # fmt: skip
def test_the_accuracy_that_a_product_had(level, said):
    weights = {
        "w": RNG.integers(0, 256, (8, 2, 8)).astype(np.uint8),
        "s": RNG.uniform(0.01, 0.1, (8, 2)).astype(np.float32),
    }
    model = foreign(
        "g (float[3,32] x) => (float[3,8] y) { y = com.microsoft.MatMulNBits "
        f"<K = 32, N = 8, bits = 4, block_size = 16{level}> (x, w, s) }}",
        weights,
    )
    LiftQOperators()(model)
    FoldQDQ()(model)
    why = decision_of(model.graph[-1]).why
    assert (f"accuracy_level {said}" in why) if said else ("accuracy_level" not in why)


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
    assert not LiftQOperators()(model).modified
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
    LiftQOperators()(model)
    assert len(next(iter(model.graph)).inputs) == 2

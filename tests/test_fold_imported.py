"""fold-qdq on what others quantized: what is folded, what is left and why, and the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_rewrites, model_of, run, text_of
from test_regions import everything

from qcompiler.ir.decisions import decision_of, plan_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.fuse_regions import FuseRegions
from qcompiler.passes.merge_siblings import MergeSiblings
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(3)
F4 = np.float32
STEP = 0.05
MATRIX = {
    "xs": F4(0.03), "xz": np.uint8(120),
    "w": RNG.integers(-127, 128, (64, 8)).astype(np.int8), "ws": RNG.uniform(0.5, 1, 8).astype(F4),
    "wt": RNG.integers(-127, 128, (8, 64)).astype(np.int8),
    "wone": F4(0.5), "wz0": np.zeros(8, np.int8), "wz": RNG.integers(-4, 5, 8).astype(np.int8),
    "wsmall": RNG.integers(-90, 90, (64, 8)).astype(np.int8),
    "wu": RNG.integers(20, 230, (64, 8)).astype(np.uint8), "wuz": np.full(8, 125, np.uint8),
    "wide": np.repeat(np.uint8([[0], [255]]), 32, 0) * np.ones((1, 8), np.uint8),
    "b": RNG.standard_normal(8).astype(F4),
    "bi": RNG.integers(-900, 900, 8).astype(np.int32), "bs": np.full(8, 0.02, F4),
    "ys": F4(STEP), "yz": np.uint8(128), "vs": F4(0.1), "vz": np.uint8(100),
}  # fmt: skip
X = {"x": RNG.standard_normal((3, 64)).astype(F4)}
STATIC = "q = QuantizeLinear (x, xs, xz) d = DequantizeLinear (q, xs, xz) "
DYNAMIC = "q, s, z = DynamicQuantizeLinear (x) d = DequantizeLinear (q, s, z) "
BY_COLUMN = "f = DequantizeLinear <axis = 1> (w, ws) "
HEAD = "g (float[3,64] x) => (float[3,8] y) "


def model(body: str, head: str = HEAD, **changes: Any) -> ir.Model:
    return model_of(f"{head}{{ {body} }}", MATRIX | changes)


def folded(body: str, feeds: Mapping[str, Any] = X, head: str = HEAD, steps: float = 0.0,
           plainly: bool = True, **changes: Any) -> tuple[list[str], str]:  # fmt: skip
    """The ops after folding, and what is said of them; results differ by at most `steps` steps."""
    subject = model(body, head, **changes)
    before = run(subject, feeds, plainly=plainly)
    FoldQDQ()(subject)
    verify(subject, Stage.QUANTIZED, "fold-qdq")
    for got, want in zip(run(subject, feeds), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-4 + steps * STEP * 1.001)
    printed = text_of(subject)
    assert not FoldQDQ()(subject).modified
    assert text_of(subject) == printed
    ops = [node.op_type for node in subject.graph]
    return ops, "\n".join(decision_of(node).why for node in subject.graph)


@pytest.mark.parametrize(
    ("quantized", "first", "activations"),
    [
        (STATIC, "v4 = QuantizeLinear  (x, v2, v3)", "v4, v2, v3"),
        (DYNAMIC, "v2, v3, v4 = DynamicQuantizeLinear  (x)", "v2, v3, v4"),
    ],
)
def test_one_scale_and_a_matrix(quantized: str, first: str, activations: str) -> None:
    before = model(f"{quantized}{BY_COLUMN}y = MatMul (d, f)")
    product = f"y = qcompiler.QMatMulU8S8  ({activations}, v5, v6)"
    after = f"inputs x\n{first}\n{product}\noutputs y"
    # The sums are equal; ORT multiplies the scales in another order.
    assert_rewrites(FoldQDQ(), before, after, X, exact=False, floor_db=110)


@pytest.mark.parametrize(
    "weight",
    [
        "f = DequantizeLinear (w, wone)",
        "f = DequantizeLinear <axis = -1> (w, ws)",
        "f = DequantizeLinear <axis = 1> (w, ws, wz0)",
        "f = DequantizeLinear <axis = 1> (wsmall, ws, wz)",
        "f = DequantizeLinear <axis = 1> (wu, ws, wuz)",
    ],
)
@pytest.mark.parametrize("quantized", [STATIC, DYNAMIC])
def test_weights_of_every_kind(quantized: str, weight: str) -> None:
    ops, _ = folded(f"{quantized}{weight} y = MatMul (d, f)")
    assert ops[-1] == "QMatMulU8S8"
    assert len(ops) == 2


@pytest.mark.parametrize(
    "product",
    [
        "f = DequantizeLinear (wide, wone, wz1) y = MatMul (d, f)",
        "f = DequantizeLinear <axis = 1> (wide, ws, wz2) y = MatMul (d, f)",
        "f = DequantizeLinear <axis = 1> (w, ws, wz3) y = MatMul (d, f)",
        "f = DequantizeLinear <axis = 0> (wt, ws, wz3) y = Gemm <transB = 1> (d, f)",
    ],
)
@pytest.mark.parametrize("quantized", [STATIC, DYNAMIC])
def test_weights_that_do_not_fit_int8(quantized: str, product: str) -> None:
    zeros = {"wz1": np.uint8(100), "wz2": np.full(8, 99, np.uint8), "wz3": np.full(8, 99, np.int8)}
    ops, _ = folded(f"{quantized}{product}", **zeros)
    assert ops[1:] == ["QMatMulU8U8"]


@pytest.mark.parametrize(
    "gemm",
    [
        "y = Gemm <transB = 1> (d, h, b)",
        "y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (d, h, b)",
        "y = Gemm <transB = 1> (d, h)",
        "g = DequantizeLinear <axis = 0> (bi, bs) y = Gemm <transB = 1> (d, h, g)",
        "y = Gemm <alpha = 0.5> (d, f, b)",
        "c = Neg (b) y = Gemm (d, f, c)",
    ],
)
def test_gemm_becomes_a_product_and_a_sum(gemm: str) -> None:
    body = f"{STATIC}{BY_COLUMN}h = DequantizeLinear <axis = 0> (wt, ws) {gemm}"
    ops, _ = folded(body)
    sums = ["Add"] if ops[-1] == "Add" else []
    assert [op for op in ops if op != "Neg"] == ["QuantizeLinear", "QMatMulU8S8", *sums]


def test_an_int32_bias_after_a_product_is_added_as_floats() -> None:
    bias = "p = MatMul (d, f) g = DequantizeLinear <axis = 0> (bi, bs) y = Add (p, g)"
    assert folded(f"{STATIC}{BY_COLUMN}{bias}")[0] == ["QuantizeLinear", "QMatMulU8S8", "Add"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (BY_COLUMN + "y = MatMul (x, f)", "ORT's own MatMulNBits"),
        (STATIC + BY_COLUMN + "t = Transpose (d) y = Gemm <transA = 1> (t, f)", "not quantized"),
        (STATIC + "t = Transpose (x) r = QuantizeLinear (t, vs, vz) "
         "e = DequantizeLinear (r, vs, vz) y = MatMul (d, e)",
         "both its operands are activations: ORT's own MatMulIntegerToFloat"),
    ],
)  # fmt: skip
def test_what_is_left_says_why(body: str, reason: str) -> None:
    head = HEAD if "(d, e)" not in body else "g (float[3,64] x) => (float[3,3] y) "
    # MatMulNBits rounds floats that it is given.
    plainly = "MatMulNBits" not in reason
    ops, why = folded(body, head=head, steps=0.01, plainly=plainly)
    assert "QMatMulU8S8" not in ops
    assert reason in why


def test_constants_that_ort_would_dequantize_every_run_become_floats() -> None:
    body = "e = DequantizeLinear (g8, ts) y = LayerNormalization <axis = -1> (x, e)"
    subject = model(body, "g (float[3,64] x) => (float[3,64] y) ", ts=F4(0.1),
                    g8=np.arange(64).astype(np.int8))  # fmt: skip
    before = run(subject, X)[0]
    assert FoldQDQ()(subject).modified
    assert [node.op_type for node in subject.graph] == ["LayerNormalization"]
    assert "kept as floats" in decision_of(subject.graph[0]).why
    np.testing.assert_array_equal(run(subject, X)[0], before)


@pytest.mark.parametrize(
    ("weight", "anchor"),
    [("f = DequantizeLinear <axis = 1> (w, ws)", "QMatMulU8S8"),
     ("f = DequantizeLinear (wide, wone, wz1)", "QMatMulU8U8")],
)  # fmt: skip
def test_bias_activation_and_siblings_join_as_with_our_own(weight: str, anchor: str) -> None:
    body = f"{DYNAMIC}{weight} m = MatMul (d, f) a = Add (m, b) n = MatMul (d, f) c = Add (n, b)"
    head = "g (float[3,64] x) => (float[3,8] a, float[3,8] c) "
    subject = model(body, head, wz1=np.uint8(100))
    before = run(subject, X)
    for rewrite in (FoldQDQ(), FuseRegions(everything), MergeSiblings(everything)):
        rewrite(subject)
    verify(subject, Stage.KERNEL, "merge-siblings")
    ops = [node.op_type for node in subject.graph]
    assert ops == ["DynamicQuantizeLinear", f"{anchor}_K64_N16_AddC_8x8"]
    for got, want in zip(run(subject, X), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-4)


def test_what_a_quantized_source_keeps_float_stays_float() -> None:
    body = f"{STATIC}{BY_COLUMN}a = MatMul (d, f) v = Relu (a) y = MatMul (v, wf)"
    subject = model(body, wf=np.ones((8, 8), F4))
    AssignPrecision(TARGETS["x86-int8"].scheme)(subject)
    *_, last = subject.graph
    assert plan_of(last) is None
    assert decision_of(last).why == "the source is quantized, and keeps this op float"


@pytest.mark.parametrize(
    ("result", "left"),
    [
        ("m = MatMul (d, f) r = QuantizeLinear (m, ys, yz) y = DequantizeLinear (r, ys, yz)", True),
        ("y = MatMul (d, f)", False),  # pairs and then floats: ORT may take them for a float Gemm
    ],
)
def test_products_that_are_to_be_left_to_ort(result: str, left: bool) -> None:
    subject = model(f"{STATIC}{BY_COLUMN}{result}")
    before = run(subject, X)[0]
    assert FoldQDQ("slower here")(subject).modified != left
    found = [node for node in subject.graph if node.op_type in ("MatMul", "QMatMulU8S8")]
    assert [node.op_type for node in found] == ["MatMul" if left else "QMatMulU8S8"]
    if left:
        assert decision_of(found[0]).why == "slower here: ORT's own QLinearMatMul"
    np.testing.assert_allclose(run(subject, X)[0], before, rtol=3e-6, atol=1e-4)

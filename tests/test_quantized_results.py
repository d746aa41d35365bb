"""fuse-regions and merge-siblings where what reads a product quantizes it by constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_step, run
from test_fold_imported import BY_COLUMN, F4, HEAD, STATIC, X, model

from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.fuse_regions import FuseRegions
from qcompiler.passes.merge_siblings import MergeSiblings
from qcompiler.pipeline import Pipeline
from qcompiler.targets.catalog import get_target, unsupported

STORED = "g (float[3,64] x) => (uint8[3,8] y) "
PRODUCT = f"{STATIC}{BY_COLUMN}p = MatMul (d, f) "
PAIR = "r = QuantizeLinear (p, ys, yz) e = DequantizeLinear (r, ys, yz) "
BIASED = f"{PRODUCT}{PAIR}bd = DequantizeLinear <axis = 0> (bi, bs) a = Add (e, bd) "
ONCE = "QMatMulU8S8_K64_N8_QuantizeLinearCC"


def fused(body: str, head: str = STORED, **changes: Any) -> list[str]:
    """The ops from the product on; integers are those of the ops apart, floats to the last bits."""
    subject = model(body, head, **changes)
    FoldQDQ()(subject)
    before = run(subject, X, plainly=True)
    rewrite = FuseRegions(lambda region: unsupported(get_target("x86-int8"), region))
    rewrite(subject)
    verify(subject, Stage.KERNEL, "fuse-regions")
    for got, want in zip(run(subject, X, plainly=True), before, strict=True):
        if want.dtype == np.uint8:
            np.testing.assert_array_equal(got, want)
        else:
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not rewrite(subject).modified
    ops = [node.op_type for node in subject.graph]
    return ops[next(i for i, op in enumerate(ops) if op.startswith("QMatMul")) :]


def test_golden_bias_between_pairs() -> None:
    name = f"{ONCE}_DequantizeLinearCC_AddC_QuantizeLinearCC"
    assert_step(
        "fuse-regions",
        model(f"{BIASED}y = QuantizeLinear (a, vs, vz)", STORED),
        """inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v7 = qcompiler.QMatMulU8S8  (v4, v2, v3, v5, v6)
        v10 = QuantizeLinear  (v7, v8, v9)
        v11 = DequantizeLinear  (v10, v8, v9)
        v13 = Add  (v11, v12)
        y = QuantizeLinear  (v13, v14, v15)
        outputs y""",
        f"""inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        y = qcompiler.region.{name}  (v4, v2, v3, v5, v6, v7, v8, v7, v8, v9, v10, v11)
        outputs y""",
        X,
    )


def test_ends_where_it_is_least_to_store() -> None:
    assert fused(f"{PRODUCT}{PAIR}y = Identity (e)", HEAD) == [ONCE, "DequantizeLinear", "Identity"]
    assert fused(f"{BIASED}y = Identity (a)", HEAD)[0] == (
        "QMatMulU8S8_K64_N8_QuantizeLinearCC_DequantizeLinearCC_AddC"
    )


def test_an_output_of_the_graph() -> None:
    head = "g (float[3,64] x) => (uint8[3,8] y, uint8[3,8] r) "
    ops = fused(f"{BIASED}y = QuantizeLinear (a, vs, vz)", head)
    assert ops == [ONCE, "DequantizeLinear", "Add", "QuantizeLinear"]


def test_two_that_dequantize_the_result() -> None:
    head = "g (float[3,64] x) => (uint8[3,8] y, float[3,8] z) "
    ops = fused(f"{BIASED}z = DequantizeLinear (r, ys, yz) y = QuantizeLinear (a, vs, vz)", head)
    assert ops[0] == ONCE


def test_two_that_dequantize_the_result_and_join() -> None:
    second = "h = DequantizeLinear (r, ys, yz) "
    first, *rest = fused(f"{BIASED}{second}c = Mul (a, h) y = QuantizeLinear (c, vs, vz)")
    assert "_AddC_DequantizeLinearCC_Mul_" in first
    assert rest == ["QuantizeLinear"]  # its operands would be the eighth and ninth


def test_leaves_what_ort_adds_as_integers() -> None:
    residual = "i = QuantizeLinear (x8, vs, vz) j = DequantizeLinear (i, vs, vz) "
    body = f"{residual}{PRODUCT}{PAIR}a = Add (e, j) y = QuantizeLinear (a, vs, vz)"
    ops = fused(body, x8=np.ones((3, 8), F4))
    assert ops == [ONCE, "DequantizeLinear", "Add", "QuantizeLinear"]


@pytest.mark.parametrize(
    ("quantize", "changes"),
    [
        ("QuantizeLinear <axis = 1> (p, bs, z8)", {"z8": np.full(8, 3, np.uint8)}),
        ("QuantizeLinear (p, ys)", {}),
        ("QuantizeLinear (p, small, yz)", {"small": F4(1e-35)}),
    ],
)
def test_leaves_other_scales(quantize: str, changes: dict[str, Any]) -> None:
    assert fused(f"{PRODUCT}y = {quantize}", **changes) == [
        "QMatMulU8S8_K64_N8", "QuantizeLinear"
    ]  # fmt: skip


def test_one_column() -> None:
    """Whose zero point has the shape of one value per channel, but is no float."""
    body = f"{STATIC}f = DequantizeLinear (w1, wone) p = MatMul (d, f) y = QuantizeLinear (p, t, z)"
    changes = {"w1": np.ones((64, 1), np.int8), "t": F4([0.05]), "z": np.uint8([128])}
    ops = fused(body, "g (float[3,64] x) => (uint8[3,1] y) ", **changes)
    assert ops == ["QMatMulU8S8_K64_N1_QuantizeLinearCC"]


def test_leaves_integers_with_a_sign() -> None:
    head = "g (float[3,64] x) => (int8[3,8] y) "
    body = f"{PRODUCT}y = QuantizeLinear (p, ys, signed)"
    assert fused(body, head, signed=np.int8(0)) == ["QMatMulU8S8_K64_N8", "QuantizeLinear"]


def test_leaves_a_scale_that_is_computed() -> None:
    body = f"{PRODUCT}t = ReduceMax <keepdims = 0> (x) y = QuantizeLinear (p, t, yz)"
    assert "QMatMulU8S8_K64_N8" in fused(body)


def test_siblings_with_scales_of_their_own() -> None:
    """Each has its scale, as that of its columns."""
    body = (
        f"{PRODUCT}{PAIR}y = QuantizeLinear (e, vs, vz) "
        "o = MatMul (d, f) oq = QuantizeLinear (o, vs, vz) od = DequantizeLinear (oq, vs, vz) "
        "z = QuantizeLinear (od, ys, yz)"
    )
    subject = model(body, "g (float[3,64] x) => (uint8[3,8] y, uint8[3,8] z) ")
    FoldQDQ()(subject)
    before = run(subject, X, plainly=True)
    FuseRegions(lambda region: None)(subject)
    assert MergeSiblings(lambda region: None)(subject).modified
    verify(subject, Stage.KERNEL, "merge-siblings")
    for got, want in zip(run(subject, X, plainly=True), before, strict=True):
        np.testing.assert_array_equal(got, want)
    (product,) = (node for node in subject.graph if node.domain)
    assert product.op_type == (
        "QMatMulU8S8_K64_N16_QuantizeLinearCC_DequantizeLinearCC_QuantizeLinearCC_8x8"
    )
    assert {value.dtype for value in product.outputs} == {ir.DataType.UINT8}


def test_no_such_kernel_for_gpus() -> None:
    from qcompiler.ir.region import Region, Step

    steps = (Step("QuantizeLinear", (0, -1, -2)),)
    region = Region("QMatMulW8A8", (("K", 64), ("N", 64)), ("channel",) * 2, steps, flags=("f16",))
    assert "quantized by constants" in str(unsupported(get_target("cuda-int8"), region))
    assert Pipeline.default("cuda-int8")

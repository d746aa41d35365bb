"""fuse-norms in float16: what convert-float16 leaves is one op for GPUs; the numbers stay."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of, run, sqnr, text_of
from onnx_ir.passes import common

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decision_of, region_of
from qcompiler.ir.region import HALF
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.convert_float16 import ConvertFloat16
from qcompiler.passes.fuse_norms import FuseNorms
from qcompiler.passes.fuse_regions import FuseRegions
from qcompiler.targets import cuda

RNG = np.random.default_rng(0)
K = 64
WEIGHTS = {
    "gamma": RNG.uniform(0.5, 1, K).astype(np.float32),
    "beta": RNG.standard_normal(K, dtype=np.float32),
    "factor": RNG.uniform(0.1, 1, K).astype(np.float32),
    "w": RNG.integers(-100, 100, (K, K)).astype(np.int8),
    "ws": RNG.uniform(0.01, 0.02, K).astype(np.float32),
    "two": np.float32(2), "eps": np.float32(1e-5), "axis": np.array([-1]),
}  # fmt: skip
FEEDS = {name: RNG.standard_normal((3, 5, K), dtype=np.float32) for name in "ab"}
LAYER_NORM = "n = LayerNormalization <axis = -1> (h, gamma, beta) "
RMS_NORM = ("s2 = Pow(h, two) mean = ReduceMean(s2, axis) over = Add(mean, eps) root = Sqrt(over) "
            "unit = Div(h, root) n = Mul(unit, gamma) ")  # fmt: skip
PRODUCT = (
    f"q, s = qcompiler.Quantize <block_size = {K}> (n) p = qcompiler.QMatMulW8A8(q, s, w, ws) "
)
FP8 = f"q, s = qcompiler.QuantizeFp8 <block_size = {K}> (n) y = Cast<to = 1>(q) "


def supports(region):
    return cuda.supports(region) if HALF in region.flags else "not in float16"


def fused(body, result="y", **weights):
    """The model after the passes, its numbers kept."""
    text = f"g (float[m,n,{K}] a, float[m,n,{K}] b) => (float[m,n,{K}] {result}) {{ {body} }}"
    model = model_of(text, WEIGHTS | weights)
    for node in model.graph:
        node.name = node.outputs[0].name
        if node.domain:
            dialect.type_results(node, node.op_type)
    common.ShapeInferencePass(strict_mode=False)(model)
    ConvertFloat16()(model)
    FuseRegions(supports)(model)
    before = run(model, FEEDS, plainly=True)
    rewrite = FuseNorms(supports)
    modified = rewrite(model).modified
    verify(model, Stage.KERNEL, "fuse-norms")
    text = text_of(model)
    assert not rewrite(model).modified
    assert text_of(model) == text
    for got, want in zip(run(model, FEEDS, plainly=True), before, strict=True):
        assert sqnr(want, got) > 45  # a tie between two steps may fall the other way
    regions = {
        region.anchor: region for node in model.graph if (region := region_of(node)) is not None
    }
    return model, regions, modified


RESIDUAL = "h = Add(a, b) "
LAST = "r = Mul(h, h) y = Add(p, r) "


@pytest.mark.parametrize(
    ("norm", "anchor"), [(LAYER_NORM, "AddLayerNorm"), (RMS_NORM, "AddRMSNorm")]
)
def test_a_norm_with_its_residual_and_quantize(norm, anchor):
    _, regions, modified = fused(RESIDUAL + norm + PRODUCT + LAST)
    assert modified
    assert regions[anchor].flags == (HALF,)
    assert regions[anchor].outputs == ("x", "q", "s")
    assert "Quantize" not in regions


def test_no_cast_is_left_inside():
    model, _, _ = fused(RESIDUAL + RMS_NORM + PRODUCT + LAST)
    assert [node.op_type for node in model.graph].count("Cast") == 3  # a, b and y


def test_a_smoothed_norm_whose_result_is_read():
    body = RESIDUAL + RMS_NORM + (
        f"z = Mul(n, factor) q, s = qcompiler.Quantize <block_size = {K}> (z) "
        "p = qcompiler.QMatMulW8A8(q, s, w, ws) y = Add(p, n) "
    )  # fmt: skip
    _, regions, _ = fused(body)
    assert regions["AddRMSNorm"].flags == (HALF, "smoothed")
    assert regions["AddRMSNorm"].outputs == ("y", "q", "s")


def test_fp8():
    _, regions, _ = fused(RESIDUAL + LAYER_NORM + FP8)
    assert regions["AddLayerNormFp8"].outputs == ("q", "s")


@pytest.mark.parametrize("norm", [LAYER_NORM, RMS_NORM])
def test_without_quantize_it_is_left_to_onnx_runtime(norm):
    model, regions, modified = fused(RESIDUAL + norm + "y = Relu(n) ")
    assert not modified
    assert not regions
    (last,) = [node for node in model.graph if node.name == "n"]
    assert decision_of(last).why.startswith("no Quantize follows" if norm == LAYER_NORM else "")


def test_parameters_that_float16_does_not_hold_stay():
    small = np.full(K, 1e-6, np.float32)
    model, regions, modified = fused(RESIDUAL + RMS_NORM + PRODUCT + LAST, gamma=small)
    assert not modified
    assert set(regions) == {"Quantize", "QMatMulW8A8"}
    (last,) = [node for node in model.graph if node.name == "n"]
    assert "its constant gamma holds 1e-06" in decision_of(last).why


def test_a_result_that_is_read_in_float32_stays():
    body = RESIDUAL + RMS_NORM + PRODUCT + "i = Cast<to = 7>(n) f = Cast<to = 1>(i) y = Add(p, f) "
    model, regions, _ = fused(body)
    assert "AddRMSNorm" not in regions
    (last,) = [node for node in model.graph if node.name == "n"]
    assert last.outputs[0].dtype is ir.DataType.FLOAT


def test_norms_that_share_a_cast_keep_their_residual():
    """What the Cast between them and the residual makes, they do not read any more."""
    second = RMS_NORM.replace("n = Mul(unit, gamma)", "o = Mul(unit, factor)")
    for name in ("s2", "mean", "over", "root", "unit"):
        second = second.replace(f"{name} =", f"{name}2 =").replace(f"{name},", f"{name}2,")
        second = second.replace(f"{name})", f"{name}2)")
    _, regions, _ = fused(RESIDUAL + RMS_NORM + second + PRODUCT + "y = Add(p, o) ")
    assert regions["AddRMSNorm"].outputs == ("x", "q", "s")

"""convert-float16 and regions: kernels in float16, and between Casts beside float32."""

import io
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from float16_models import FEEDS, LAYERS, MORE, W, X, named, only_half, why
from golden import run, sqnr, text_of
from rich.console import Console

from qcompiler.cli.decisions import decision_table
from qcompiler.ir.decisions import decisions
from qcompiler.ir.region import HALF
from qcompiler.ir.stages import Stage
from qcompiler.model_runs import ModelRuns
from qcompiler.passes.convert_float16 import ConvertFloat16
from qcompiler.pipeline import Pipeline
from qcompiler.recipe import Recipe
from qcompiler.report import Report

REGIONS = {
    "cuda-int8": ["Quantize_K64_f16", "QMatMulW8A8_K64_N64_f16_AddC_Gelu", "Quantize_K64_f16",
                  "QMatMulW8A8_K64_N64_f16_Clip_#", "QMatMulW8A8_K64_N64_f16_AddT_AddT"],
    "cuda-int4": ["QMatMulW4A16_K64_N64_G64_f16_AddC_Gelu", "QMatMulW4A16_K64_N64_G64_f16_Clip_#",
                  "QMatMulW4A16_K64_N64_G64_f16_AddT_AddT"],
    "cuda-fp8": ["QuantizeFp8_K64_f16", "QMatMulFp8_K64_N64_f16_AddC_Gelu", "QuantizeFp8_K64_f16",
                 "QMatMulFp8_K64_N64_f16_Clip_#", "QMatMulFp8_K64_N64_f16_AddT_AddT"],
}  # fmt: skip


@pytest.mark.parametrize("target", REGIONS)
def test_regions_in_float16_take_the_casts_in(target):
    model = named(LAYERS, **MORE)
    steps = {step.name: step for step in Pipeline.default(target, supports=only_half)}
    names = list(steps)
    first = names.index("convert-float16")
    model = Pipeline([steps[name] for name in names[:first]]).run(model)
    exact = run(model, FEEDS, plainly=True)
    steps["convert-float16"].apply(model, Stage.QUANTIZED)
    half = run(model, FEEDS, plainly=True)
    steps["fuse-regions"].apply(model, Stage.KERNEL)
    ops = [node.op_type for node in model.graph if node.op_type.startswith("Q")]
    assert [f"{op[:-6]}#" if "Clip" in op else op for op in ops] == REGIONS[target]
    assert all(node.inputs[0].graph or node.inputs[0].producer() for node in model.graph)
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == 4  # the two inputs and the two outputs
    fused = run(model, FEEDS, plainly=True)
    for wanted, rounded, got in zip(exact, half, fused, strict=True):
        # Float16 decides ties of int8 otherwise; outlining changes no bit of what ORT computes.
        assert sqnr(wanted, rounded) > (45 if target == "cuda-int8" else 60)
        assert sqnr(rounded, got) > 75
    assert not steps["fuse-regions"].rewrite(model).modified


def test_an_operand_in_float32_ends_a_region_in_float16():
    model = named(
        "g (float[m,64] x) => (float[m,64] y) { p = MatMul (x, w) a = Add (p, big) y = Relu (a) }"
    )
    steps = list(Pipeline.default("cuda-int8", supports=only_half))
    model = Pipeline(steps[: [s.name for s in steps].index("fuse-regions") + 1]).run(model)
    ops = [node.op_type for node in model.graph if node.op_type.startswith("QMatMul")]
    assert ops == ["QMatMulW8A8_K64_N64_f16"]


RMS_NORM = (
    "s = Pow (x, two) m = ReduceMean <keepdims = 1> (s, last) e = Add (m, tiny) r = Sqrt (e) "
    "u = Div (x, r) n = Mul (u, gamma) "
)
BESIDE_FLOAT32 = {
    "inputs and outputs": ("y = MatMul (x, w)", ["Quantize", "QMatMulW8A8"]),
    "one node between": (
        "p = MatMul (x, w) a = Relu (p) y = MatMul (a, v)",
        ["Quantize", "QMatMulW8A8_Relu", "Quantize", "QMatMulW8A8"],
    ),
    "nothing between": (
        "p = MatMul (x, w) y = MatMul (p, v)",
        ["Quantize", "QMatMulW8A8", "Quantize", "QMatMulW8A8"],
    ),
    "a norm": (RMS_NORM + "p = MatMul (n, w) y = Tanh (p)", ["Quantize", "QMatMulW8A8_Tanh"]),
    "read in both types": (
        "p = MatMul (x, w) a = Atan (p) t = Tanh (p) y = Add (a, t)",
        ["Quantize", "QMatMulW8A8"],
    ),
    "an output that is read": (
        "y = MatMul (x, w) a = Atan (y) t = Tanh (y) z = Add (a, t)",
        ["Quantize", "QMatMulW8A8"],
    ),
    "a branch": (
        "c = Constant <value = bool {1}> () h = Tanh (x) y = If (c) <"
        "then_branch = t () => (float[m,64] o) { o = MatMul (h, w) }, "
        "else_branch = f () => (float[m,64] r) { r = Neg (h) }>",
        ["Quantize", "QMatMulW8A8"],
    ),
}


@pytest.mark.parametrize("beside", BESIDE_FLOAT32)
def test_kernels_in_float16_beside_float32(beside):
    body, wanted = BESIDE_FLOAT32[beside]
    outputs = "float[m,64] y, float[m,64] z" if " z = " in body else "float[m,64] y"
    model = named(f"g (float[m,64] x) => ({outputs}) {{ {body} }}", v=W[::-1].copy())
    exact = Pipeline.default("cuda-int8", Recipe(float="fp32")).run(model.clone())
    half = Pipeline.default("cuda-int8").run(model)
    ops = [n.op_type for n in half.graph.all_nodes() if n.domain.startswith("qcompiler.")]
    assert [op.replace("_K64", "").replace("_N64", "").replace("_f16", "") for op in ops] == wanted
    assert all("_f16" in op for op in ops)
    assert [(v.name, v.dtype) for v in half.graph.outputs] == [
        (name, ir.DataType.FLOAT) for name in ("y", "z")[: len(half.graph.outputs)]
    ]
    results = [run(each, X, plainly=True) for each in (exact, half)]
    assert all(sqnr(want, got) > 35 for want, got in zip(*results, strict=True))


@pytest.mark.parametrize("beside", BESIDE_FLOAT32)
def test_casts_beside_float32_are_made_once(beside):
    model = named(f"g (float[m,64] x) => (float[m,64] y) {{ {BESIDE_FLOAT32[beside][0]} }}", v=W)
    steps = list(Pipeline.default("cuda-int8"))
    after = [step.name for step in steps].index("convert-float16") + 1
    model = Pipeline(steps[:after]).run(model)
    printed = text_of(model)
    assert not ConvertFloat16()(model).modified
    assert text_of(model) == printed


def test_what_leaves_the_range_beside_float32_has_no_kernel():
    model = named("g (float[m,64] x) => (float[m,64] y) { p = MatMul (x, w) y = MatMul (p, v) }",
                  w=W * 1e5, v=W * 1e-5)  # fmt: skip
    steps = list(Pipeline.default("cuda-int8", runs=ModelRuns()))
    model = Pipeline(steps[: [s.name for s in steps].index("fuse-regions") + 1]).run(model)
    ops = [node.op_type for node in model.graph if node.domain.startswith("qcompiler")]
    assert ops == ["Quantize_K64_f16", "QMatMulW8A8", "Quantize", "QMatMulW8A8_K64_N64_f16"]
    assert (
        "kernels for GPUs take floats of 16 bits; float32: float16 may overflow: its result reached"
    ) in why(model, "p")


def test_the_closing_table_says_what_may_overflow():
    """Briefly, for all such nodes together; what each of them reached is in the manifest."""
    text = """g (float[m,64] x) => (float[m,64] y) {
        p = Mul (x, v) q = Mul (x, u) s = Softmax (p) t = Tanh (q) y = Add (s, t) }"""
    model = named(text, v=np.float32(6e4), u=np.float32(5e4))
    ConvertFloat16(ModelRuns().sample)(model)
    report = Report(Path(), "cuda-int8", tuple(decisions(model)), bytes_before=0)
    console = Console(file=io.StringIO(), width=100, markup=False)
    console.print(decision_table(report.groups()))
    told = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    overflow = "float others float32, where float16 may overflow: Mul 2, Softmax 1, Tanh 1"
    assert [line for line in told if "overflow" in line] == [f"4 {overflow}"]
    assert [line for line in told if "no weights" in line] == [
        "1 float others no weights to quantize: Add 1"
    ]
    assert "float16 may overflow: p reached " in why(model, "s")


def test_kernels_of_floats_take_no_regions_in_float16():
    model = named(LAYERS, **MORE)
    recipe = Recipe(float="fp16")
    model = Pipeline.default("x86-int8", recipe).run(model)
    regions = [node.op_type for node in model.graph if node.domain.startswith("qcompiler.")]
    assert regions
    assert not [name for name in regions if "f16" in name]
    exact = Pipeline.default("x86-int8").run(named(LAYERS, **MORE))
    for want, got in zip(run(exact, FEEDS), run(model, FEEDS), strict=True):
        assert sqnr(want, got) > 35


def test_norms_are_fused_in_float16():
    model = named(LAYERS, **MORE)
    supports = {True: None, False: "not in float16"}
    model = Pipeline.default(
        "cuda-int8", supports=lambda region: supports[HALF in region.flags]
    ).run(model)  # fmt: skip
    ops = [node.op_type for node in model.graph]
    assert any(op.startswith("LayerNorm_K64_f16") for op in ops)
    assert "LayerNormalization" not in ops

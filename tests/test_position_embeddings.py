"""fuse-regions: operands that have fewer dimensions than the result, and constants of its shape."""

import numpy as np
import pytest
from golden import run
from test_regions import RNG, everything, folded, fused

from qcompiler.ir.stages import Stage, verify
from qcompiler.passes import region_growth
from qcompiler.passes.fuse_regions import FuseRegions
from qcompiler.targets.cuda.families import unsupported as cuda_unsupported


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1)])
def test_a_row_of_channels_may_have_more_dimensions(shape):
    ops = fused(
        "g (float[m,64] x) => (float[m,8] y) { p = MatMul (x, w) y = Mul (c, p) }",
        c=np.ones(shape, np.float32) * 3,
    )
    assert ops == ["Quantize_K64", "QMatMulW8A8_K64_N8_MulC"]


@pytest.mark.parametrize(
    ("rows", "shape", "step"),
    [
        ("40,", (40, 8), "AddT"),
        ("2,40,", (2, 40, 8), "AddT"),
        ("1,40,", (1, 40, 8), "AddT"),
        ("m,40,", (40, 8), "AddR"),
        ("m,40,", (1, 40, 8), "AddR"),
        ("m,2,20,", (1, 2, 20, 8), "AddR"),
        ("m,20,40,", (40, 8), "AddR"),
        ("m,31,", (31, 8), None),  # too few rows to be multiplied at once
        ("m,n,", (40, 8), None),  # it may be another shape
        ("m,40,", (40, 1), None),
    ],
)
@pytest.mark.parametrize("made", ["", "c1 = Neg (c)"])
def test_takes_in_position_embeddings(rows, shape, step, made):
    """Of the result's shape, or the same for all of a batch; constant or not."""
    add = f"{made} y = Add (h, {'c1' if made else 'c'})"
    model = folded(
        f"g (float[{rows}64] x) => (float[{rows}8] y) "
        f"{{ p = MatMul (x, w) a = Add (p, b) h = Gelu (a) {add} }}",
        c=RNG.standard_normal(shape, np.float32),
    )
    sizes = [int({"m": "3", "n": "40"}.get(size, size)) for size in rows[:-1].split(",")]
    feeds = {"x": RNG.standard_normal((*sizes, 64), np.float32)}
    before = run(model, feeds)
    FuseRegions(everything)(model)
    verify(model, Stage.KERNEL, "fuse-regions")
    for got, want in zip(run(model, feeds), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    grown = [n.op_type for n in model.graph if n.op_type.startswith("QMatMul")]
    assert grown == ["QMatMulW8A8_K64_N8_AddC_Gelu" + (f"_{step}" if step else "")]
    assert any(n.op_type == "Add" for n in model.graph) == (step is None)


@pytest.mark.parametrize(
    ("rows", "large", "taken"), [(512, 511, True), (511, 511, False), (511, 512, True)]
)
def test_many_weights_are_read_for_many_rows(monkeypatch, rows, large, taken):
    """The 64 x 8 here, if more than `large` are many."""
    monkeypatch.setattr(region_growth, "_LARGE_WEIGHTS", large)
    model = folded(
        f"g (float[m,{rows},64] x) => (float[m,{rows},8] y) {{ p = MatMul (x, w) y = Add (p, c) }}",
        c=np.ones((rows, 8), np.float32),
    )
    FuseRegions(everything)(model)
    last = "QMatMulW8A8_K64_N8_AddR" if taken else "Add"
    assert [node.op_type for node in model.graph][-1] == last


def test_asks_for_a_kernel_with_an_operand_that_repeats():
    model = folded(
        "g (float[m,40,64] x) => (float[m,40,8] y) { p = MatMul (x, w) y = Add (p, c) }",
        "cuda-int8",
        c=np.ones((40, 8), np.float32),
    )
    asked = []
    FuseRegions(lambda region: asked.append(region) or cuda_unsupported(region))(model)
    assert any("repeated" in region.extras for region in asked)
    assert not any("AddR" in n.op_type for n in model.graph)

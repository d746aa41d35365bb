"""Norms with Quantize for GPUs, in the emulator: against double precision, and against Quantize."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from cuda_emulator import Emulated, needs_compiler
from cuda_operands import run_body
from golden import run

from qcompiler.ir import dialect
from qcompiler.ir.region import HALF, Region
from qcompiler.targets import cuda
from qcompiler.targets.cuda.norm_plan import NORMS

pytestmark = needs_compiler

EPSILON = 1e-5


def norm(anchor: str, k: int, *outputs: str, smoothed: bool = False) -> Region:
    return Region(
        anchor, (("K", k),), extras=("channel",) if smoothed else (), outputs=outputs,
        attributes=(("epsilon", EPSILON),), flags=(HALF, "smoothed") if smoothed else (HALF,),
    )  # fmt: skip


REGIONS = [
    norm("LayerNorm", 8, "y", "q", "s"),
    norm("LayerNorm", 384, "q", "s"),
    norm("AddLayerNorm", 384, "x", "y", "q", "s"),
    norm("AddLayerNorm", 1000, "x", "y", "q", "s", smoothed=True),
    norm("RMSNorm", 576, "y", "q", "s", smoothed=True),
    norm("AddRMSNorm", 576, "x", "q", "s"),
    norm("AddRMSNorm", 9000, "x", "y", "q", "s"),
    norm("LayerNormFp8", 256, "y", "q", "s"),
    # Rows that begin anywhere: vectors of 1, 2 and 4.
    norm("AddLayerNorm", 333, "x", "y", "q", "s", smoothed=True),
    norm("RMSNorm", 1026, "y", "q", "s"),
    norm("AddRMSNorm", 100, "x", "y", "q", "s"),
    norm("LayerNormFp8", 77, "y", "q", "s"),
    norm("AddRMSNormFp8", 576, "x", "y", "q", "s", smoothed=True),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    @functools.cache
    def make(region: Region) -> Emulated:
        folder: Path = tmp_path_factory.mktemp("emulated")
        return Emulated(cuda.source(region, "sm_90a"), folder, region.outputs)

    return make


def operands(region: Region, rows: int) -> dict[str, np.ndarray]:
    rng, k = np.random.default_rng(rows), region.size("K")
    # Rows of several magnitudes, one of a mean far from 0, one of zeros.
    size = np.exp(rng.standard_normal((rows, 1)))
    device = {name: (rng.standard_normal((rows, k)) * size).astype("f2") for name in ("a", "b")}
    device["a"][0] += np.float16(30)
    device["a"][1] = device["b"][1] = 0
    device["x"] = np.zeros((rows, k), "f2") if region.anchor.startswith("Add") else device["a"]
    device["gamma"] = rng.uniform(0.5, 1.5, k).astype("f2")
    device["beta"], device["extra0"] = (rng.uniform(-1, 1, (2, k))).astype("f2")
    return device | {
        "y": np.zeros((rows, k), "f2"), "q": np.zeros((rows, k), np.uint8),
        "s": np.zeros((rows, 1), "f4"),
    }  # fmt: skip


def in_double(region: Region, given: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """y of a row x as it was rounded."""
    wide = {name: array.astype(np.float64) for name, array in given.items()}
    x = x.astype(np.float64)
    if "LayerNorm" in region.anchor:
        x = x - x.mean(1, keepdims=True)
    y = x / np.sqrt(np.square(x).mean(1, keepdims=True) + EPSILON) * wide["gamma"]
    return y + wide["beta"] if "LayerNorm" in region.anchor else y


def quantized(region: Region, y: np.ndarray, given: dict[str, np.ndarray]):
    """What the body of Quantize makes of y, as it was rounded, times the factors."""
    anchor = "QuantizeFp8" if region.anchor.endswith("Fp8") else "Quantize"
    z = y.astype(np.float32)
    if region.extras:
        z = z * given["extra0"].astype(np.float32)
    q, s = run_body(Region(anchor, region.sizes), {"x": z}, outputs=2)
    return q.view(np.uint8), s


def body_of(region: Region, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What the region's function makes in ONNX Runtime, in the types of a bundle."""
    function, op = dialect.region_function(region, "test", 21), dialect.OPS[region.anchor]
    inputs = [
        ir.Value(name=v.name, type=ir.TensorType(ir.DataType.FLOAT16),
                 shape=ir.Shape(given[str(v.name)].shape)) for v in function.inputs
    ]  # fmt: skip
    results = [
        ir.Value(name=f"r_{name}", type=ir.TensorType(op.type_of(name, region.flags)))
        for name in region.outputs
    ]
    node = ir.Node("test", region.name, inputs, outputs=results)
    graph = ir.Graph(inputs, results, nodes=[node], opset_imports={"": 21, "test": 1}, name="g")
    return run(ir.Model(graph, ir_version=10, functions=[function]),
               {str(v.name): given[str(v.name)] for v in inputs}, plainly=True)  # fmt: skip


@pytest.mark.parametrize("region", REGIONS, ids=lambda region: region.name)
def test_a_norm(region, emulated):
    for rows, launch in zip((3, 19), cuda.launches(region, "sm_90a"), strict=True):
        given = operands(region, rows)
        device = {name: given[name] for name in launch.parameters if name != "rows"}
        for backwards in (False, True):
            for name in region.outputs:
                device[name][...] = 7
            program = emulated(region)
            program.run(launch, region.size("K"), device, rows, backwards)
            x = given["x"]
            if region.anchor.startswith("Add"):
                x = (given["a"].astype("f4") + given["b"].astype("f4")).astype("f2")
                if "x" in region.outputs:
                    np.testing.assert_array_equal(device["x"], x)
            expected = in_double(region, given, x)
            y = device["y"] if "y" in region.outputs else expected.astype("f2")
            error = np.abs(y - expected)
            assert (error <= 2.0**-10 * np.abs(expected) + 1e-5).all(), error.max()
            q, s = quantized(region, y, given)
            if "y" in region.outputs:
                np.testing.assert_array_equal(device["s"], s)
                np.testing.assert_array_equal(device["q"], q)
            else:  # y was rounded inside, perhaps to a neighbour of what is expected
                np.testing.assert_allclose(device["s"], s, rtol=2e-3)
                assert np.abs(device["q"].astype(int) - q).max() <= 1
                assert (device["q"] != q).mean() < 0.02


@pytest.mark.parametrize("region", REGIONS[2:7], ids=lambda region: region.name)
def test_it_is_the_body_of_its_function(region, emulated):
    """The body, in float16 as a bundle has it, says the same."""
    launch = cuda.launches(region, "sm_80")[0]
    given = operands(region, 4)
    device = {name: given[name] for name in launch.parameters if name != "rows"}
    emulated(region).run(launch, region.size("K"), device, 4)
    for name, expected in zip(region.outputs, body_of(region, given), strict=True):
        wide = expected.astype(np.float64)
        error = np.abs(device[name].astype(np.float64) - wide)
        assert (error <= (1 if name == "q" else 2.0**-9 * np.abs(wide) + 1e-4)).all(), name


@pytest.mark.parametrize("anchor", ["Quantize", "QuantizeFp8"])
def test_quantize_of_nan_is_its_body(anchor, tmp_path):
    region = Region(anchor, (("K", 384),))
    x = np.random.default_rng(0).standard_normal((3, 384)).astype("f2")
    x[0, 5], x[1, 7], x[2] = np.nan, np.inf, np.nan
    q, s = run_body(region, {"x": x.astype(np.float32)}, outputs=2)
    device = {"x": x, "q": np.zeros_like(q), "s": np.zeros((3, 1), np.float32)}
    launch = cuda.launches(region, "sm_90a")[0]
    Emulated(cuda.source(region, "sm_90a"), tmp_path).run(launch, 384, device, 3)
    np.testing.assert_array_equal(device["s"], s)
    np.testing.assert_array_equal(device["q"].view(np.uint8), q.view(np.uint8))


def test_which_norms_have_no_kernel():
    for anchor in NORMS:
        assert cuda.supports(norm(anchor, 384, "y", "q", "s")) is None
    for region, reason in (
        (norm("LayerNorm", 384, "y"), "no Quantize follows: ONNX Runtime's own kernels"),
        (norm("RMSNorm", 40000, "q", "s"), "K=40000: a block holds rows of up to 32768 elements"),
    ):
        assert (cuda.supports(region) or "").startswith(reason)

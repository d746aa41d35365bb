"""Numbers at the ends of their types, in kernels for GPUs and their twins on the CPU.

448 is the last of e4m3, 65504 that of float16; beside them zeros below zero, infinity and NaN.
"""

from __future__ import annotations

import functools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cuda_emulator import Emulated, needs_compiler
from cuda_library import H200, half, open_session, run_op
from cuda_library import model_of as library_model
from cuda_operands import operands_of, run_body
from stand_in import Bench, StandInBackend
from test_cuda_kernels import eight_bit, launch_for, w4a16, w4z4a16

from qcompiler.ir.region import Region
from qcompiler.targets import cuda
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.cuda.packing import pack
from qcompiler.targets.library import build_library

FP8 = ml_dtypes.float8_e4m3fn
DOMAIN = "qcompiler.0c0da000"
KINDS = ("Quantize", "QuantizeFp8")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    @functools.cache
    def make(region: Region, arch: str) -> Emulated:
        folder: Path = tmp_path_factory.mktemp("emulated")
        return Emulated(cuda.source(region, arch), folder)

    return make


def rows_of_ends(k: int) -> np.ndarray:
    """Rows of float16, each with an end in it."""
    x = np.ones((9, k), np.float16)
    x[0, 1], x[1, 2], x[2, 3], x[3] = np.nan, np.inf, -np.inf, np.nan
    x[4], x[5], x[6], x[6, 0] = 65504, -0.0, 6e-8, -6e-8
    x[7], x[8], x[8, 4] = np.linspace(-448, 448, k), 0, np.nan
    return x


@needs_compiler
@pytest.mark.parametrize("k", [5, 384])
@pytest.mark.parametrize("anchor", KINDS)
def test_quantize(anchor: str, k: int, emulated) -> None:
    region, x = Region(anchor, (("K", k),)), rows_of_ends(k)
    q, s = run_body(region, {"x": x.astype(np.float32)}, outputs=2)
    for launch in cuda.launches(region, "sm_90a"):
        device = {"x": x, "q": np.zeros_like(q), "s": np.zeros((9, 1), np.float32)}
        emulated(region, "sm_90a").run(launch, k, device, 9)
        np.testing.assert_array_equal(device["q"].view(np.uint8), q.view(np.uint8))
        np.testing.assert_array_equal(device["s"], s)


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("twins")
    regions = [half(anchor, {"K": 384}) for anchor in KINDS]
    cache, backend = KernelCache(folder / "cache"), StandInBackend()
    build_library(regions, DOMAIN, folder / "twins.so", cache=cache, arch=backend)
    return folder / "twins.so"


@pytest.mark.parametrize("anchor", KINDS)
def test_twins_of_quantize(anchor: str, twins: Path, bench: Bench) -> None:
    bench.driver(H200)
    x = rows_of_ends(384)
    expected = run_body(Region(anchor, (("K", 384),)), {"x": x.astype(np.float32)}, outputs=2)
    run = open_session(bench.library(twins), library_model(half(anchor, {"K": 384}), {}))
    q, s = run_op(run, {"x": x})
    np.testing.assert_array_equal(q.view(np.uint8), expected[0].view(np.uint8))
    np.testing.assert_array_equal(s, expected[1])


def assert_same_ends(result: np.ndarray, expected: np.ndarray) -> None:
    """The same are NaN and infinite; what is finite is near."""
    with np.errstate(over="ignore"):
        wanted = expected.astype(np.float16)
    np.testing.assert_array_equal(np.isnan(result), np.isnan(wanted))
    infinite = np.isinf(wanted)
    np.testing.assert_array_equal(result[infinite], wanted[infinite])
    finite = np.isfinite(wanted)
    assert finite.any()
    scale = np.abs(expected[finite]).max()
    np.testing.assert_allclose(result[finite], expected[finite], rtol=2e-3, atol=1e-3 * scale)


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_89", "sm_90a"])
@pytest.mark.parametrize("rows", [4, 20, 70])
def test_products_of_fp8(rows: int, arch: str, emulated) -> None:
    """448 by 448 over a whole row overflows float16, and only there."""
    region = eight_bit("QMatMulFp8", 272, 40)
    operands = operands_of(region, rows)
    q, w = operands.body["q"].copy(), operands.body["w"].copy()
    q[0, 3], q[1], q[2], q[3] = np.nan, 448, FP8(-0.0), -448
    w[5, 7], w[:, 8], w[:, 9] = np.nan, 448, FP8(-0.0)
    operands.body |= {"q": q, "w": w}
    operands.device |= {"q": q, "w": np.frombuffer(pack(w, region), np.uint8)}
    operands.device["s"][1] = operands.body["s"][1] = 10
    launch = launch_for(region, rows, arch)
    emulated(region, arch).run(launch, 40, operands.device, rows)
    (expected,) = run_body(region, operands.body)
    assert np.isinf(operands.device["y"]).sum() >= 1
    assert_same_ends(operands.device["y"], expected)


@needs_compiler
@pytest.mark.parametrize("region", [w4a16(200, 40, 32), w4z4a16(100, 33, 128)])
@pytest.mark.parametrize("rows", [4, 12, 70])
def test_products_of_float16(region: Region, rows: int, emulated) -> None:
    """Infinity times what is no zero, NaN, and sums that no float16 holds; nothing spreads."""
    operands = operands_of(region, rows)
    x = operands.device["x"].copy()
    x[0, 5], x[1, 6], x[2] = np.inf, np.nan, 65504
    operands.device["x"], operands.body["x"] = x, x.astype(np.float32)
    (expected,) = run_body(region, operands.body)
    for launch in (launch_for(region, rows), cuda.launches(region, "sm_90a")[-1]):
        operands.device["y"][...] = 0
        emulated(region, "sm_90a").run(launch, region.size("N"), operands.device, rows)
        y = operands.device["y"]
        others = np.delete(y, 2, axis=0)
        # Of a sum of 65504 times many, all roundings of a weight count.
        with np.errstate(over="ignore"):
            near = np.abs(expected[2]) > 65504 * 1.01
        np.testing.assert_array_equal(y[2][near], np.sign(expected[2][near]) * np.inf)
        assert_same_ends(others, np.delete(expected, 2, axis=0))

"""Numerics of the CUDA kernels, on the CPU: against the functions' bodies in ONNX Runtime."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from cuda_emulator import Emulated, needs_compiler
from cuda_operands import Operands, operands_of, run_body

from qcompiler.ir.region import Region, Step
from qcompiler.targets import cuda

pytestmark = needs_compiler

ROWS = (1, 7, 8, 9, 17, 65)


def w4a16(k: int, n: int, group: int, **more) -> Region:
    return Region("QMatMulW4A16", (("K", k), ("N", n), ("G", group)), **more)


def eight_bit(anchor: str, k: int, n: int, **more) -> Region:
    return Region(anchor, (("K", k), ("N", n)), **more)


EPILOGUE = {
    "extras": ("channel", "tensor"),
    "steps": (Step("Add", (0, -1)), Step("Gelu", (1,)), Step("Add", (2, -2))),
}
REGIONS = [
    w4a16(200, 40, 32),
    w4a16(576, 136, 64),
    w4a16(1024, 130, 128, **EPILOGUE),
    w4a16(2048, 64, 128),
    eight_bit("QMatMulW8A8", 208, 40),
    eight_bit("QMatMulW8A8", 1536, 133, **EPILOGUE),
    eight_bit("QMatMulFp8", 272, 136),
]
# Tiles are multiplied by wgmma on sm_90a, by mma.sync elsewhere; e4m3 only from sm_89 on.
CASES = [
    *((region, "sm_90a") for region in REGIONS),
    *((region, "sm_80") for region in REGIONS if region.extras),
    (REGIONS[-1], "sm_89"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    @functools.cache
    def make(region: Region, arch: str = "sm_90a") -> Emulated:
        folder: Path = tmp_path_factory.mktemp("emulated")
        return Emulated(cuda.source(region, arch), folder)

    return make


def launch_for(region: Region, rows: int) -> cuda.Launch:
    launches = cuda.launches(region, "sm_90a")
    return next(one for one in launches if one.max_rows is None or rows <= one.max_rows)


def compare(region: Region, operands: Operands) -> None:
    """Within the roundings of float16: of the result, and of each weight times its scale."""
    (expected,) = run_body(region, operands.body)
    error = np.abs(operands.device["y"].astype(np.float64) - expected)
    weights = 2.0**-11 if region.anchor == "QMatMulW4A16" else 2.0**-20
    bound = 2.0**-10 * np.abs(expected) + weights * operands.magnitude + 1e-6
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize(("region", "arch"), CASES, ids=[f"{r.name}-{a}" for r, a in CASES])
@pytest.mark.parametrize("rows", ROWS)
def test_a_product_is_its_body(region, arch, rows, emulated):
    launch = launch_for(region, rows)
    operands = operands_of(region, rows)
    for backwards in (False, True):
        operands.device["y"][...] = np.nan
        program = emulated(region, arch)
        program.run(launch, region.size("N"), operands.device, rows, backwards)
        compare(region, operands)


@pytest.mark.parametrize("anchor", ["Quantize", "QuantizeFp8"])
@pytest.mark.parametrize("k", [8, 384, 4104])
def test_quantize_is_its_body(anchor, k, emulated):
    region = Region(anchor, (("K", k),))
    rng = np.random.default_rng(k)
    for rows, launch in zip((3, 19), cuda.launches(region, "sm_90a"), strict=True):
        x = (rng.standard_normal((rows, k)) * np.exp(rng.standard_normal((rows, 1)))).astype("f2")
        x[1] = 0
        expected_q, expected_s = run_body(region, {"x": x.astype(np.float32)}, outputs=2)
        device = {"x": x, "q": np.zeros_like(expected_q), "s": np.zeros((rows, 1), np.float32)}
        emulated(region).run(launch, k, device, rows)
        np.testing.assert_array_equal(device["s"], expected_s)
        np.testing.assert_array_equal(device["q"].view(np.uint8), expected_q.view(np.uint8))


def test_quantize_passes_over_nan_and_infinity_does_not_crash(emulated):
    region = Region("Quantize", (("K", 384),))
    x = np.ones((2, 384), np.float16)
    x[0, 5], x[1, 7] = np.nan, np.inf
    device = {"x": x, "q": np.zeros((2, 384), np.uint8), "s": np.zeros((2, 1), np.float32)}
    emulated(region).run(cuda.launches(region, "sm_80")[0], 384, device, 2)
    assert device["s"][0] == np.float32(1) / np.float32(127)
    assert np.isinf(device["s"][1])
    assert device["q"][0, 4] == 255
    assert device["q"][1, 4] == 128

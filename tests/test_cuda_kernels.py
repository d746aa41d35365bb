"""Numerics of the CUDA kernels, on the CPU: against the functions' bodies in ONNX Runtime."""

from __future__ import annotations

import functools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cuda_emulator import Emulated, needs_compiler
from cuda_operands import Operands, operands_of, run_body

from qcompiler.ir.region import Region, Step
from qcompiler.targets import cuda
from qcompiler.targets.cuda.packing import FOUR_BITS, pack, pack_scales
from qcompiler.targets.cuda.plan import results_of

pytestmark = needs_compiler

FP8 = ml_dtypes.float8_e4m3fn
ROWS = (1, 7, 8, 9, 17, 65)


def w4a16(k: int, n: int, group: int, **more) -> Region:
    return Region("QMatMulW4A16", (("K", k), ("N", n), ("G", group)), **more)


def w4z4a16(k: int, n: int, group: int, **more) -> Region:
    return Region("QMatMulW4Z4A16", (("K", k), ("N", n), ("G", group)), **more)


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
    # Zero points, small and large groups, rows that begin anywhere, and several results.
    w4z4a16(328, 40, 16),
    w4z4a16(2048, 136, 256, **EPILOGUE),
    w4z4a16(100, 33, 128),
    w4a16(333, 40, 64),
    w4a16(576, 136, 192, widths=(64, 40, 32)),
    eight_bit("QMatMulW8A8", 1100, 40, widths=(7, 33)),
    eight_bit("QMatMulFp8", 267, 40),
]
# Tiles are multiplied by wgmma on sm_90a, by mma.sync elsewhere; e4m3 only from sm_89 on.
CASES = [
    *((region, "sm_90a") for region in REGIONS),
    *((region, "sm_80") for region in REGIONS if region.extras),
    *((region, "sm_80") for region in (REGIONS[7], REGIONS[10], REGIONS[12])),
    *((region, "sm_89") for region in REGIONS if region.anchor == "QMatMulFp8"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    @functools.cache
    def make(region: Region, arch: str = "sm_90a") -> Emulated:
        folder: Path = tmp_path_factory.mktemp("emulated")
        return Emulated(cuda.source(region, arch), folder)

    return make


def launch_for(region: Region, rows: int, arch: str = "sm_90a") -> cuda.Launch:
    launches = cuda.launches(region, arch)
    return next(one for one in launches if one.max_rows is None or rows <= one.max_rows)


def compare(region: Region, operands: Operands) -> None:
    """Within the roundings of float16: of the result, and of each weight times its scale."""
    expected = np.concatenate(run_body(region, operands.body), axis=-1)
    results = [operands.device[name] for name in results_of(region)]
    error = np.abs(np.concatenate(results, axis=-1).astype(np.float64) - expected)
    # Those, or what tensor cores keep of sums of FP8 while they add up a chunk.
    weights = 2.0**-11 if region.anchor in (*FOUR_BITS, "QMatMulFp8") else 2.0**-20
    bound = 2.0**-10 * np.abs(expected) + weights * operands.magnitude + 1e-6
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize(("region", "arch"), CASES, ids=[f"{r.name}-{a}" for r, a in CASES])
@pytest.mark.parametrize("rows", ROWS)
def test_a_product_is_its_body(region, arch, rows, emulated):
    launch = launch_for(region, rows, arch)
    operands = operands_of(region, rows)
    for backwards in (False, True):
        for name in results_of(region):
            operands.device[name][...] = np.nan
        program = emulated(region, arch)
        program.run(launch, region.size("N"), operands.device, rows, backwards)
        compare(region, operands)


OF_ROLES = [
    w4a16(1024, 130, 128, **EPILOGUE),
    w4z4a16(100, 33, 128),
    eight_bit("QMatMulW8A8", 1536, 133, **EPILOGUE),
    eight_bit("QMatMulFp8", 1008, 136),
]


@pytest.mark.parametrize("region", OF_ROLES, ids=lambda region: region.name)
def test_very_many_rows_are_their_body(region, emulated):
    launch = cuda.launches(region, "sm_90a")[-1]
    assert "_roles" in launch.symbol
    operands = operands_of(region, 261)
    for backwards in (False, True):
        operands.device["y"][...] = np.nan
        emulated(region).run(launch, region.size("N"), operands.device, 261, backwards)
        compare(region, operands)


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a"])
@pytest.mark.parametrize("rows", [4, 20])
def test_long_sums_of_fp8_keep_their_bits(arch, rows, emulated):
    """All of one sign: what the tensor cores cut off would add up, to 1% at K = 8192."""
    region = eight_bit("QMatMulFp8", 8192, 16)
    operands = operands_of(region, rows)
    for device, body in (("q", "q"), ("w", "w")):
        operands.device[device] = operands.device[device].view(np.uint8) & 127
        operands.body[body] = (operands.body[body].view(np.uint8) & 127).view(FP8)
    operands.device["q"] = operands.body["q"]
    operands.body["s"][...] = operands.device["s"][...] = 2.0**-12
    emulated(region, arch).run(launch_for(region, rows, arch), 16, operands.device, rows)
    compare(region, operands)


def test_parts_of_long_sums_are_integers_until_they_are_added(emulated):
    """Weights of one sign: what zero points take off is 10^5 times what is left."""
    region = eight_bit("QMatMulW8A8", 16384, 16)
    operands = operands_of(region, 16)
    w = np.random.default_rng(0).integers(90, 128, (16384, 16)).astype(np.int8)
    q = np.tile(np.uint8([127, 129]), (16, 8192))
    ws = np.full(16, 0.01, np.float32)
    operands.device |= {
        "q": q,
        "w": np.frombuffer(pack(w, region), np.uint8),
        "ws": np.frombuffer(pack_scales(ws, region, w=w), np.uint8),
    }
    launch = launch_for(region, 16, "sm_80")
    assert launch.splits > 1
    emulated(region, "sm_80").run(launch, 16, operands.device, 16)
    sums = (q.astype(np.int64) - 128) @ w.astype(np.int64)
    expected = sums * operands.device["s"].astype(np.float64) * ws.astype(np.float64)
    # But for the rounding to float16, and of three products of float32 to 24 bits.
    error = np.abs(operands.device["y"] - expected)
    assert (error <= (2.0**-11 + 2.0**-22) * np.abs(expected)).all()


@pytest.mark.parametrize("anchor", ["Quantize", "QuantizeFp8"])
@pytest.mark.parametrize("k", [1, 333, 384, 1002, 4100])
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

"""The whole way to a launch without a GPU: a stand-in for the driver notes what it is asked for."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda_emulator import Emulated, needs_compiler
from cuda_library import (
    A100,
    FP8,
    H200,
    L40S,
    PRODUCTS,
    QUANTIZE,
    REGIONS,
    SMALL,
    W4,
    N,
    constants_of,
    expected_of,
    feed_of,
    memory,
    model_of,
    open_session,
    run_op,
)
from numpy.typing import NDArray
from numpy_kernels import emulate
from stand_in import Bench, Gpu

from qcompiler.ir.errors import ToolchainError
from qcompiler.ir.region import Region
from qcompiler.targets import cubin, cuda
from qcompiler.targets.cuda.packing import pack, pack_scales

Array = NDArray[Any]


@pytest.mark.parametrize("region", PRODUCTS, ids=lambda region: region.name)
def test_numbers(region: Region, on_cpu: Path, bench: Bench) -> None:
    """Everything a kernel is given is right, for any number of rows."""
    driver, constants = bench.driver(H200), constants_of(region)
    emulate(driver, region, "sm_90a")
    run = open_session(bench.library(on_cpu), model_of(region, constants))
    for rows in (1, 2, 8, 9, 16, 17, 64, 65, 256, 257, 500):
        feed = feed_of(region, rows)
        y = np.concatenate(run_op(run, feed), axis=-1)
        expected = expected_of(region, constants, feed)
        np.testing.assert_allclose(y, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("region", REGIONS, ids=lambda region: region.name)
@pytest.mark.parametrize("gpu", [H200, L40S, A100], ids=lambda gpu: gpu.name)
def test_which_kernel_runs(region: Region, gpu: Gpu, on_cpu: Path, bench: Bench) -> None:
    """The first launch that takes so many rows, as it asks to be launched."""
    arch = {9: "sm_90a", 8: f"sm_8{gpu.minor}"}[gpu.major]
    if arch not in cuda.archs_of(region):
        pytest.skip(f"{region.anchor} has no kernel for {arch}")
    driver = bench.driver(gpu)
    driver.know_all(region, arch)
    launches = cuda.launches(region, arch)
    run = open_session(bench.library(on_cpu), model_of(region, constants_of(region)))
    columns = region.size("N") if "N" in dict(region.sizes) else region.size("K")
    edges = [launch.max_rows for launch in launches if launch.max_rows is not None]
    for rows in [1, *edges, *(edge + 1 for edge in edges)]:
        # Many rows of one.
        feed = {
            name: np.broadcast_to(array, (rows, array.shape[1])).copy()
            if array.ndim == 2
            else array
            for name, array in feed_of(region, 1).items()
        }
        run_op(run, feed)
        wanted = next(x for x in launches if x.max_rows is None or rows <= x.max_rows)
        found = driver.launched()
        first = found[0]
        assert first.symbol == wanted.symbol
        assert (first.threads, first.shared_bytes) == (wanted.threads, wanted.shared_bytes)
        assert first.shared_limit == (wanted.shared_bytes if wanted.shared_bytes > 49152 else 0)
        blocks = -(-columns // wanted.block_columns), -(-rows // wanted.block_rows)
        assert first.grid == (*blocks, wanted.splits)
        assert first.arguments[len(wanted.parameters) - 1] == rows
        assert [one.symbol for one in found[1:]] == ([wanted.combine] if wanted.combine else [])
        for one in found:
            assert one.stream is None  # a CPU session has no stream
            assert one.context == 0x1000


def test_no_rows(on_cpu: Path, bench: Bench) -> None:
    driver = bench.driver(H200)
    run = open_session(bench.library(on_cpu), model_of(W4, constants_of(W4)))
    (y,) = run_op(run, feed_of(W4, 0))
    assert y.shape == (0, N)
    assert driver.launched() == []


def test_more_rows_than_a_grid_has_blocks(on_cpu: Path, bench: Bench) -> None:
    """Cut into calls, each of which starts where the one before ended."""
    driver = bench.driver(H200)
    driver.know_all(FP8, "sm_90a")
    run = open_session(bench.library(on_cpu), model_of(FP8, constants_of(FP8)))
    most = 65535 * cuda.launches(FP8, "sm_90a")[-1].block_rows
    rows = most + 5
    feed = {
        "q": np.zeros((rows, 144), ml_dtypes.float8_e4m3fn),
        "s": np.ones((rows, 1), np.float32),
    }
    run_op(run, feed)
    parameters = cuda.launches(FP8, "sm_90a")[0].parameters
    calls = driver.launched()
    firsts = [dict(zip(parameters, call.arguments, strict=False)) for call in calls]
    step = most // 16 * 16
    assert [first["rows"] for first in firsts] == [step, rows - step]
    assert firsts[1]["q"] - firsts[0]["q"] == step * 144
    assert firsts[1]["s"] - firsts[0]["s"] == step * 4
    assert firsts[1]["y"] - firsts[0]["y"] == step * 40 * 2
    assert firsts[1]["w"] == firsts[0]["w"]


@pytest.mark.parametrize("region", PRODUCTS, ids=lambda region: region.name)
def test_what_is_uploaded(region: Region, on_cpu: Path, bench: Bench) -> None:
    driver, constants = bench.driver(H200), constants_of(region)
    driver.know_all(region, "sm_90a")
    run = open_session(bench.library(on_cpu), model_of(region, constants))
    layout = cuda.packing(region)
    assert driver.get("used") == layout.weight_bytes + layout.scale_bytes
    run_op(run, feed_of(region, 1))
    launch = cuda.launches(region, "sm_90a")[0]
    given = dict(zip(launch.parameters, driver.launched()[0].arguments, strict=False))
    raw = constants["w"].view(np.uint8) if layout.bits == 8 else constants["w"].astype(np.int8)
    wz = constants["wz"].astype(np.int8) if "wz" in constants else None
    assert memory(given["w"], np.uint8, layout.weight_bytes).tobytes() == pack(raw, region)
    scales = memory(given["ws"], np.uint8, layout.scale_bytes).tobytes()
    assert scales == pack_scales(constants["ws"], region, wz, constants["w"])
    del run
    assert (driver.get("used"), driver.get("allocations")) == (0, 0)


def test_two_sessions_and_threads(on_cpu: Path, bench: Bench) -> None:
    """Kernels are loaded once, weights are each session's own, and runs do not mix."""
    driver, library = bench.driver(H200), bench.library(on_cpu)
    emulate(driver, W4, "sm_90a")
    constants = [constants_of(W4, seed) for seed in range(2)]
    sessions = [open_session(library, model_of(W4, each)) for each in constants]
    assert driver.get("modules") == 1
    assert driver.get("allocations") == 4
    feeds = [feed_of(W4, rows) for rows in (1, 30, 300)]
    expected = [[run_op(run, feed)[0] for feed in feeds] for run in sessions]
    assert not np.array_equal(expected[0][0], expected[1][0])
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 6, 12):
            (y,) = run_op(sessions[i % 2], feeds[i // 2])
            if not np.array_equal(y, expected[i % 2][i // 2]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    del sessions[0]
    assert driver.get("allocations") == 2


def test_the_context_of_the_caller_is_used_and_kept(on_cpu: Path, bench: Bench) -> None:
    driver, context = bench.driver(H200), ctypes.c_void_p()
    driver.know_all(W4, "sm_90a")
    run = open_session(bench.library(on_cpu), model_of(W4, constants_of(W4)))
    raw = ctypes.CDLL(str(driver.path))
    raw.cuCtxPushCurrent_v2(ctypes.c_void_p(0x1000))
    before = driver.get("pushes")
    run_op(run, feed_of(W4, 1))
    assert driver.get("pushes") == before
    raw.cuCtxPushCurrent_v2(ctypes.c_void_p(0x9000))  # another one's
    run_op(run, feed_of(W4, 1))
    raw.cuCtxGetCurrent(ctypes.byref(context))
    assert context.value == 0x9000
    assert {launch.context for launch in driver.launched()} == {0x1000}


@needs_compiler
def test_generated_kernels_in_a_session(on_cpu: Path, bench: Bench, tmp_path: Path) -> None:
    """All but the GPU: ONNX Runtime, the glue, a driver, and the CUDA that TVM wrote, emulated."""
    driver, constants = bench.driver(H200), constants_of(SMALL)
    kernels = Emulated(cuda.source(SMALL, "sm_90a"), tmp_path)
    k, n = SMALL.size("K"), SMALL.size("N")
    layout = cuda.packing(SMALL)

    def array(name: str, address: int, rows: int, splits: int) -> Array:
        shapes: dict[str, tuple[Any, ...]] = {
            "x": (np.float16, rows, k),
            "w": (np.uint8, layout.weight_bytes),
            "ws": (np.uint8, layout.scale_bytes),
            "extra0": (np.float16, n),
            "y": (np.float16, rows, n),
            "workspace": (np.float32, splits, rows, n),
        }
        return memory(address, *shapes[name])

    for launch in cuda.launches(SMALL, "sm_90a"):
        both = [(launch.symbol, launch.parameters, launch.shared_bytes)]
        if launch.combine is not None:
            both.append((launch.combine, launch.combine_parameters, 0))
        for symbol, parameters, shared in both:

            def run(
                values: list[int], grid: tuple[int, int, int], symbol: str = symbol,
                parameters: tuple[str, ...] = parameters, shared: int = shared,
                launch: cuda.Launch = launch,
            ) -> None:  # fmt: skip
                given = dict(zip(parameters, values, strict=True))
                rows = given.pop("rows")
                arrays = {
                    name: array(name, address, rows, launch.splits)
                    for name, address in given.items()
                }
                kernels.kernel(symbol, grid, launch.threads, shared, arrays, rows)

            driver.know(symbol, len(parameters), run)
    run_session = open_session(bench.library(on_cpu), model_of(SMALL, constants))
    for rows in (1, 12):
        feed = feed_of(SMALL, rows)
        (y,) = run_op(run_session, feed)
        expected = expected_of(SMALL, constants, feed)
        np.testing.assert_allclose(y, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    symbols = [launch.symbol for launch in driver.launched()]
    assert len(set(symbols)) == len(symbols) > 1


@pytest.mark.parametrize("region", [FP8, QUANTIZE], ids=lambda region: region.name)
def test_cubins_have_the_symbols_that_are_asked_for(region: Region) -> None:
    try:
        compiler = cubin.find_cubin_compiler()
    except ToolchainError as error:
        pytest.skip(str(error))
    image = compiler.compile(cuda.source(region, "sm_90a"), "sm_90a")
    for launch in cuda.launches(region, "sm_90a"):
        assert b"\0" + launch.symbol.encode() + b"\0" in image
        assert launch.combine is None or b"\0" + launch.combine.encode() + b"\0" in image

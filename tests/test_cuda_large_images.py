"""Images of more pixels than a grid has blocks of in y: the other blocks lie in z."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cuda_emulator import Emulated, kernels_of, needs_compiler
from cuda_images import Conv
from cuda_library import open_session
from stand_in import Bench, Gpu, build_for_cpu
from test_cuda_conv_library import DOMAIN, model_of

from qcompiler.ir.region import HALF
from qcompiler.targets import cuda
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.cuda.launch import TALL_BLOCKS
from qcompiler.targets.cuda.packing import conv_matrix, pack, pack_scales

PLAIN = Conv(16, 1, (1, 1), (0, 0, 0, 0), flags=(HALF,))
DEPTHWISE = Conv(16, 16, (1, 1), (0, 0, 0, 0), flags=(HALF,), group=16)
MOST_BLOCKS = 65535


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    regions = [region for conv in (PLAIN, DEPTHWISE) for region in (conv.region, conv.image)]
    build_for_cpu(folder / "gpu.so", regions, DOMAIN, KernelCache(folder / "cache"))
    return folder / "gpu.so"


@pytest.mark.parametrize(("conv", "size"), [(PLAIN, (2900, 2900)), (DEPTHWISE, (1450, 1450))])
def test_where_blocks_lie(conv: Conv, size: tuple[int, int], library: Path, bench: Bench) -> None:
    driver, pixels = bench.driver(Gpu()), size[0] * size[1]
    for region in (conv.image, conv.region):
        driver.know_all(region, "sm_90a")
    given = conv.operands((1, 1, 1))
    run = open_session(bench.library(library), model_of(conv, given))
    run.run(["y"], {"x": np.zeros((2, 16, *size), np.float16)})
    launched = driver.launched()
    for region in (conv.image, conv.region):
        launch = cuda.launches(region, "sm_90a")[-1]
        grids = [one.grid for one in launched if one.symbol == launch.symbol]
        blocks = -(-pixels // launch.block_rows)
        if blocks > MOST_BLOCKS:  # an image at a time
            assert grids == [(1, TALL_BLOCKS, -(-blocks // TALL_BLOCKS))] * 2
        else:
            assert sum(y for _, y, _ in grids) in (2 * blocks, -(-2 * pixels // launch.block_rows))
            assert {(x, z) for x, _, z in grids} == {(1, 1)}
    assert cuda.launches(conv.region, "sm_90a")[-1].block_rows * MOST_BLOCKS < pixels


def in_z(conv: Conv, folder: Path, arch: str) -> tuple[np.ndarray, np.ndarray]:
    """What the first block in z makes, with what its pixels are; of both columns are last."""
    region, width = conv.region, 1024
    launch = cuda.launches(region, arch)[-1]
    first = TALL_BLOCKS * launch.block_rows
    height = first // width + 1
    pixels = height * width
    given, rng = conv.operands((1, 1, 1)), np.random.default_rng(0)
    q = np.zeros((1, height, width, 16), np.uint8)
    q[0, -1] = rng.integers(0, 256, (width, 16))
    matrix = conv_matrix(given["w"], region)
    scales = pack_scales(given["ws"] * given["s"], region, w=matrix, zero=int(given["z"]))
    y = np.full((conv.columns, pixels), np.nan, np.float16)
    arrays = {
        "q": q, "w": np.frombuffer(pack(matrix, region), np.uint8),
        "ws": np.frombuffer(scales, np.uint8), "y": y,
    }  # fmt: skip
    kernels = Emulated(cuda.source(region, arch), folder, only=kernels_of(launch))
    kernels.kernel(
        launch.symbol, (1, 1, 2), launch.threads, launch.shared_bytes, arrays, pixels,
        height=height, width=width,
    )  # fmt: skip
    assert np.isnan(y[:, launch.block_rows : first]).all()
    assert np.isnan(y[:, first + launch.block_rows :]).all()
    there = slice(first, first + launch.block_rows)
    real = q.reshape(pixels, 16)[there].astype(np.float64) - int(given["z"])
    w = given["w"].reshape(conv.columns, -1).astype(np.float64)
    sums = real * w[:, 0] if conv.group > 1 else real @ w.T
    return y[:, there].T, sums * (given["ws"] * given["s"]).astype(np.float64)


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("conv", [PLAIN, DEPTHWISE])
def test_blocks_in_z_are_the_next_pixels(conv: Conv, arch: str, tmp_path: Path) -> None:
    result, expected = in_z(conv, tmp_path, arch)
    np.testing.assert_allclose(result, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@needs_compiler
def test_blocks_in_z_of_an_image(tmp_path: Path) -> None:
    region, width = PLAIN.image, 1024
    (launch,) = cuda.launches(region, "sm_80")
    first = TALL_BLOCKS * launch.block_rows
    height = first // width + 1
    x = np.zeros((1, 16, height, width), np.float16)
    x[0, :, -1] = np.random.default_rng(0).standard_normal((16, width))
    q = np.full((height * width, 16), 7, np.uint8)
    steps = {"s": np.full(1, 0.03, np.float32), "z": np.full(1, 100, np.uint8)}
    arrays = {name: ({"q": q, "x": x} | steps)[name] for name in "qsxz"}  # as they are given
    kernels = Emulated(cuda.source(region, "sm_80"), tmp_path)
    kernels.kernel(
        launch.symbol, (1, 1, 2), launch.threads, launch.shared_bytes, arrays, height * width,
        height=height, width=width,
    )  # fmt: skip
    there = slice(first, first + launch.block_rows)
    expected = np.rint(x[0, :, -1].astype(np.float32) / np.float32(0.03)) + 100
    np.testing.assert_array_equal(q[there], expected.clip(0, 255).T[: launch.block_rows])
    assert (q[launch.block_rows : first] == 7).all()
    assert (q[first + launch.block_rows :] == 7).all()

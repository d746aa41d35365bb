"""Convolutions for GPUs, in the emulator: against the functions' bodies in ONNX Runtime."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from cuda_emulator import Emulated, needs_compiler
from cuda_images import BIAS, RESIDUAL, Conv
from cuda_operands import run_body

from qcompiler.ir.region import Region
from qcompiler.targets import cuda
from qcompiler.targets.cuda.packing import conv_matrix, pack, pack_scales

pytestmark = needs_compiler

# Channels, columns, pixels and depths that fill nothing; borders wider than the kernel; every
# stride and dilation; K in splits; a single tap; more pixels than any tile.
CASES = [
    (Conv(20, 40, steps=BIAS), (2, 9, 7)),
    (Conv(64, 136, (1, 1), (0, 0, 0, 0), (2, 2)), (3, 9, 9)),
    (Conv(3, 24, (5, 3), (2, 0, 1, 3), (1, 2), (2, 1), steps=BIAS), (1, 13, 17)),
    (Conv(160, 24, steps=RESIDUAL), (1, 8, 8)),
    (Conv(130, 130, (3, 1), (2, 0, 2, 0), dilations=(2, 1), steps=RESIDUAL), (1, 5, 26)),
    (Conv(17, 12, (2, 2), (0, 0, 0, 0)), (1, 40, 41)),
]
ARCHS = {0: ("sm_80", "sm_90a"), 3: ("sm_80", "sm_90a"), 5: ("sm_80", "sm_90a")}
BY_ARCH = [(*case, arch) for i, case in enumerate(CASES) for arch in ARCHS.get(i, ("sm_90a",))]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    @functools.cache
    def make(region: Region, arch: str) -> Emulated:
        folder: Path = tmp_path_factory.mktemp("emulated")
        return Emulated(cuda.source(region, arch), folder)

    return make


def wide(array):
    return array.astype(np.float32) if array.dtype == np.float16 else array


def body_of_image(conv: Conv, given):
    x, s, z = wide(given["x"]), given["s"], given["z"]
    return run_body(conv.image, {"x": x, "s": np.asarray(s), "z": np.asarray(z)})[0]


def body_of_conv(conv: Conv, q, given):
    names = [name for name in given if name.startswith("extra")]
    inputs = {"q": q} | {name: np.asarray(wide(given[name])) for name in ("s", "z", "w", "ws")}
    return run_body(conv.region, inputs | {name: wide(given[name]) for name in names})[0]


@pytest.mark.parametrize(("conv", "shape"), CASES, ids=[conv.image.name for conv, _ in CASES])
def test_an_image_is_its_body(conv, shape, emulated):
    given = conv.operands(shape)
    given["x"][0, 0, :2, :3] = [[np.nan, np.inf, -np.inf], [6e4, -6e4, 0]]
    expected = body_of_image(conv, given)
    assert expected.shape == conv.stored(shape)
    (launch,) = cuda.launches(conv.image, "sm_80")
    pixels = int(np.prod(expected.shape[:3]))
    for backwards in (False, True):
        device = {
            "x": given["x"], "q": np.zeros_like(expected), "s": np.full(1, given["s"]),
            "z": np.full(1, given["z"]),
        }  # fmt: skip
        emulated(conv.image, "sm_80").run(
            launch, conv.channels, device, pixels, backwards, height=shape[1], width=shape[2]
        )
        np.testing.assert_array_equal(device["q"], expected)


def launch_for(region: Region, rows: int, arch: str) -> cuda.Launch:
    launches = cuda.launches(region, arch)
    return next(one for one in launches if one.max_rows is None or rows <= one.max_rows)


def device_of(conv: Conv, given, q, y):
    matrix = conv_matrix(given["w"])
    scales = pack_scales(given["ws"] * given["s"], conv.region, w=matrix, zero=int(given["z"]))
    extras = {name: given[name] for name in given if name.startswith("extra")}
    return extras | {
        "q": q, "y": y, "w": np.frombuffer(pack(matrix, conv.region), np.uint8),
        "ws": np.frombuffer(scales, np.uint8),
    }  # fmt: skip


def check(conv: Conv, given, q, y):
    """Sums are exact: what is left are the roundings of a few float32, and of float16."""
    expected = body_of_conv(conv, q, given)
    sums = np.abs(q.astype(np.float32) - given["z"]).max() * np.abs(wide(given["w"])).sum((1, 2, 3))
    magnitude = (sums * given["ws"] * given["s"])[:, None, None] + 4
    error = np.abs(y.astype(np.float64) - expected)
    assert (error <= 2.0**-11 * np.abs(expected) + 2.0**-22 * magnitude).all(), error.max()


@pytest.mark.parametrize(
    ("conv", "shape", "arch"), BY_ARCH, ids=[f"{conv.region.name}-{a}" for conv, _, a in BY_ARCH]
)
def test_a_convolution_is_its_body(conv, shape, arch, emulated):
    given = conv.operands(shape)
    q = body_of_image(conv, given)
    count, _, height, width = conv.result(shape)
    rows = count * height * width
    for backwards in (False, True):
        device = device_of(conv, given, q, np.full(conv.result(shape), np.nan, np.float16))
        launch = launch_for(conv.region, rows, arch)
        emulated(conv.region, arch).run(
            launch, conv.columns, device, rows, backwards, height=q.shape[1], width=q.shape[2]
        )
        check(conv, given, q, device["y"])


def test_the_cases_are_what_they_are_meant_for():
    launches = [
        launch_for(conv.region, int(np.prod(conv.result(shape))) // conv.columns, "sm_80")
        for conv, shape in CASES
    ]
    assert [launch.block_rows for launch in launches] == [64, 64, 64, 64, 64, 128]
    assert launches[3].splits > 1

"""Convolutions for GPUs, in the emulator: against the functions' bodies in ONNX Runtime."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from cuda_emulator import Emulated, kernels_of, needs_compiler
from cuda_images import BIAS, RESIDUAL, Conv
from cuda_operands import run_body

from qcompiler.ir.region import Region
from qcompiler.targets import cuda
from qcompiler.targets.cuda.packing import conv_matrix, image_columns, pack, pack_scales

pytestmark = needs_compiler

CHAIN = Conv(20, 40, steps=BIAS, made=(1, 2, 0, 3))
BOTH = ("y", "made")

# Channels, columns, pixels and depths that fill nothing; borders wider than the kernel; every
# stride and dilation; K in splits; a single tap; more pixels than any tile.
CASES = [
    (Conv(20, 40, steps=BIAS), (2, 9, 7)),
    (Conv(64, 136, (1, 1), (0, 0, 0, 0), (2, 2)), (3, 9, 9)),
    (Conv(3, 24, (5, 3), (2, 0, 1, 3), (1, 2), (2, 1), steps=BIAS), (1, 13, 17)),
    (Conv(160, 24, steps=RESIDUAL), (1, 8, 8)),
    (Conv(130, 130, (3, 1), (2, 0, 2, 0), dilations=(2, 1), steps=RESIDUAL), (1, 5, 26)),
    (Conv(17, 12, (2, 2), (0, 0, 0, 0)), (1, 66, 67)),
]
# Results that are stored as images: with borders of every width and none, beside planes, of K in
# splits, of one pixel, of channels that fill no 16.
CHAINS = [
    (CHAIN, (2, 9, 7)),
    (Conv(64, 136, (1, 1), (0, 0, 0, 0), (2, 2), made=(0, 0, 0, 0)), (3, 9, 9)),
    (Conv(160, 24, steps=RESIDUAL, made=(1, 1, 1, 1), outputs=BOTH), (1, 8, 8)),
    (Conv(160, 50, steps=RESIDUAL, made=(0, 3, 2, 0)), (2, 7, 7)),
    (Conv(17, 130, (2, 2), (0, 0, 0, 0), made=(2, 0, 1, 1), outputs=BOTH), (1, 66, 67)),
    (Conv(16, 3, (3, 3), (0, 0, 0, 0), made=(1, 1, 1, 1)), (2, 3, 3)),
]
# Groups within 16 channels and across them, of more columns than channels and fewer, that a tile of
# columns divides; depthwise ones.
GROUPS = [
    (Conv(64, 64, group=16, steps=BIAS), (2, 6, 7)),
    (Conv(72, 144, (3, 1), (1, 0, 1, 0), group=3, made=(1, 1, 1, 1)), (1, 9, 9)),
    (Conv(240, 160, (1, 2), (0, 1, 0, 0), group=5, steps=RESIDUAL), (1, 7, 6)),
    (Conv(160, 320, (1, 1), (0, 0, 0, 0), (2, 2), group=10), (1, 17, 19)),
    (Conv(24, 24, group=24, steps=BIAS), (2, 9, 7)),
    (Conv(140, 140, (5, 3), (2, 1, 2, 1), (2, 1), (1, 2), group=140, steps=RESIDUAL,
          made=(1, 2, 0, 3), outputs=BOTH), (1, 8, 9)),
    (Conv(33, 33, (2, 2), (0, 0, 0, 0), group=33, made=(1, 1, 1, 1)), (1, 3, 4)),
]  # fmt: skip
ARCHS = {0: ("sm_80", "sm_90a"), 3: ("sm_80", "sm_90a"), 5: ("sm_80", "sm_90a")}
BY_ARCH = [(*case, arch) for i, case in enumerate(CASES) for arch in ARCHS.get(i, ("sm_90a",))]
BY_ARCH += [(*case, "sm_80" if i % 2 else "sm_90a") for i, case in enumerate(CHAINS)]
BY_ARCH += [(*case, "sm_80" if i % 2 else "sm_90a") for i, case in enumerate(GROUPS)]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    @functools.cache
    def make(region: Region, arch: str, launch: cuda.Launch) -> Emulated:
        folder: Path = tmp_path_factory.mktemp("emulated")
        return Emulated(cuda.source(region, arch), folder, only=kernels_of(launch))

    return make


def wide(array):
    return array.astype(np.float32) if array.dtype == np.float16 else array


def body_of_image(conv: Conv, given):
    x, s, z = wide(given["x"]), given["s"], given["z"]
    return run_body(conv.image, {"x": x, "s": np.asarray(s), "z": np.asarray(z)})[0]


def body_of_conv(conv: Conv, q, given):
    """What it makes, by name."""
    names = [name for name in given if name.startswith("extra")]
    constants = [name for name in ("s", "z", "w", "ws", "t", "u") if name in given]
    inputs = {"q": q} | {name: np.asarray(wide(given[name])) for name in constants}
    results = run_body(conv.region, inputs | {name: wide(given[name]) for name in names})
    return dict(zip(conv.region.outputs or ("y",), results, strict=True))


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
        emulated(conv.image, "sm_80", launch).run(
            launch, conv.channels, device, pixels, backwards, height=shape[1], width=shape[2]
        )
        np.testing.assert_array_equal(device["q"], expected)


def launch_for(region: Region, rows: int, arch: str) -> cuda.Launch:
    launches = cuda.launches(region, arch)
    return next(one for one in launches if one.max_rows is None or rows <= one.max_rows)


def device_of(conv: Conv, given, q, shape):
    matrix, region = conv_matrix(given["w"], conv.region), conv.region
    result = (float(given["t"]), int(given["u"])) if "t" in given else None
    scales = pack_scales(
        given["ws"] * given["s"], region, w=matrix, zero=int(given["z"]), result=result
    )
    device = {name: given[name] for name in given if name.startswith("extra")}
    device |= {
        "q": q, "w": np.frombuffer(pack(matrix, region), np.uint8),
        "ws": np.frombuffer(scales, np.uint8),
    }  # fmt: skip
    if "made" not in region.outputs or "y" in region.outputs:
        device["y"] = np.full(conv.result(shape), np.nan, np.float16)
    if "made" in region.outputs:
        device["made"] = np.full(conv.result_image(shape), 255, np.uint8)
    return device


def check(conv: Conv, given, q, device):
    """Sums are exact: what is left are the roundings of a few float32, and of float16."""
    expected = body_of_conv(conv, q, given)
    if "y" in expected:
        sums = np.abs(q.astype(np.float32) - given["z"]).max()
        # An int8 of -128 has no magnitude.
        sums = sums * np.abs(given["w"].astype(np.float32)).sum((1, 2, 3))
        magnitude = (sums * given["ws"] * given["s"])[:, None, None] + 4
        error = np.abs(device["y"].astype(np.float64) - expected["y"])
        bound = 2.0**-11 * np.abs(expected["y"]) + 2.0**-22 * magnitude
        assert (error <= bound).all(), error.max()
    if "made" in expected:
        check_image(conv, given, device, expected["made"])


def check_image(conv: Conv, given, device, expected):
    """The border and padding exactly; of pixels a few are one off, where float16 decides a tie."""
    top, left, bottom, right = conv.made
    _, height, width, _ = expected.shape
    inside = np.zeros(expected.shape, bool)
    inside[:, top : height - bottom, left : width - right, : conv.columns] = True
    assert (device["made"][~inside] == given["u"]).all()
    pixels, wanted = device["made"][inside].astype(int), expected[inside].astype(int)
    assert 30 < wanted.std() < 110
    assert np.abs(pixels - wanted).max() <= 1
    assert (pixels != wanted).mean() < 0.03
    if "y" in device:  # whose bytes they are
        scaled = device["y"].astype(np.float32) / np.float32(given["t"])
        stored = (np.rint(np.clip(scaled, -512, 512)) + given["u"]).clip(0, 255)
        np.testing.assert_array_equal(device["made"][inside], stored.transpose(0, 2, 3, 1).ravel())


@pytest.mark.parametrize(
    ("conv", "shape", "arch"), BY_ARCH, ids=[f"{conv.region.name}-{a}" for conv, _, a in BY_ARCH]
)
def test_a_convolution_is_its_body(conv, shape, arch, emulated):
    given = conv.operands(shape)
    q = body_of_image(conv, given)
    count, _, height, width = conv.result(shape)
    rows = count * height * width
    for backwards in (False, True):
        device = device_of(conv, given, q, shape)
        launch = launch_for(conv.region, rows, arch)
        emulated(conv.region, arch, launch).run(
            launch, image_columns(conv.region), device, rows, backwards, height=q.shape[1],
            width=q.shape[2],
        )  # fmt: skip
        check(conv, given, q, device)


def test_the_cases_are_what_they_are_meant_for():
    def planned(conv, shape):
        return launch_for(conv.region, int(np.prod(conv.result(shape))) // conv.columns, "sm_80")

    launches = [planned(*case) for case in CASES]
    assert [launch.block_rows for launch in launches] == [64, 64, 64, 64, 64, 128]
    assert launches[3].splits > 1
    assert [planned(*case).splits > 1 for case in CHAINS] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert planned(*CHAINS[4]).block_rows == 128
    kinds = ["_channels_" in planned(*case).symbol for case in GROUPS]
    assert kinds == [False] * 4 + [True] * 3
    depths = [cuda.packing(conv.region).depth for conv, _ in GROUPS[:4]]
    assert depths == [-(-taps * 16 * parts // 128) * 128 for taps, parts in (
        (9, 4), (3, 5), (2, 12), (1, 4))]  # fmt: skip

"""Convolutions for GPUs, in the emulator: against the functions' bodies in ONNX Runtime."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest
from cuda_emulator import Emulated, EmulatorError, needs_compiler
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


# What is planted, by the number of the fault: a pattern in the source of CASES[0], and what takes
# its place everywhere.
OF_CONV = {
    1: ("pixels past the last", r"\(rows - 1\)", "(rows - 1 + 8 * FAULT(1))"),
    2: ("taps past the last", r" < 1\)\) \* \(uint\)16", " < 1 + 9 * FAULT(2))) * (uint)16"),
    3: ("channels of another tap", r"% \(int64_t\)6\)", "% (int64_t)(6 - FAULT(3)))"),
    4: ("no zero point", r"\(float\)\((\w+) - \(", r"(float)(\1 - !FAULT(4) * ("),
    5: ("another plane", r"\* \(int64_t\)40\)", "* (int64_t)(40 - FAULT(5)))"),
    6: ("no barrier", r"(tvm_builtin_cuda_cta_sync\(\);)", r"if (!FAULT(6)) \1"),
    7: ("lines of another width", r"\* width\)", "* (width - FAULT(7)))"),
}
OF_IMAGE = {
    1: ("a line below", r" <= height\)", " <= height + FAULT(1))"),
    2: ("a line above", r"1 <= \(", "1 - FAULT(2) <= ("),
    3: ("no barrier", r"(tvm_builtin_cuda_cta_sync\(\);)", r"if (!FAULT(3)) \1"),
    4: ("another image", r"\* \(int64_t\)20\)", "* (int64_t)(20 - FAULT(4)))"),
    5: ("the scale's inverse", r" / v_6\)", " / (FAULT(5) ? 1 / v_6 : v_6))"),
}


def with_faults(source: str, faults) -> str:
    start = source.index('extern "C" __global__')
    head, body = source[:start], source[start:]
    for what, pattern, replacement in faults.values():
        body, count = re.subn(pattern, replacement, body)
        assert count, f"{what}: the source has no {pattern}"
    return head + body


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The kernels of the first case with all faults, none of which happens unless asked for."""
    conv, _ = CASES[0]
    sources = [(conv.region, OF_CONV), (conv.image, OF_IMAGE)]
    return [
        Emulated(with_faults(cuda.source(region, "sm_80"), faults), tmp_path_factory.mktemp("f"))
        for region, faults in sources
    ]


def seen(planted, fault_of_conv: int = 0, fault_of_image: int = 0) -> str:
    """What the emulator or the comparison says; empty if all is well."""
    (conv, shape), (of_conv, of_image) = CASES[0], planted
    given = conv.operands(shape)
    q, y = body_of_image(conv, given), np.full(conv.result(shape), np.nan, np.float16)
    (image,), rows = cuda.launches(conv.image, "sm_80"), y.size // conv.columns
    device = device_of(conv, given, q, y)
    sizes = {"height": q.shape[1], "width": q.shape[2]}
    made = np.zeros_like(q)
    stored = {"x": given["x"], "q": made, "s": np.full(1, given["s"]), "z": np.full(1, given["z"])}
    for backwards in (False, True):
        try:
            of_conv.run(launch_for(conv.region, rows, "sm_80"), conv.columns, device, rows,
                        backwards, fault_of_conv, **sizes)  # fmt: skip
            check(conv, given, q, y)
            of_image.run(image, conv.channels, stored, q.size // q.shape[3], backwards,
                         fault_of_image, height=shape[1], width=shape[2])  # fmt: skip
            np.testing.assert_array_equal(made, q)
        except EmulatorError as error:
            return str(error)
        except AssertionError:
            return "numbers"
    return ""


def test_nothing_is_seen_where_nothing_is_wrong(planted):
    assert seen(planted) == ""


@pytest.mark.parametrize("fault", OF_CONV, ids=lambda fault: OF_CONV[fault][0])
def test_a_planted_fault_of_a_convolution_is_seen(fault, planted):
    wanted = {1: "of q, which has", 2: "of q, which has|past the end", 6: "no barrier|numbers"}
    assert re.search(wanted.get(fault, "numbers|of q, which has"), seen(planted, fault))


@pytest.mark.parametrize("fault", OF_IMAGE, ids=lambda fault: OF_IMAGE[fault][0])
def test_a_planted_fault_of_an_image_is_seen(fault, planted):
    assert re.search("numbers|of x, which has|no barrier", seen(planted, 0, fault))


def test_the_cases_are_what_they_are_meant_for():
    launches = [
        launch_for(conv.region, int(np.prod(conv.result(shape))) // conv.columns, "sm_80")
        for conv, shape in CASES
    ]
    assert [launch.block_rows for launch in launches] == [64, 64, 64, 64, 64, 128]
    assert launches[3].splits > 1

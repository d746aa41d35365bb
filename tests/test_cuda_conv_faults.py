"""Planted faults in the kernels of convolutions, and that they are seen."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
from cuda_emulator import Emulated, EmulatorError, kernels_of, needs_compiler
from cuda_images import BIAS, RESIDUAL, Conv
from test_cuda_conv import body_of_image, check, device_of, launch_for

from qcompiler.targets import cuda
from qcompiler.targets.cuda.packing import image_columns

pytestmark = needs_compiler

PLAIN = Conv(20, 40, steps=BIAS), (2, 9, 7)
GROUPED = Conv(240, 160, (1, 2), (0, 1, 0, 0), group=5), (1, 7, 6)
DEPTHWISE = Conv(40, 40, group=40, steps=BIAS, made=(1, 1, 1, 1)), (2, 9, 7)
SPLIT = (
    Conv(160, 24, steps=RESIDUAL, made=(1, 2, 1, 1), outputs=("y", "made")),
    (1, 8, 8),
)

# What is planted, by the number of the fault: a pattern in the source of a case, and what takes
# its place everywhere.  TVM numbers its variables as it pleases: a pattern names none of them.
BARRIER = ("no barrier", r"(tvm_builtin_cuda_cta_sync\(\);)", r"if (!FAULT(1)) \1")
DIVIDED = r" / ([a-z]\w*)(\), -)"
"""A float by a variable, and the lower end of what the quotient is brought into."""
OF_CONV = {
    1: BARRIER,
    2: ("taps past the last", r" < 1\)\) \* \(uint\)16", " < 1 + 9 * FAULT(2))) * (uint)16"),
    3: ("channels of another tap", r"% \(int64_t\)6\)", "% (int64_t)(6 - FAULT(3)))"),
    4: ("no zero point", r"\(float\)\((\w+) - \(", r"(float)(\1 - !FAULT(4) * ("),
    5: ("another plane", r"\* \(int64_t\)40\)", "* (int64_t)(40 - FAULT(5)))"),
    6: ("pixels past the last", r"\(rows - 1\)", "(rows - 1 + 8 * FAULT(6))"),
    7: ("lines of another width", r"\* width\)", "* (width - FAULT(7)))"),
}
OF_GROUPS = {
    1: (
        "channels of another group",
        r"min\(\(\(\(int\)blockIdx\.x\) \* 12\), 3\)",
        "(FAULT(1) ? 0 : min((((int)blockIdx.x) * 12), 3))",
    ),
    2: (
        "channels past the last",
        r"min\(\(\(\(int\)blockIdx\.x\) \* 12\), 3\)",
        "(((int)blockIdx.x) * (FAULT(2) ? 12 : 3))",
    ),
    3: ("pixels of fewer channels", r"\* 15\)", "* (15 - FAULT(3)))"),
}
OF_CHANNELS = {
    1: BARRIER,
    2: ("no border above", r"== 0\) \? 0 :", "== 0) ? FAULT(2) :"),
    3: ("no border below", r"\? height :", "? height - FAULT(3) :"),
    4: ("no border to the right", r"\? width :", "? width - FAULT(4) :"),
    5: ("padding is computed", r"\(([a-z]\w*) < 10\)", r"(\1 < 10 + FAULT(5))"),
    6: ("channels past the last", r" < 12\)\)", " < 12 + FAULT(6)))"),
    7: (
        "pixels past the last",
        r"< rows\) & (\S+threadIdx\.x\) & 31\) < 12)",
        r"< rows + 8 * FAULT(7)) & \1",
    ),
    8: ("another channel", r"\(uint\)21520\)", "(uint)(FAULT(8) ? 30258 : 21520))"),
    9: ("taps in another order", r"\(uint\)20800\)", "(uint)(FAULT(9) ? 20740 : 20800))"),
    10: ("the scale's inverse", DIVIDED, r" / (FAULT(10) ? 1 / \1 : \1)\2"),
    11: ("bytes on each other", r"& 31\) \* 132\)", "& 31) * (132 - FAULT(11) * 100))"),
    12: (
        "weights of other taps",
        r"_nc_v4_u32\((.*)\* 512\)",
        r"_nc_v4_u32(\1* (512 - FAULT(12) * 16))",
    ),
}
OF_SPLITS = {
    2: ("a part less", r"(for \(int (\w+) = 0; \2 < 3);", r"\1 - FAULT(2);"),
    3: ("no border below", r"\? height :", "? height - FAULT(3) :"),
    4: ("a byte beside its place", r" << \(uint\)16", " << (uint)(16 + 8 * FAULT(4))"),
    5: ("of other channels", r"(\* \(int64_t\))32\)", r"\1(32 - FAULT(5)))"),
}
ALL = {
    "conv": (*PLAIN, OF_CONV), "groups": (*GROUPED, OF_GROUPS),
    "channels": (*DEPTHWISE, OF_CHANNELS), "splits": (*SPLIT, OF_SPLITS),
}  # fmt: skip
OF_IMAGE = {
    1: ("a line below", r" <= height\)", " <= height + FAULT(1))"),
    2: ("a line above", r"1 <= \(", "1 - FAULT(2) <= ("),
    3: ("no barrier", r"(tvm_builtin_cuda_cta_sync\(\);)", r"if (!FAULT(3)) \1"),
    4: ("another image", r"\* \(int64_t\)20\)", "* (int64_t)(20 - FAULT(4)))"),
    5: ("the scale's inverse", DIVIDED, r" / (FAULT(5) ? 1 / \1 : \1)\2"),
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
    """The kernels of a case with all faults, none of which happens unless asked for."""

    @functools.cache
    def make(case: str) -> Emulated:
        conv, shape, faults = ALL[case]
        source = with_faults(cuda.source(conv.region, "sm_80"), faults)
        only = kernels_of(launch_for(conv.region, rows_of(conv, shape), "sm_80"))
        return Emulated(source, tmp_path_factory.mktemp(case), only=only)

    return make


def rows_of(conv: Conv, shape) -> int:
    """How many pixels the result has."""
    return int(np.prod(conv.result(shape))) // conv.columns


def seen(planted, case: str, fault: int = 0) -> str:
    """What the emulator or the comparison says; empty if all is well."""
    conv, shape, _ = ALL[case]
    given = conv.operands(shape)
    q, rows = body_of_image(conv, given), rows_of(conv, shape)
    for backwards in (False, True):
        device, kernels = device_of(conv, given, q, shape), planted(case)
        try:
            kernels.run(
                launch_for(conv.region, rows, "sm_80"), image_columns(conv.region), device, rows,
                backwards, fault, height=q.shape[1], width=q.shape[2],
            )  # fmt: skip
            check(conv, given, q, device)
        except EmulatorError as error:
            return str(error)
        except AssertionError:
            return "numbers"
    return ""


FAULTS = [(case, fault) for case, (_, _, faults) in ALL.items() for fault in faults]


@pytest.mark.parametrize("case", ALL)
def test_nothing_is_seen_where_nothing_is_wrong(case, planted):
    assert seen(planted, case) == ""


@pytest.mark.parametrize(
    ("case", "fault"), FAULTS, ids=[f"{case}-{ALL[case][2][fault][0]}" for case, fault in FAULTS]
)
def test_a_planted_fault_of_a_convolution_is_seen(case, fault, planted):
    wanted = {
        ("conv", 6): "of q, which has", ("conv", 2): "of q, which has|past the end",
        ("conv", 1): "no barrier|numbers", ("groups", 2): "of q, which has|numbers",
        ("channels", 6): "made|numbers", ("splits", 5): "not aligned|numbers",
    }  # fmt: skip
    assert re.search(wanted.get((case, fault), "numbers|, which has"), seen(planted, case, fault))


@pytest.fixture(scope="module")
def planted_image(tmp_path_factory):
    source = with_faults(cuda.source(PLAIN[0].image, "sm_80"), OF_IMAGE)
    return Emulated(source, tmp_path_factory.mktemp("image"))


def seen_of_image(planted_image, fault: int = 0) -> str:
    conv, shape = PLAIN
    given = conv.operands(shape)
    q, (image,) = body_of_image(conv, given), cuda.launches(conv.image, "sm_80")
    made = np.zeros_like(q)
    stored = {"x": given["x"], "q": made, "s": np.full(1, given["s"]), "z": np.full(1, given["z"])}
    for backwards in (False, True):
        try:
            planted_image.run(image, conv.channels, stored, q.size // q.shape[3], backwards,
                              fault, height=shape[1], width=shape[2])  # fmt: skip
        except EmulatorError as error:
            return str(error)
        if not np.array_equal(made, q):
            return "numbers"
    return ""


def test_nothing_is_seen_of_a_right_image(planted_image):
    assert seen_of_image(planted_image) == ""


@pytest.mark.parametrize("fault", OF_IMAGE, ids=lambda fault: OF_IMAGE[fault][0])
def test_a_planted_fault_of_an_image_is_seen(fault, planted_image):
    assert re.search("numbers|of x, which has|no barrier", seen_of_image(planted_image, fault))

"""Planted faults in the kernels of convolutions: what the emulator and the comparison see of them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cuda_emulator import Emulated, EmulatorError, needs_compiler
from test_cuda_conv import (
    CASES,
    CHAINS,
    GROUPS,
    body_of_image,
    check,
    device_of,
    launch_for,
)

from qcompiler.targets import cuda
from qcompiler.targets.cuda.packing import image_columns

pytestmark = needs_compiler

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



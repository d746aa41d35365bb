"""The emulator must see what would be wrong on a GPU, even where a GPU is only sometimes wrong."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import pytest
from cuda_emulator import Emulated, EmulatorError, kernels_of, needs_compiler, run
from cuda_operands import operands_of
from test_cuda_kernels import compare, launch_for, w4a16

from qcompiler.targets import cuda

pytestmark = needs_compiler

REGION = w4a16(832, 136, 64)
FEW, ROWS, MANY = 8, 13, 300

# What is planted by the number of the fault: a pattern in the source, which of its places, and what
# takes its place.  The kernel is that of 16 rows.
PLANTED = {
    1: ("no wait", r"(\w+_cp_async_wait_group_\w+\(\);)", 0, r"if (!FAULT(1)) \1"),
    2: ("no barrier after the wait", r"(tvm_builtin_cuda_cta_sync\(\);)", 0, r"if (!FAULT(2)) \1"),
    3: ("no barrier before results", r"(tvm_builtin_cuda_cta_sync\(\);)", 1, r"if (!FAULT(3)) \1"),
    4: ("no barrier after results", r"(tvm_builtin_cuda_cta_sync\(\);)", 2, r"if (!FAULT(4)) \1"),
    5: ("a barrier for some", r"(tvm_builtin_cuda_cta_sync\(\);)", 2,
        r"if (!FAULT(5) || threadIdx.x < 64) \1"),
    6: ("rows past the end", r"\(rows - 1\)", 0, "(rows - 1 + (FAULT(6) ? 16 : 0))"),
    7: ("codes off by one", r"\(uint\)1678271496", 0, "(uint)(1678271496 + FAULT(7))"),
    8: ("groups end late", r"(\w+_cp_async_commit_group_\w+\(\);)", 3, r"if (!FAULT(8)) \1"),
    9: ("another stage", r"(x4_shared_b16\([^;]*?)\(([a-z]\w*) & 3\)", 0,
        r"\1((\2 + FAULT(9)) & 3)"),
}  # fmt: skip
SEEN_AS = {
    1: "no barrier between|numbers",
    2: "no barrier between",
    3: "numbers",
    4: "numbers",
    5: "waits forever",
    6: "of x, which has",
    7: "numbers",
    8: "numbers|no barrier",
    9: "numbers|no barrier",
}


OF_WARPGROUP = {
    11: ("no fence", r"(\w+_fence_proxy_\w+\(\);)", 0, r"if (!FAULT(11)) \1"),
    12: ("no wait for products", r"(\w+_wgmma_wait_group_\w+\(\);)", 0, r"if (!FAULT(12)) \1"),
    13: (
        "another operand",
        r">> \(uint64_t\)4ULL\)",
        0,
        ">> (uint64_t)4ULL) + (FAULT(13) ? 8 : 0)",
    ),
}
SEEN_AS |= {11: "no fence.proxy.async lets it see", 12: "numbers", 13: "numbers|wgmma"}
_WAIT = r"\w+_mbarrier_wait\("
_ARRIVE = r"\w+_mbarrier_arrive_\w+\("
OF_ROLES = {
    21: ("no wait for a free place", rf"({_WAIT})", 0, r"if (!FAULT(21)) \1"),
    22: ("no wait for a chunk", rf"({_WAIT})", 1, r"if (!FAULT(22)) \1"),
    23: ("the wrong phase of free", r" >> 2\) \^ 1\)", 0, " >> 2) ^ (FAULT(23) ? 0 : 1))"),
    24: ("the wrong phase of full", r"(\(\w+ & 7\) >> 2\))\);", 0, r"\1 ^ FAULT(24));"),
    25: ("a place is never free", rf"({_ARRIVE})", 1, r"if (!FAULT(25)) \1"),
    26: ("full before it is there", r"(\w+_cp_async_wait_group_\w+\(\);)", 0,
         r"if (!FAULT(26)) \1"),
    27: ("no fence of the producer", r"(\w+_fence_proxy_\w+\(\);)", 0, r"if (!FAULT(27)) \1"),
    28: ("free while multiplied", r"(\w+_wgmma_wait_group_\w+\(\);)", 0, r"if (!FAULT(28)) \1"),
    29: ("a warp that is not whole", r"(\w+_bar_warp_sync_\w+\()", 0, r"if (!FAULT(29)) \1"),
    30: ("results over chunks", r"(\w+_bar_sync_count_\w+\()", 0, r"if (!FAULT(30)) \1"),
    31: ("no wait for results", r"(\w+_bar_sync_count_\w+\()", 1, r"if (!FAULT(31)) \1"),
}  # fmt: skip
SEEN_AS |= {
    21: "waits forever|no barrier between|numbers",
    22: "no barrier between|numbers",
    23: "waits forever|no barrier between|numbers",
    24: "waits forever|no barrier between|numbers",
    25: "waits forever",
    26: "no barrier between|numbers|lets it see",
    27: "lets it see",
    28: "numbers|no barrier between",
    29: "no barrier between",
    30: "numbers|no barrier between",
    31: "numbers",
}
# By architecture and number of rows, which choose the kernel; MANY that for any number.
FAULTS = {("sm_80", ROWS): PLANTED, ("sm_90a", ROWS): OF_WARPGROUP, ("sm_90a", MANY): OF_ROLES}


def launch_of(arch: str, rows: int) -> cuda.Launch:
    return cuda.launches(REGION, arch)[-1] if rows == MANY else launch_for(REGION, rows, arch)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The kernels of REGION with all faults, none of which happens unless asked for."""

    @functools.cache
    def make(arch: str, rows: int) -> Emulated:
        source = cuda.source(REGION, arch)
        start = source.index("{", source.rindex(launch_of(arch, rows).symbol + "("))
        head, body = source[:start], source[start:]
        for what, pattern, place, replacement in FAULTS[arch, rows].values():
            places = list(re.finditer(pattern, body))
            assert len(places) > place, f"{what}: the source has no {pattern}"
            found = places[place]
            body = body[: found.start()] + found.expand(replacement) + body[found.end() :]
        only = kernels_of(launch_of(arch, rows), launch_for(REGION, FEW, arch))
        return Emulated(head + body, tmp_path_factory.mktemp("planted"), only=only)

    return make


def seen(planted: Emulated, launch: cuda.Launch, fault: int, rows: int = ROWS) -> str:
    """What the emulator or the comparison says; empty if all is well."""
    for backwards in (False, True):
        operands = operands_of(REGION, rows)
        try:
            planted.run(launch, REGION.size("N"), operands.device, rows, backwards, fault)
            compare(REGION, operands)
        except EmulatorError as error:
            return str(error)
        except AssertionError:
            return "numbers"
    return ""


@pytest.mark.parametrize(("arch", "rows"), FAULTS)
def test_nothing_is_seen_where_nothing_is_wrong(arch, rows, planted):
    assert seen(planted(arch, rows), launch_of(arch, rows), 0, rows) == ""


@pytest.mark.parametrize(
    ("arch", "rows", "fault"),
    [
        pytest.param(arch, rows, number, id=faults[number][0].replace(" ", "-"))
        for (arch, rows), faults in FAULTS.items()
        for number in faults
    ],
)
def test_a_planted_fault_is_seen(arch, rows, fault, planted):
    found = seen(planted(arch, rows), launch_of(arch, rows), fault, rows)
    assert re.search(SEEN_AS[fault], found)


def test_too_little_shared_memory_is_seen(planted):
    launch = launch_for(REGION, ROWS)
    less = dataclasses.replace(launch, shared_bytes=launch.shared_bytes - 1024)
    assert re.search("of shared memory|at shared byte", seen(planted("sm_80", ROWS), less, 0))


def test_a_short_result_is_seen(planted):
    operands = operands_of(REGION, FEW)
    operands.device["y"] = np.full((7, 136), np.nan, np.float16)
    with pytest.raises(EmulatorError, match=r"of y, which has|past the end of y"):
        planted("sm_80", ROWS).run(launch_for(REGION, FEW), 136, operands.device, FEW)


def test_zig_compiles_it_where_nothing_else_does(tmp_path, monkeypatch):
    """The compiler that links libraries, of the extra [zig], is enough for all of these tests."""
    pytest.importorskip("ziglang")
    monkeypatch.setattr("shutil.which", lambda name: None)
    run._runtime.cache_clear()
    assert "ziglang" in run._compiler()
    operands, launch = operands_of(REGION, FEW), launch_for(REGION, FEW)
    kernels = Emulated(cuda.source(REGION, "sm_80"), tmp_path, only=kernels_of(launch))
    monkeypatch.undo()
    run._runtime.cache_clear()
    kernels.run(launch, REGION.size("N"), operands.device, FEW)
    compare(REGION, operands)


def test_an_instruction_that_is_not_known_is_refused(tmp_path):
    source = cuda.source(REGION, "sm_80").replace("prmt.b32", "shf.l.wrap.b32")
    with pytest.raises(ValueError, match=r"does not know this PTX: shf"):
        Emulated(source, tmp_path)

"""What this machine can run, asked of the machine itself."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

__all__ = ["gpu_capability", "instruction_sets", "machine"]

_FLAGS = {
    "avx512-vnni": ("avx512_vnni",),
    "avx-vnni": ("avx_vnni",),
    "avx2": ("avx2", "fma"),
    "i8mm": ("i8mm",),
    "dotprod": ("asimddp",),
}
"""Of each instruction set that a target names, the flags in /proc/cpuinfo."""

_CU_MAJOR, _CU_MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""


def machine() -> str:
    """As targets name it: "linux-x86_64"."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """The sets of `_FLAGS` that this processor has; none where /proc/cpuinfo is missing."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return ()
    return tuple(name for name, flags in _FLAGS.items() if words.issuperset(flags))


@functools.cache
def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of the first CUDA device, None without one or without its driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for target, attribute in ((major, _CU_MAJOR), (minor, _CU_MINOR)):
        if driver.cuDeviceGetAttribute(ctypes.byref(target), attribute, device):
            return None
    return major.value, minor.value

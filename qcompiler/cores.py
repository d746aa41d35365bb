"""The processor's cores: how many are ours, and how many of those others keep busy."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["are_busy", "available_cores", "busy_cores"]

_STAT = Path("/proc/stat")
_IDLE, _IOWAIT, _STEAL = 3, 4, 7
"""Fields of proc(5); those after `steal` are counted within the first two already."""


_SHARE = 0.25


def available_cores() -> int:
    """Cores this process may use."""
    return len(_ours())


def busy_cores(seconds: float = 0.2) -> float | None:
    """Cores that were busy on average while this waited; None where /proc/stat does not tell."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    if before is None or after is None or before.keys() != after.keys():
        return None
    busy = 0.0
    for core, (working, total) in after.items():
        passed = total - before[core][1]
        busy += (working - before[core][0]) / passed if passed else 0.0
    return busy


def are_busy(load: float | None, cores: int | None = None) -> bool:
    """Whether so many of our cores are kept busy by others that times are spoiled."""
    return load is not None and load > _SHARE * (cores or available_cores())


def _ours() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _ticks() -> dict[int, tuple[int, int]] | None:
    """Of each of our cores, the ticks it worked and all ticks since it started."""
    try:
        lines = [line.split() for line in _STAT.read_text(encoding="ascii").splitlines()]
        ticks = {
            int(name.removeprefix("cpu")): list(map(int, fields[: _STEAL + 1]))
            for name, *fields in filter(None, lines)
            if name.startswith("cpu") and name != "cpu"
        }
        return {
            core: (sum(ticks[core]) - ticks[core][_IDLE] - ticks[core][_IOWAIT], sum(ticks[core]))
            for core in _ours()
        }
    except (OSError, ValueError, KeyError, IndexError):
        return None

"""Timing sessions beside each other, and what it was timed on."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
from contenders import Contender, Feeds
from memory import run_watched

FEWEST_ROUNDS = 7

PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""Runs a command and prints its peak memory in KiB.  A process of its own, because a child's peak
starts at the size of the process that forked it, and a benchmark is a large one."""


def interleave(sessions: Mapping[str, Any], feeds: Feeds, seconds: float) -> dict[str, Any]:
    """Milliseconds per run, {"median", "min"} by name, runs alternating for `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(None, feeds)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < FEWEST_ROUNDS:
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feeds)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {n: {"median": statistics.median(t), "min": min(t)} for n, t in times.items()}


def measure_speed(
    contenders: Mapping[str, Contender], inputs: Mapping[str, Feeds], seconds: float
) -> list[dict[str, Any]]:
    """Times every contender on every input with one and two threads; ratios are to the first."""
    rows = []
    for threads in (1, 2):
        sessions = {name: contender.open(threads) for name, contender in contenders.items()}
        for shape, feeds in inputs.items():
            times = interleave(sessions, feeds, seconds)
            rows.append({"threads": threads, "shape": shape, "ms": times})
            base = next(iter(times.values()))
            print(f"\n{shape}, {threads} thread{'s' * (threads > 1)}")
            for name, t in times.items():
                ratio = f"{base['median'] / t['median']:.2f} ({base['min'] / t['min']:.2f})"
                print(f"  {name:44}{t['median']:9.2f} ms  min {t['min']:8.2f}   x {ratio}")
    return rows


def measure_opening(contenders: Mapping[str, Contender], rounds: int = 7) -> dict[str, float]:
    """Median milliseconds to create a session."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender.open(1)
            times[name].append(1e3 * (time.perf_counter() - start))
    print("\nsession creation, median ms:")
    for name, values in times.items():
        print(f"  {name:44}{statistics.median(values):9.1f}")
    return {name: statistics.median(values) for name, values in times.items()}


def measure_compile(model: Path, folder: Path, calibration: Path | None = None) -> dict[str, Any]:
    """Wall seconds and peak memory of `qcompile`, with an empty and with a filled kernel cache."""
    result = {}
    options = [] if calibration is None else ["--calib", calibration]
    environment = os.environ | {"QCOMPILER_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "qcompiler.cli", model, "--target", "x86-int8", "-q", *options]
    print()
    for name in ("cold", "warm"):
        seconds, peak = run_watched([*command, "-o", folder / name], environment)
        entry = {"seconds": seconds, "peak_mib": peak}
        result[name] = entry
        print(f"compile, {name} cache: {entry['seconds']:.1f} s, peak {entry['peak_mib']:.0f} MiB")
    return result


def environment() -> dict[str, Any]:
    """The machine and the versions, for a file of results."""
    return {
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count()},
        "versions": {
            "qcompiler": "0.1.0",
            "onnxruntime": ort.__version__,
            "python": platform.python_version(),
        },
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()

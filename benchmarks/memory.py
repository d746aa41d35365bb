"""What a command and the processes it starts take of memory, all together (Linux)."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["run_watched"]

_INTERVAL = 0.05


def run_watched(command: Sequence[object], environment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds that `command` took, and the most MiB it and its descendants held at one time.

    Pages that several share are counted once (PSS), looked at twenty times a second.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    start, peak = time.perf_counter(), 0
    arguments = list(map(str, command))
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(_pss, _family(process.pid))))
            time.sleep(_INTERVAL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return time.perf_counter() - start, peak / 1024


def _family(pid: int) -> list[int]:
    """A process and all that came of it."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for listed in threads for child in _read(listed).split()]
    return [pid, *(one for child in children for one in _family(child))]


def _pss(pid: int) -> int:
    """KiB."""
    lines = _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _read(path: Path) -> str:
    """A file of a process that may be gone."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""

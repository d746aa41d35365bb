"""Tasks that run in a process apart, so that what one breaks is lost to no other.

A kernel that touches what it must not ends its process's use of the GPU.  So the tasks of a part
run in a child, which writes a line for each as soon as it is done; where it ends early, or may not
use the GPU any more, another goes on with the next task.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = [
    "CudaError", "Found", "Task", "be_child", "breaks_the_gpu", "run_apart", "run_here",
]  # fmt: skip


class CudaError(Exception):
    """The driver refused something; the message says what."""


Task = tuple[str, Callable[[], list[dict[str, Any]]]]
"""What reports call it, and what gives its rows."""
Found = dict[str, Any]
"""{"task": name, "rows": [...]}, or with "problem" instead of rows."""


def breaks_the_gpu(error: Exception) -> bool:
    """Whether all that this process asks of the GPU from now on may fail, too."""
    return isinstance(error, CudaError) or "CUDA error" in str(error)


_BROKEN = 3
"""Exit status of a child that reported a problem after which nothing on the GPU can be trusted."""


def run_here(tasks: Sequence[Task], tell: Callable[[Found], None]) -> bool:
    """Run tasks one after the other; whether all of them ran.

    An error of the driver is the last thing that happens: those that follow would fail too.
    """
    for name, run in tasks:
        try:
            tell({"task": name, "rows": run()})
        except Exception as error:  # whatever it is, the others are to run
            kind = "" if isinstance(error, CudaError) else f"{type(error).__name__}: "
            tell({"task": name, "problem": f"{kind}{error}"[:400]})
            if breaks_the_gpu(error):
                return False
    return True


def be_child(tasks: Sequence[Task], first: int) -> None:
    """Run the tasks from `first` on, for a parent that reads this process's output."""
    done = run_here(tasks[first:], lambda found: print(json.dumps(found), flush=True))
    sys.stdout.flush()
    sys.exit(0 if done else _BROKEN)


def run_apart(
    command: Sequence[str], names: Sequence[str], end: float, tell: Callable[[Found], None]
) -> None:
    """Run tasks in children; `tell` hears of each, as it is done or is not.

    Args:
        command: Starts a child that calls `be_child`; the number of the first task is added.
        names: All tasks, in order.
        end: When to stop, by `time.monotonic()`.
        tell: Told of every task once.
    """
    first = 0
    while first < len(names) and time.monotonic() < end:
        told, status = _one_child([*command, str(first)], end, tell)
        first += told
        if status in (0, _BROKEN) or first >= len(names):
            if status == 0 and told == 0:
                break
            continue
        late = time.monotonic() >= end
        why = "stopped: the time was up" if late else f"its process ended with status {status}"
        tell({"task": names[first], "problem": why})
        first += 1
    for name in names[first:]:
        tell({"task": name, "problem": "not run: the time was up"})


def _one_child(
    command: Sequence[str], end: float, tell: Callable[[Found], None]
) -> tuple[int, int]:
    """How many tasks one child told of, and its exit status."""
    told = 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        # With what it started: a checker of memory would go on for minutes.
        clock = threading.Timer(max(0.0, end - time.monotonic()), _kill_all_of, [child])
        clock.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                tell(json.loads(line))
                told += 1
        finally:
            clock.cancel()
    return told, child.returncode


def _kill_all_of(child: subprocess.Popen[str]) -> None:
    """Kills a child and what it started, unless it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)

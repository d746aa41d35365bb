"""compute-sanitizer on the small checks of `cuda.py`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["NO_SANITIZER", "TOOLS", "CheckerError", "check_with", "is_bad"]

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
NO_SANITIZER = "not installed"
TOO_LONG = "stopped after"


class CheckerError(Exception):
    """A checker found something, or does not run though it is installed."""


def check_with(tool: str, command: Sequence[str], patience: float) -> list[dict[str, Any]]:
    """What one of compute-sanitizer's tools says of a command, in so many seconds.

    Raises:
        CheckerError: Something bad.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    said = NO_SANITIZER if program is None else _said([program, "--tool", tool, *command], patience)
    print(f"  {tool}: {said}", file=sys.stderr)
    if is_bad(said):
        raise CheckerError(said)
    return [{"tool": tool, "said": said}]


def _said(command: Sequence[str], patience: float) -> str:
    """The summary of one tool, or why there is none."""
    try:
        done = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
        )
    except OSError as error:
        return f"cannot be run: {error}"
    try:
        text, _ = done.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        # With what it watches: that would go on, on the GPU on which others are to be timed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(done.pid, signal.SIGKILL)
        done.communicate()
        return f"{TOO_LONG} {patience:.1f} s"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    if summary:
        return summary[-1]
    last = [line for line in text.splitlines() if line.startswith("=========")][-1:]
    return f"no summary, exit status {done.returncode} {' '.join(last)}".rstrip()


def is_bad(said: str) -> bool:
    """Whether a checker found something, or did not run though it is installed.

    One that was stopped found nothing so far; that is in the file, and no reason to fail.
    """
    if said == NO_SANITIZER or said.startswith(TOO_LONG):
        return False
    return not re.search(r"SUMMARY: 0 (errors|hazards)", said)

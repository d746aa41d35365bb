"""compute-sanitizer on the small checks of `cuda.py`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["NO_SANITIZER", "PATIENCE", "is_bad", "sanitize"]

NO_SANITIZER = "not installed"
TOO_LONG = "stopped after"
PATIENCE = 180
"""Seconds for each tool: the machine is lent for minutes."""


def sanitize(script: Path, arguments: Sequence[str]) -> dict[str, str]:
    """What each of compute-sanitizer's tools says of the small checks of a script."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    if program is None:
        return {"compute-sanitizer": NO_SANITIZER}
    found = {}
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = [program, "--tool", tool, sys.executable, str(script), "--small", *arguments]
        found[tool] = _said(command)
        print(f"  {tool}: {found[tool]}", file=sys.stderr)
    return found


def _said(command: Sequence[str]) -> str:
    """The summary of one tool, or why there is none."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return f"{TOO_LONG} {PATIENCE} s"
    except OSError as error:
        return f"cannot be run: {error}"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout + done.stderr)
    return summary[-1] if summary else f"no summary, exit status {done.returncode}"


def is_bad(said: str) -> bool:
    """Whether a checker found something, or did not run though it is installed.

    One that was stopped found nothing so far; that is in the file, and no reason to fail.
    """
    if said == NO_SANITIZER or said.startswith(TOO_LONG):
        return False
    return not re.search(r"SUMMARY: 0 (errors|hazards)", said)

"""compute-sanitizer on the small checks of `cuda.py`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["NO_SANITIZER", "PATIENCE", "TOOLS", "CheckerError", "check_with", "is_bad"]

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
NO_SANITIZER = "not installed"
TOO_LONG = "stopped after"
PATIENCE = 120
"""Seconds for each tool: the machine is lent for minutes."""


class CheckerError(Exception):
    """A checker found something, or does not run though it is installed."""


def check_with(tool: str, command: Sequence[str]) -> list[dict[str, Any]]:
    """What one of compute-sanitizer's tools says of a command.

    Raises:
        CheckerError: Something bad.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    said = NO_SANITIZER if program is None else _said([program, "--tool", tool, *command])
    print(f"  {tool}: {said}", file=sys.stderr)
    if is_bad(said):
        raise CheckerError(said)
    return [{"tool": tool, "said": said}]


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
    text = done.stdout + done.stderr
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

"""The command line: `qcompile MODEL --target T`, and verbs beside it."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` itself takes as long to import as all else here
    from types import FrameType
    from typing import NoReturn

__all__ = ["leave_at_once", "main", "missing_package"]


def main() -> NoReturn:
    """The console script `qcompile`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # An exception would end in a traceback, or nowhere where an import calls back.
        signal.signal(signal.SIGINT, leave_at_once)
    try:
        from qcompiler.cli.app import run
    except ModuleNotFoundError as error:
        if (hint := missing_package(error)) is None:
            raise
        sys.exit(f"error: {hint}")
    run()


def leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Handle Ctrl-C where nothing is begun that would have to be undone."""
    os.write(2, b"error: interrupted\n")
    os._exit(128 + number)


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to install, unless the module that was not found is one of ours."""
    package = (error.name or "qcompiler").partition(".")[0]
    if package == "qcompiler":
        return None
    return (
        f"the Python package {package!r} is not installed; running a bundle does not need it, "
        "all else does: pip install 'qcompiler[cpu,zig]'"
    )

"""The command line: `qcompile MODEL --target T`, and verbs beside it."""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """The console script `qcompile`."""
    try:
        # Imported here, so that an interrupt at any time ends without a traceback.
        from qcompiler.cli.app import run
    except KeyboardInterrupt:
        sys.exit(130)
    run()

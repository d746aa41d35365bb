"""The command line: `qcompile MODEL --target T`, and verbs beside it."""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["main", "missing_package"]


def main() -> NoReturn:
    """The console script `qcompile`."""
    try:
        # Imported here, so that an interrupt at any time ends without a traceback.
        from qcompiler.cli.app import run
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (hint := missing_package(error)) is None:
            raise
        sys.exit(f"error: {hint}")
    run()


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to install, unless the module that was not found is one of ours."""
    package = (error.name or "qcompiler").partition(".")[0]
    if package == "qcompiler":
        return None
    return (
        f"the Python package {package!r} is not installed; running a bundle does not need it, "
        "all else does: pip install 'qcompiler[cpu,zig]'"
    )

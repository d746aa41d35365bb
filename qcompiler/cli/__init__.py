"""The command line: `qcompile MODEL --target T`, and verbs beside it."""

from __future__ import annotations

from qcompiler.cli.app import main

__all__ = ["main"]

"""The terminal: results on stdout, everything about getting there on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompiler.ir.errors import QCompilerError

__all__ = ["ProgressCallback", "Terminal", "facts", "figure_table", "size", "span"]

ProgressCallback = Callable[[str, float, int], None]

_WIDTH_OF_A_FILE = 100
"""Columns where stdout is no terminal and $COLUMNS says nothing."""

_BAR_AFTER = 1.0
"""Seconds: what is over sooner needs no bar."""

EXIT_USER, EXIT_INTERNAL, EXIT_INTERRUPTED = 1, 70, 130
"""70 is EX_SOFTWARE of sysexits.h; 130 is 128 + SIGINT."""


class Terminal:
    """What a command prints to.

    Attributes:
        out: Results.
        err: Progress, warnings and errors.
        verbose: Tracebacks and further tables are wanted.
    """

    def __init__(self) -> None:
        self.out = _console()
        self.err = _console(stderr=True)
        self.verbose = False

    def json(self, value: object) -> None:
        """One JSON object, and nothing else, on stdout."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self.out.print(text, soft_wrap=True)

    def error(self, message: str) -> None:
        """A line on stderr."""
        self.err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)

    def warning(self, message: str) -> None:
        """A line on stderr."""
        self.err.print(Text.assemble(("warning: ", "bold yellow"), message), soft_wrap=True)

    def next(self, *commands: str) -> None:
        """What the user may want to run now."""
        for index, command in enumerate(commands):
            label = "Next  " if index == 0 else "      "
            self.out.print(Text.assemble((label, "dim"), (command, "cyan")), soft_wrap=True)

    def failure(self, error: Exception) -> int:
        """Explain why a command ended, and give its exit code."""
        if self.verbose:
            lines = "".join(traceback.format_exception(error)).rstrip()
            self.err.print(Text(lines, style="dim"), soft_wrap=True)
        if isinstance(error, QCompilerError):
            self.error(str(error))
        elif isinstance(error, OSError) and error.strerror:
            # A full disk, no permission: the machine's matter, not a bug of ours.
            where = f"{error.filename}: " if error.filename else ""
            self.error(f"{where}{error.strerror}")
        elif isinstance(error, MemoryError):
            self.error(f"out of memory ({error})" if str(error) else "out of memory")
        else:
            label = Text("internal error: ", "bold red")
            self.err.print(label + Text(f"{type(error).__name__}: {error}"), soft_wrap=True)
            hint = "please report it" if self.verbose else (
                "run again with -v for the traceback; please report it")  # fmt: skip
            self.err.print(hint, style="dim")
            return EXIT_INTERNAL
        return EXIT_USER

    @contextlib.contextmanager
    def one_line_warnings(self) -> Iterator[None]:
        """Show Python's warnings as our own, without the source line they come from."""

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            self.warning(" ".join(str(message).split()))

        with warnings.catch_warnings():
            warnings.showwarning = show
            yield

    @contextlib.contextmanager
    def progress(self, shown: bool = True) -> Iterator[ProgressCallback]:
        """A bar where stderr is a terminal, else a line per stage; nothing unless `shown`."""
        if not shown:
            yield lambda label, done, total: None
        elif self.err.is_terminal:
            with _bar(self.err) as update:
                yield update
        else:
            yield _lines(self.err)


def facts(*rows: tuple[str, str | Text]) -> Table:
    """Names and values, aligned."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def figure_table(*columns: str) -> Table:
    """A table without lines; columns whose title starts with ">" are aligned right."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for title in columns:
        numeric = title.startswith(">")
        table.add_column(
            title.removeprefix(">"),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="fold",
        )
    return table


def size(count: float) -> str:
    """Bytes, in powers of a thousand: "91.0 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def span(seconds: float) -> str:
    """A time with three digits: "16.9 ms"."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            value = seconds * factor
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    raise AssertionError


def _console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_A_FILE
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[ProgressCallback]:
    import threading

    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining
    from rich.table import Column

    label_column = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}", table_column=label_column),
        BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("left", style="dim"), Remaining(),
        console=console, transient=True, expand=True,
    )  # fmt: skip
    task = progress.add_task("starting", total=None)
    timer = threading.Timer(_BAR_AFTER, progress.start)
    timer.daemon = True
    timer.start()

    def update(label: str, done: float, total: int) -> None:
        progress.update(task, description=label, completed=done, total=total)

    try:
        yield update
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


def _lines(console: Console) -> ProgressCallback:
    start, seen = time.perf_counter(), set[Any]()

    def update(label: str, done: float, total: int) -> None:
        stage = label.split(":")[0]
        if stage not in seen:
            seen.add(stage)
            console.print(f"{time.perf_counter() - start:6.1f} s  {stage}", soft_wrap=True)

    return update

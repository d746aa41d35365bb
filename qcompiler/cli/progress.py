"""How far a command is: a bar where someone watches, else a line per stage."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

__all__ = ["ProgressCallback", "progress_bar", "progress_lines"]

ProgressCallback = Callable[[str, float, int], None]

_BAR_AFTER = 1.0
"""Seconds: what is over sooner needs no bar."""


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[ProgressCallback]:
    """A bar that comes after a while and leaves nothing behind."""
    label_column = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}", table_column=label_column),
        BarColumn(bar_width=24), TimeElapsedColumn(), _Left(),
        console=console, transient=True, expand=True,
    )  # fmt: skip
    task = progress.add_task("starting", total=None, told=time.monotonic())
    timer = threading.Timer(_BAR_AFTER, progress.start)
    timer.daemon = True
    timer.start()

    def update(label: str, done: float, total: int) -> None:
        before = progress.tasks[task]
        told = before.fields["told"] if done == before.completed else time.monotonic()
        progress.update(task, description=label, completed=done, total=total, told=told)

    try:
        yield update
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


def progress_lines(console: Console) -> ProgressCallback:
    """A line for each stage that begins."""
    start, seen = time.perf_counter(), set[Any]()

    def update(label: str, done: float, total: int) -> None:
        stage = label.split(":")[0]
        if stage not in seen:
            seen.add(stage)
            console.print(f"{time.perf_counter() - start:6.1f} s  {stage}", soft_wrap=True)

    return update


class _Left(ProgressColumn):
    """Time left as predicted at the last progress; nothing once that has turned out wrong."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """As "left 0:00:12"."""
        predicted = task.time_remaining
        if predicted is None:
            return Text()
        left = predicted - (time.monotonic() - task.fields["told"])
        if left <= 0:
            return Text()
        minutes, seconds = divmod(round(left), 60)
        return Text(f"left {minutes // 60}:{minutes % 60:02}:{seconds:02}", style="cyan")

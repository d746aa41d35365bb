"""How far a command is: a bar where someone watches, else a line per stage."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

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

_LINE_AFTER = 10.0
"""Seconds without a line, after which the next says how far a stage is."""


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
    """A line for each stage that begins, and for one that takes long one now and then."""
    start = told = began = time.perf_counter()
    seen, current = set[str](), ""

    def update(label: str, done: float, total: int) -> None:
        nonlocal told, began, current
        stage, now = label.split(":")[0], time.perf_counter()
        if stage != current:
            current, began = stage, now
        if stage not in seen or (label != stage and now - told >= _LINE_AFTER):
            text = label if stage in seen else stage
            seen.add(stage)
            told = now
            share = done % 1  # of the stage
            if text != stage and share and not text.endswith("left"):
                text += f", {_duration((now - began) * (1 - share) / share)} left"
            console.print(f"{now - start:6.1f} s  {text}", soft_wrap=True, highlight=False)

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
        return Text(f"left {_duration(left)}", style="cyan")


def _duration(left: float) -> str:
    minutes, seconds = divmod(round(left), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"

"""Who is told how far a compilation is, and how long its phases took."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Clock", "Progress"]

Progress = Callable[[str, float, int], None]
"""Called with (what is being done, phases done, phases in all); fractions are within a phase."""


class Clock:
    """Times the phases of one compilation and passes them on.

    Attributes:
        seconds: Wall time of each finished phase, in order.
        total: Phases in all, as far as is known.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress or (lambda label, done, total: None)
        self.seconds: dict[str, float] = {}
        self.total = 1
        self._label, self._since, self._done = "", 0.0, -1

    def start(self, label: str) -> None:
        """End the current phase and begin the next."""
        self.stop()
        self._label, self._since, self._done = label, time.perf_counter(), self._done + 1
        self.detail("")

    def detail(self, text: str, fraction: float = 0.0) -> None:
        """Say what the current phase is at, and how much of it is done."""
        label = f"{self._label}: {text}" if text else self._label
        self._progress(label, self._done + fraction, max(self.total, self._done + 1))

    def count_samples(self, done: int, total: int) -> None:
        """Say how many samples the current phase has run."""
        self.detail(f"sample {done} of {total}", done / total)

    def stop(self) -> None:
        """End the current phase."""
        if self._label:
            # A phase that comes again, with other choices, adds to its time.
            before = self.seconds.get(self._label, 0.0)
            self.seconds[self._label] = before + time.perf_counter() - self._since
            self._label = ""

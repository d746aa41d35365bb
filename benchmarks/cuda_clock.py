"""How long something takes on a GPU whose clocks have settled; ours and peers', for `cuda.py`.

An idle H200 runs at 345 MHz, and it takes milliseconds of work until it runs at 1980: sixteen
products of 2 us are over before that, and while the host packs weights the GPU has nothing to do.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

__all__ = ["settled"]

_WARM, _MEASURED = 0.1, 0.1
"""Seconds of work before a measurement, and of it."""
_LEAST, _MOST = 7, 1000


def settled(replay: Callable[[], float]) -> float:
    """The median of what `replay` gives, in seconds, once the GPU has worked for a while."""
    spent = 0.0
    for _ in range(_MOST):
        spent += replay()
        if spent >= _WARM:
            break
    times: list[float] = []
    while len(times) < _LEAST or (sum(times) < _MEASURED and len(times) < _MOST):
        times.append(replay())
    return statistics.median(times)

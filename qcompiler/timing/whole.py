"""Time a whole bundle against its model: the last word on whether it is faster.

Sites are timed alone; how ORT lays out, fuses and threads what lies between them shows only here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompiler.bench import bench
from qcompiler.bundle import MANIFEST, sha256_of
from qcompiler.cores import are_busy, busy_cores
from qcompiler.installed import import_onnxruntime
from qcompiler.samples import Samples
from qcompiler.targets.cache import KernelCache, content_key
from qcompiler.timing.judge import thread_counts
from qcompiler.timing.measure import processor

__all__ = ["WholeTime", "time_whole"]

_SECONDS = 0.4
"""To measure for, per number of threads."""
_ATTEMPTS = 3
"""Neighbours may spoil a measurement; only a bundle that is slower each time is."""
_CLEARLY = 0.85
"""Below this nobody's neighbours are to blame."""


@dataclasses.dataclass(frozen=True)
class WholeTime:
    """The model and the bundle with one number of threads; milliseconds, medians.

    Attributes:
        threads: Threads inside an op.
        model: The model as it came.
        bundle: The bundle.
        speedup: Of medians or of fastest runs, whichever is higher.
        busy: Whether others kept the cores busy meanwhile, so that times may be wrong.
    """

    threads: int
    model: float
    bundle: float
    speedup: float
    busy: bool = False


def time_whole(
    bundle: Path,
    model: Path,
    shapes: Mapping[str, tuple[int, ...]] | None,
    data: Samples | None,
) -> list[WholeTime]:
    """One `WholeTime` per number of threads, up to the first with which the bundle is slower.

    Found again for files and inputs that are the same, unless others kept the cores busy.

    Raises:
        OptionError: Shapes that do not fit.
        ModelError: The model fails on the inputs.
    """
    cache, key = KernelCache(), _key(bundle, model, shapes, data)
    if (content := cache.get(key)) is not None:
        return [WholeTime(**entry) for entry in json.loads(content)]
    busy = are_busy(busy_cores())
    times = _measure(bundle, model, shapes, data)
    if busy:
        return [dataclasses.replace(time, busy=True) for time in times]
    cache.keep(key, [dataclasses.asdict(time) for time in times])
    return times


def _measure(bundle: Path, model: Path, shapes: Any, data: Any) -> list[WholeTime]:
    times: list[WholeTime] = []
    for threads in thread_counts():
        times.append(_best(bundle, model, threads, shapes, data))
        if times[-1].speedup < 1:
            break
    return times


def _best(bundle: Path, model: Path, threads: int, shapes: Any, data: Any) -> WholeTime:
    """The best of several attempts, if the first does not say it clearly."""
    found: list[WholeTime] = []
    while not found or (_CLEARLY < found[-1].speedup < 1 and len(found) < _ATTEMPTS):
        (result,) = bench(
            bundle, model, threads=[threads], shapes=shapes, data=data, seconds=_SECONDS
        ).results
        model_ms, bundle_ms = result.model.median * 1e3, result.bundle.median * 1e3
        speedup = max(result.speedup, result.speedup_of_minima)
        found.append(WholeTime(threads, round(model_ms, 4), round(bundle_ms, 4), round(speedup, 3)))
    return max(found, key=lambda time: time.speedup)


def _key(bundle: Path, model: Path, shapes: Any, data: Any) -> str:
    files = [file for file in sorted(bundle.iterdir()) if file.name != MANIFEST]
    hashes = [sha256_of(file) for file in [*files, model]]
    if data is not None:
        hashes.append(data.digest)
    version = import_onnxruntime().__version__
    threads = repr(thread_counts())
    return content_key("whole", *hashes, repr(shapes), processor(), version, threads)

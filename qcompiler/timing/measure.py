"""Time sites on this machine: every candidate as a model of its own, and keep what was found.

Candidates take turns in short blocks, so that drift and neighbours meet them alike; the fastest run
counts, because whatever disturbs a run makes it longer.  What is found while others keep the cores
busy is used, and not kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qcompiler.cores import are_busy, busy_cores
from qcompiler.installed import import_onnxruntime
from qcompiler.ir.sites import Candidate, Costs, Site
from qcompiler.session_options import new_session_options
from qcompiler.targets.cache import KernelCache, content_key
from qcompiler.targets.library import build_library
from qcompiler.timing import site_models
from qcompiler.timing.site_models import regions_of, site_feed, site_model

__all__ = ["Stopwatch", "can_time", "machine", "processor"]

_BLOCK_SECONDS = 0.002
"""Of runs in a row of one candidate; a single run may take longer."""
_TURNS = (math.inf, 1.0, 1.0, 0.3, 0.3)
"""Turns of each candidate, each taken only if no more seconds than that were spent before."""
_PAUSE = 0.001
"""Seconds in which ORT's idle threads, which spin for a while, fall asleep."""
_MOST_BYTES = 1 << 27
"""Above this a tensor is not made up: its candidates take eight times as much memory."""

Tell = Callable[[str, float], None]


def machine() -> str:
    """This one, as targets name them: "linux-x86_64"."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


def can_time(site: Site) -> bool:
    """Whether a site can be timed at all."""
    sizes = [site.weight, *site.inputs, *map(site.result, site.inputs)]
    return bool(site.inputs) and 4 * max(map(math.prod, sizes)) <= _MOST_BYTES


class Stopwatch:
    """Times sites, and finds again what was timed before.

    Args:
        cache: Where times are kept: by site, candidate, threads, processor, ORT and kernels.
        fingerprint: Hash of the target's kernels.
        threads: Numbers of threads to time with.
    """

    def __init__(self, cache: KernelCache, fingerprint: str, threads: Sequence[int]) -> None:
        self.cache, self.fingerprint, self.threads = cache, fingerprint, tuple(threads)

    def time(self, sites: Sequence[Site], tell: Tell) -> list[Costs | None]:
        """The costs of `sites`, in order; None where ORT cannot run one by itself.

        Args:
            sites: What to time; equal ones are timed once.
            tell: Hears which one is at hand, and the share done.

        Raises:
            ToolchainError: Their kernels cannot be built.
        """
        found: dict[Site, Costs] = {}
        for site in sites:
            if (content := self.cache.get(self._key(site))) is not None:
                found[site] = Costs.from_dict(json.loads(content))
        missing = [site for site in dict.fromkeys(sites) if site not in found]
        if missing:
            with self._library(missing, tell) as (domain, library):
                busy = are_busy(busy_cores())
                if busy:
                    tell("others keep the cores busy: what is timed now may be wrong", 0.0)
                for index, site in enumerate(missing):
                    tell(f"time {site.name}", index / len(missing))
                    try:
                        costs = self._measure(site, domain, library)
                    except Exception:
                        # ORT raises bare RuntimeErrors as well as its own types.
                        continue
                    found[site] = dataclasses.replace(costs, busy=busy)
                    if not busy:
                        self.cache.keep(self._key(site), found[site].to_dict())
        return [found.get(site) for site in sites]

    def _key(self, site: Site) -> str:
        version = import_onnxruntime().__version__
        kernels = self.fingerprint if site.kernel else ""
        parts = (repr(site), repr(self.threads), processor(), version, kernels)
        return content_key("times", *_how(), *parts)

    @contextlib.contextmanager
    def _library(self, sites: Sequence[Site], tell: Tell) -> Iterator[tuple[str, Path | None]]:
        """One library with the kernels of all sites, while they are timed."""
        regions = sorted(
            {region for site in sites if site.kernel for region in regions_of(site)},
            key=lambda region: region.name,
        )
        domain = f"qcompiler.{content_key(self.fingerprint, repr(regions))[:8]}"
        with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
            path = Path(folder) / f"{domain}.so"
            if regions:
                build_library(
                    regions, domain, path, cache=self.cache, progress=lambda line: tell(line, 0.0)
                )
            yield domain, path if regions else None

    def _measure(self, site: Site, domain: str, library: Path | None) -> Costs:
        points = tuple((threads, shape) for threads in self.threads for shape in site.inputs)
        times: dict[Candidate, list[float]] = {candidate: [] for candidate in site.candidates}
        models = {c: site_model(site, c, domain) for c in site.candidates}
        for threads in self.threads:
            sessions = {
                c: _session(models[c], threads, library if c == "kernel" else None)
                for c in site.candidates
            }
            for shape in site.inputs:
                fastest = _fastest(site, sessions, shape)
                for candidate, seconds in fastest.items():
                    times[candidate].append(round(seconds * 1e6, 2))
        return Costs("timed", points, {c: tuple(values) for c, values in times.items()})


@functools.cache
def _how() -> tuple[bytes, ...]:
    """The sources that say what is timed, and how."""
    return tuple(Path(source).read_bytes() for source in (__file__, site_models.__file__))


def processor() -> str:
    """What tells this processor from others, and what kernels may use of it."""
    return _cpu() + os.environ.get("QCOMPILER_ISA", "")


@functools.cache
def _cpu() -> str:
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    pairs = (line.partition(":") for line in lines)
    found = {(k.strip(), v.strip()) for k, _, v in pairs if k.strip() in names}
    return repr(sorted(found))


def _session(model: bytes, threads: int, library: Path | None) -> Any:
    ort = import_onnxruntime()
    options = new_session_options(quiet=True)
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _fastest(
    site: Site, sessions: dict[Candidate, Any], shape: tuple[int, ...]
) -> dict[Candidate, float]:
    """Seconds of each candidate's fastest run."""
    feeds = {candidate: site_feed(site, candidate, shape) for candidate in sessions}
    best = dict.fromkeys(sessions, float("inf"))
    start = time.perf_counter()
    for most in _TURNS:
        if time.perf_counter() - start > most:
            break
        for candidate, session in sessions.items():
            time.sleep(_PAUSE)
            block = _block(session, feeds[candidate])
            best[candidate] = min(best[candidate], block)
    return best


def _block(session: Any, feed: dict[str, Any]) -> float:
    """The fastest of runs in a row."""
    runs: list[float] = []
    end = time.perf_counter() + _BLOCK_SECONDS
    while (start := time.perf_counter()) < end or not runs:
        session.run(None, feed)
        runs.append(time.perf_counter() - start)
    return min(runs)

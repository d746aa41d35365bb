"""What the passes of one compilation are told about speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from qcompiler.cores import available_cores
from qcompiler.ir.errors import QCompilerError
from qcompiler.ir.sites import Candidate, Costs, Site
from qcompiler.random_inputs import Feed, random_feed
from qcompiler.samples import Samples, check_sample
from qcompiler.targets import catalog
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.target import Target
from qcompiler.timing.cost_model import MODELLED, estimate, model_error
from qcompiler.timing.measure import Stopwatch, can_time, machine
from qcompiler.timing.observed_shapes import model_inputs, observed_shapes
from qcompiler.vocabularies import vocabularies

__all__ = ["Judge", "runs_here", "thread_counts"]


def runs_here(target: Target) -> bool:
    """Whether what is made for `target` can be timed on this machine."""
    return target.machine == machine() and target.provider == "CPUExecutionProvider"


def thread_counts() -> tuple[int, ...]:
    """Numbers of threads to time with: one, and all cores."""
    return tuple(dict.fromkeys((1, available_cores())))


class Judge:
    """Knows what sites cost and how large tensors are.

    Args:
        target: What is compiled for.
        timing: Time sites, as this machine runs the target; else the cost model answers.
        shapes: Shapes of the model's inputs that matter.
        samples: Calibration samples; the first one tells sizes if `shapes` do not.
        tell: Hears what is being timed, and the share done.
    """

    def __init__(
        self,
        target: Target,
        *,
        timing: bool,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        samples: Samples | None = None,
        tell: Callable[[str, float], None] = lambda text, share: None,
    ) -> None:
        self.target, self.given, self.samples, self._tell = target, shapes, samples, tell
        self.used_samples = False
        self._known: dict[Site, Costs | None] = {}
        self._watch = (
            Stopwatch(KernelCache(), catalog.fingerprint(target), thread_counts())
            if timing
            else None
        )

    def costs(self, sites: Sequence[Site]) -> list[Costs | None]:
        """The costs of `sites`, in order; None where nothing is known."""
        new = [site for site in dict.fromkeys(sites) if site not in self._known]
        if self._watch is not None:
            able = [site for site in new if can_time(site)]
            timed = zip(able, self._watch.time(able, self._tell), strict=True)
            self._known.update((site, costs) for site, costs in timed if costs is not None)
        for site in new:
            self._known.setdefault(site, self._estimated(site))
        return [self._known[site] for site in sites]

    def shapes(self, model: ir.Model, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of the named tensors for the inputs that matter; empty where those are not known.

        Raises:
            OptionError: Shapes were given that do not fit.
            ModelError: The model fails on inputs of the shapes given.
            CalibrationError: The first sample cannot be read or does not fit.
        """
        if self.given is not None:
            feed, _ = random_feed(model_inputs(model), self.given, vocabularies(model))
            return observed_shapes(model, names, feed)
        feed = self._sample(model)
        try:
            return observed_shapes(model, names, feed) if feed else {}
        except QCompilerError:
            return {}  # nobody asked for sizes

    def error(self) -> dict[Candidate, float]:
        """By how much the cost model is off at the sites that were timed; empty without any."""
        timed = [(s, c) for s, c in self._known.items() if c is not None and c.source == "timed"]
        return model_error(timed)

    def _estimated(self, site: Site) -> Costs | None:
        known = self.target.arch in MODELLED and bool(site.inputs)
        return estimate(site, thread_counts()) if known else None

    def _sample(self, model: ir.Model) -> Feed:
        if self.samples is None:
            return {}
        name, arrays = next(iter(self.samples))
        feed = check_sample(name, arrays, model_inputs(model))
        self.used_samples = self._watch is not None or self.target.arch in MODELLED
        return feed

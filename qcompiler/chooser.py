"""Choose kernels for one compilation: pass by pass, and by timing the whole at the end.

Sites are weighed in the pass `choose-kernels`.  If the finished bundle is slower than its model all
the same, it is made again with float convolutions, and if that does not help, with nothing
quantized at all.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from qcompiler.ir.decisions import Preference
from qcompiler.ir.errors import OptionError, QCompilerError
from qcompiler.ir.region import Region
from qcompiler.model_runs import ModelRuns
from qcompiler.passes.choose_kernels import ChooseKernels
from qcompiler.pipeline import Pipeline
from qcompiler.random_inputs import random_feed
from qcompiler.recipe import Recipe
from qcompiler.samples import Samples
from qcompiler.targets import catalog
from qcompiler.targets.target import Target
from qcompiler.timing.cost_model import border_cost
from qcompiler.timing.exact_source import exact_source
from qcompiler.timing.judge import Judge, runs_here
from qcompiler.timing.observed_shapes import model_inputs
from qcompiler.timing.record import Record
from qcompiler.timing.whole import WholeTime, time_whole

__all__ = ["Chooser", "Wishes"]


_NOT_TIMED = (
    "the bundle was not timed against its model ({}): give --shapes NAME=1x128,… (shapes=...) or "
    "--calib DIR (calibration=...)"
)
_WRONG_SUMS = (
    "the model is faster than the bundle, {}, because ONNX Runtime's sums of it saturate on this "
    "processor, which has no VNNI: those of the bundle are exact; with exact ones the model takes "
    "{:.3g} ms"
)
_BUSY = (
    "others kept the cores busy while kernels were timed, so that a slower one may have been "
    "chosen: compile again on a quiet machine (these times are not kept), or with --no-timing "
    "(timing=False)"
)


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What a user may say about choosing kernels.

    Attributes:
        timing: Time on this machine, where it runs the target; else the cost model decides.
        shapes: Shapes of the model's inputs that matter.
        choices: A bundle or manifest whose choices are made again.
    """

    timing: bool = True
    shapes: Mapping[str, tuple[int, ...]] | None = None
    choices: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Check that they agree.

        Raises:
            OptionError: Sizes below 1, or shapes beside choices, which were made on their own.
        """
        for name, shape in (self.shapes or {}).items():
            if not isinstance(name, str):
                raise OptionError(f"shapes: {name!r} is no name of an input")
            sizes = shape if isinstance(shape, tuple | list) else (shape, None)
            if not all(type(size) is int and size > 0 for size in sizes):
                raise OptionError(f"shapes: {name}={shape}: sizes are whole numbers from 1")
        if self.shapes is not None and self.choices is not None:
            raise OptionError("give shapes or choices, not both: choices made before need no sizes")


class Chooser:
    """The choices of one compilation, while they are made."""

    def __init__(
        self,
        target: Target,
        wishes: Wishes,
        samples: Samples | None,
        tell: Callable[[str, float], None],
    ) -> None:
        """Take the facts.

        Args:
            target: What is compiled for.
            wishes: What the user said.
            samples: Calibration samples, if there are any.
            tell: Hears what is being timed, and the share done.

        Raises:
            OptionError: Choices to make again that cannot be read, or are another target's.
        """
        self.target, self.wishes, self.samples = target, wishes, samples
        self._times = wishes.timing and runs_here(target)
        self._judge = Judge(
            target, timing=self._times, shapes=wishes.shapes, samples=samples, tell=tell
        )
        self._notes: tuple[str, ...] = ()
        self._made = None if wishes.choices is None else Record.read(wishes.choices, target.name)
        self._forced: dict[str, str] = {}
        lost = None if self._made is None else self._made.lost
        self._lost = None if lost is None else Preference(lost)
        self._whole: tuple[WholeTime, ...] = ()
        self._retreated_while_busy = False
        self._choose = self._make_pass()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about them, in sentences."""
        return (*self._notes, _BUSY) if self.record().busy else self._notes

    @property
    def used_samples(self) -> bool:
        """Whether calibration samples told sizes, now or when the choices were made."""
        return self._made is not None or self._judge.used_samples or bool(self._whole)

    def check(self, model: ir.Model) -> None:
        """Check the shapes that were given.

        Raises:
            OptionError: They do not fit the model's inputs.
        """
        if self.wishes.shapes is not None:
            random_feed(model_inputs(model), self.wishes.shapes)

    def pipeline(self, recipe: Recipe, runs: ModelRuns) -> Pipeline:
        """The passes to run, with what is known so far; see `Pipeline.default`."""
        self._choose = self._make_pass(observed=runs.observe is not None)
        return Pipeline.default(
            self.target, recipe, runs, self._choose, self._unsupported, self._lost
        )

    def record(self) -> Record:
        """What was chosen when the last pipeline ran."""
        if self._made is not None:
            return self._made
        sites, error = tuple(self._choose.choices), self._judge.error()
        costs = [choice.costs for choice in sites if choice.costs is not None]
        busy = any(times.busy for times in costs) or any(time.busy for time in self._whole)
        busy = busy or self._retreated_while_busy
        return Record(sites, self._lost, self._whole, error, busy)

    def is_slower(self, bundle: Path, model: Path) -> bool:
        """Whether `bundle` is to be made again, because it is slower than `model`."""
        if not self.may_retreat:
            return False
        try:
            self._whole = self._time(bundle, model)
        except QCompilerError as error:
            if self.wishes.shapes is not None:
                raise
            self._notes = (_NOT_TIMED.format(str(error).splitlines()[0]),)
            return False
        slower = _first_slower(self._whole)
        if slower is None or self._wins_by_exact_sums(bundle, model, slower):
            return False
        self._retreat(slower)
        return True

    def _time(self, bundle: Path, model: Path) -> tuple[WholeTime, ...]:
        data = None if self.wishes.shapes is not None else self.samples
        return tuple(time_whole(bundle, model, self.wishes.shapes, data))

    def _wins_by_exact_sums(self, bundle: Path, model: Path, slower: WholeTime) -> bool:
        """Whether a model that is faster is so because its sums are wrong; if so, say so."""
        with exact_source(model) as copy:
            times = () if copy is None else self._time(bundle, copy)
        if not times or _first_slower(times) is not None:
            return False
        exact = next(time for time in times if time.threads == slower.threads)
        self._notes = (*self._notes, _WRONG_SUMS.format(_against(slower), exact.model))
        self._whole = times
        return True

    @property
    def may_retreat(self) -> bool:
        """Whether the whole is to be timed: there is something to do if it is slower."""
        if not self._times or self._made is not None or self._lost is not None:
            return False
        integer = any(choice.candidate != "float" for choice in self._choose.choices)
        return integer or bool(catalog.built_isas(self.target))

    def _retreat(self, time: WholeTime) -> None:
        """Quantize less: no convolution, and if there was none, nothing."""
        unfolded = self._choose.unfolded
        integer = any((c.site.startswith("Conv") or c.node in unfolded) and c.candidate != "float"
                      for c in self._choose.choices)  # fmt: skip
        if integer:
            self._forced = {"Conv": f"with int8 convolutions the whole is slower: {_against(time)}"}
        else:
            self._lost = Preference(f"quantized, the whole is slower: {_against(time)}")
            self._forced = {op: self._lost for op in ("Conv", "MatMul")} | self._forced
        self._whole, self._retreated_while_busy = (), self._retreated_while_busy or time.busy

    def _make_pass(self, *, observed: bool = True) -> ChooseKernels:
        made = None if self._made is None else self._made.sites
        return ChooseKernels(
            self._judge.costs,
            border_cost,
            lambda region: catalog.unsupported(self.target, region),
            self._judge.shapes,
            self._forced,
            made,
            observed=observed,
        )

    def _unsupported(self, region: Region) -> str | None:
        # What has no kernel lacks one, whether or not it would be wanted.
        return catalog.unsupported(self.target, region) or self._lost


def _first_slower(times: Iterable[WholeTime]) -> WholeTime | None:
    """The first number of threads with which a bundle is slower than its model."""
    return next((time for time in times if time.speedup < 1), None)


def _against(time: WholeTime) -> str:
    plural = "s" if time.threads > 1 else ""
    return f"{time.bundle:.3g} ms against {time.model:.3g} ms on {time.threads} thread{plural}"

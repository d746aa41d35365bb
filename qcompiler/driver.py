"""A compilation from source to bundle."""

from __future__ import annotations

import dataclasses
import os
import resource
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.bundle import Manifest, check_destination, staged_folder
from qcompiler.calibrate import Samples, observe, sample_tokens
from qcompiler.chooser import Chooser, Wishes
from qcompiler.emit import build_kernels, write_bundle
from qcompiler.frontend import load_model
from qcompiler.ir.decisions import decisions
from qcompiler.ir.errors import OptionError
from qcompiler.ir.types import TensorStats
from qcompiler.pipeline import Pipeline
from qcompiler.progress import Clock, Progress
from qcompiler.recipe import Recipe
from qcompiler.report import Report
from qcompiler.runtime import load
from qcompiler.targets.catalog import get_target
from qcompiler.targets.target import Target

if TYPE_CHECKING:
    import torch

__all__ = ["Progress", "compile"]

_LOAD_CHECK_LIMIT = 1 << 30
"""Above this many bytes, with its model's, a bundle is neither opened once more after writing nor
timed against its model: that would take memory for the whole, not for its largest layer."""


def compile(
    source: str | os.PathLike[str] | ir.Model | torch.export.ExportedProgram,
    target: str,
    output: str | os.PathLike[str] | None = None,
    *,
    recipe: Recipe | None = None,
    calibration: str | os.PathLike[str] | None = None,
    pipeline: Pipeline | None = None,
    strict: bool = False,
    timing: bool = True,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    choices: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compile a model into a bundle.

    Args:
        source: An ONNX file, an `onnx_ir.Model` or a `torch.export` program.
        target: A target name, see `qcompile targets`.
        output: The bundle's folder; by default `<model>.<target>` in the current folder.
        recipe: What to do differently from the target's defaults.
        calibration: Folder of `.npz` samples, for what must be static.
        pipeline: Passes to run instead of the default ones; kernels are then not chosen.
        strict: Raise if a node that could be fast is not.
        timing: Time kernels, and the bundle, on this machine, where it runs the target; else a
            cost model decides where quantizing gains something.
        shapes: Shapes of the model's inputs that matter, for timing.
        choices: A bundle, or its manifest, whose choices are to be made again.
        progress: Told about each step.

    Returns:
        What was done, and where the bundle is.

    Raises:
        QCompilerError: A mistake in the input; each subclass says which.
    """
    clock = Clock(progress)
    goal, recipe = get_target(target), recipe or Recipe()
    destination = check_destination(_destination(source, target, output))
    observer = _Observer(Samples(calibration), clock) if calibration is not None else None
    chooser = None
    if pipeline is not None and (shapes is not None or choices is not None):
        raise OptionError("a pipeline of your own chooses nothing: leave out shapes and choices")
    if pipeline is None:
        wishes = Wishes(timing, shapes, choices)
        chooser = Chooser(goal, wishes, calibration, clock.detail)
    job = _Job(source, goal, recipe, clock, observer, chooser, pipeline)
    model = job.run_passes()
    report = Report(destination, target, tuple(decisions(model)), job.bytes_before)
    if strict:
        _refuse_fallbacks(report)
    with staged_folder(destination) as stage:
        job.write(model, stage)
        while job.is_slower(model, stage):
            model = job.run_passes()
            job.write(model, stage)
        job.write_choices(stage)
        bytes_after, bytes_of_kernels = _size(stage), _size(stage, "*.so")
    clock.stop()
    return dataclasses.replace(
        report,
        decisions=tuple(decisions(model)),
        notes=job.notes(),
        choices=None if chooser is None else chooser.record().to_dict(),
        bytes_after=bytes_after,
        bytes_of_kernels=bytes_of_kernels,
        seconds=clock.seconds,
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


@dataclasses.dataclass
class _Job:
    """One compilation: what it is made from, and the steps that may have to be taken again."""

    source: Any
    target: Target
    recipe: Recipe
    clock: Clock
    observer: _Observer | None
    chooser: Chooser | None
    pipeline: Pipeline | None
    bytes_before: int = 0

    def run_passes(self) -> ir.Model:
        """Load the model, and run the passes on it."""
        pipeline = self.pipeline
        if self.chooser is not None:
            sample = sample_tokens if self.observer is None else self.observer.sample_tokens
            pipeline = self.chooser.pipeline(self.recipe, self.observer, sample)
        assert pipeline is not None
        self.clock.total = len(pipeline.steps) + 4
        self.clock.start("load")
        model = load_model(self.source)
        if not isinstance(self.source, str | os.PathLike | ir.Model):
            self.source = model.clone()  # a torch program, whose export takes long
        self.bytes_before = _source_bytes(self.source, model)
        if self.chooser is not None:
            self.chooser.check(model)
        return pipeline.run(model, lambda step: self.clock.start(step.name))

    def is_large(self, stage: Path) -> bool:
        """Whether a session of the model or of its bundle would take more memory than this."""
        return self.bytes_before + _size(stage) > _LOAD_CHECK_LIMIT

    def write(self, model: ir.Model, stage: Path) -> None:
        """Write a bundle into the folder `stage` in the place of what is there."""
        for file in stage.iterdir():
            file.unlink()
        self.clock.start("kernels")
        library = build_kernels(model, self.target, stage, self.clock)
        self.clock.start("write")
        write_bundle(model, stage, self.target, self.recipe, library)
        if not self.is_large(stage):
            load(stage, providers=["CPUExecutionProvider"], native=self.target.arch == "x86")

    def is_slower(self, model: ir.Model, stage: Path) -> bool:
        """Whether the bundle is to be made again with other choices."""
        if self.chooser is None or self.is_large(stage):
            return False
        if all(decision.action == "float" for decision in decisions(model)):
            return False
        self.clock.start("time the whole")
        if isinstance(self.source, str | os.PathLike):
            return self.chooser.is_slower(stage, Path(self.source))
        with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
            file = Path(folder) / "model.onnx"
            ir.save(load_model(self.source), file, external_data="model.onnx.data")
            return self.chooser.is_slower(stage, file)

    def write_choices(self, stage: Path) -> None:
        """Add to the manifest what was chosen."""
        if self.chooser is not None:
            choices = self.chooser.record().to_dict()
            dataclasses.replace(Manifest.read(stage), choices=choices).write(stage)

    def notes(self) -> tuple[str, ...]:
        """What the user should know, in sentences."""
        notes = () if self.chooser is None else self.chooser.notes
        used = self.chooser is not None and self.chooser.used_samples
        if self.observer is not None and not self.observer.was_asked and not used:
            unused = "the calibration samples were not used: nothing here needs them for"
            notes = (f"{unused} {self.target.name}", *notes)
        return notes


def _size(folder: Path, pattern: str = "*") -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


def _destination(source: object, target: str, output: str | os.PathLike[str] | None) -> Path:
    if output is not None:
        return Path(output)
    if isinstance(source, str | os.PathLike):
        return Path(f"{Path(source).stem}.{target}")
    raise OptionError("give output=...: only a model from a file has a name of its own")


def _source_bytes(source: object, model: ir.Model) -> int:
    """Size of the model as it came: its file, plus tensors that lie outside it."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    if not isinstance(source, str | os.PathLike):
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
    outside = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, ir.ExternalTensor))
    return Path(source).stat().st_size + outside


class _Observer:
    """Runs the model on the samples when a pass asks for it, and knows whether one did."""

    def __init__(self, samples: Samples, clock: Clock) -> None:
        self.samples, self.clock, self.was_asked = samples, clock, False

    def __call__(self, model: ir.Model, names: Sequence[str]) -> Mapping[str, TensorStats]:
        self.was_asked = True
        return observe(model, names, self.samples, self._tell)

    def sample_tokens(
        self, model: ir.Model, names: Sequence[str]
    ) -> Mapping[str, NDArray[np.float32]]:
        self.was_asked = True
        return sample_tokens(model, names, self.samples)

    def _tell(self, done: int, total: int) -> None:
        self.clock.detail(f"sample {done} of {total}", done / total)


def _refuse_fallbacks(report: Report) -> None:
    slow = report.fallbacks()
    if not slow:
        return
    named = "; ".join(f"{d.node} ({d.op}): {d.why}" for d in slow[:5])
    raise OptionError(f"--strict: {len(slow)} nodes fall back: {named}")

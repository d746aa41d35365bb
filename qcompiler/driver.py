"""A compilation from source to bundle."""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.bundle import check_destination, staged_folder
from qcompiler.calibrate import Samples, observe, sample_tokens
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
"""Above this many bytes a bundle is not opened once more after writing: that would take memory for
the whole model, not for its largest layer."""


def compile(
    source: str | os.PathLike[str] | ir.Model | torch.export.ExportedProgram,
    target: str,
    output: str | os.PathLike[str] | None = None,
    *,
    recipe: Recipe | None = None,
    calibration: str | os.PathLike[str] | None = None,
    pipeline: Pipeline | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compile a model into a bundle.

    Args:
        source: An ONNX file, an `onnx_ir.Model` or a `torch.export` program.
        target: A target name, see `qcompile targets`.
        output: The bundle's folder; by default `<model>.<target>` in the current folder.
        recipe: What to do differently from the target's defaults.
        calibration: Folder of `.npz` samples, for what must be static.
        pipeline: Passes to run instead of the default ones.
        strict: Raise if a node that could be fast is not.
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
    pipeline = pipeline or _pipeline(goal, recipe, observer)
    clock.total = len(pipeline.steps) + 3
    clock.start("load")
    model = load_model(source)
    bytes_before = _source_bytes(source, model)
    model = pipeline.run(model, lambda step: clock.start(step.name))
    report = Report(destination, target, tuple(decisions(model)), bytes_before)
    if observer is not None and not observer.was_asked:
        unused = f"the calibration samples were not used: nothing here needs them for {target}"
        report = dataclasses.replace(report, notes=(unused,))
    if strict:
        _refuse_fallbacks(report)
    with staged_folder(destination) as stage:
        clock.start("kernels")
        library = build_kernels(model, goal, stage, clock)
        clock.start("write")
        write_bundle(model, stage, goal, recipe, library)
        bytes_after = sum(file.stat().st_size for file in stage.iterdir())
        if bytes_after <= _LOAD_CHECK_LIMIT:
            load(stage, providers=["CPUExecutionProvider"], native=goal.arch == "x86")
    clock.stop()
    return dataclasses.replace(
        report,
        bytes_after=bytes_after,
        seconds=clock.seconds,
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _pipeline(target: Target, recipe: Recipe, observer: _Observer | None) -> Pipeline:
    if observer is None:
        return Pipeline.default(target, recipe)
    return Pipeline.default(target, recipe, observer, observer.sample_tokens)


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

"""One compilation: what it is made from, and the steps that may have to be taken again."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.bundle import Manifest
from qcompiler.chooser import Chooser, Wishes
from qcompiler.emit import build_kernels, write_bundle
from qcompiler.from_torch import notes_on_state
from qcompiler.frontend import check_opens, is_of_torch, load_model, onnx_file, source_is_blamed
from qcompiler.ir.decisions import decisions
from qcompiler.ir.errors import ModelError, OptionError
from qcompiler.ir.stages import Stage
from qcompiler.model_runs import ModelRuns, SampleRuns
from qcompiler.not_finite import notes_on_infinity
from qcompiler.passes.lower_few_bits import LowerFewBits
from qcompiler.passes.second_moments import LayerRuns
from qcompiler.pipeline import Pipeline
from qcompiler.progress import Clock
from qcompiler.recipe import Recipe
from qcompiler.runtime import load
from qcompiler.session_options import new_session_options
from qcompiler.source import check_source, foreign_domains, inputs_with_defaults
from qcompiler.step import Step, Watcher
from qcompiler.targets.target import Target
from qcompiler.timing.observed_shapes import model_inputs

__all__ = ["Job", "size_of"]

_LOAD_CHECK_LIMIT = 1 << 30
"""Above this many bytes, with its model's, a bundle is neither opened once more after writing nor
timed against its model: that would take memory for the whole, not for its largest layer."""


@dataclasses.dataclass
class Job:
    """What a compilation needs at every step.

    Attributes:
        source: What was given as the model.
        example: Example inputs and dynamic shapes, for a torch module.
        target: What it is compiled for.
        recipe: What to do differently.
        clock: Tells what is being done.
        on_samples: Runs the model on calibration samples, if there are any.
        chooser: Chooses kernels; None for a pipeline of the user's.
        passes: The pipeline of the user's, or the text of one; None for the default.
        stop_after: The last stage that is wanted.
        watchers: Shown the model before and after each pass.
        for_ort: Write weights of few bits as ONNX Runtime's own op.
        executor: Where layers are rounded side by side.
        effective: The recipe with the options of all passes as they were.
        bytes_before: Size of the model as it came.
        foreign: Domains of ops that ONNX Runtime knows only with somebody else's library.
        defaults: Inputs of the model that need not be fed.
        notes_of_source: What the user should know of the model as it came.
        notes_of_passes: What passes want the user to know.
    """

    source: Any
    example: tuple[Any, ...]
    target: Target
    recipe: Recipe
    clock: Clock
    on_samples: SampleRuns | None
    chooser: Chooser | None
    passes: Pipeline | str | None
    stop_after: Stage | None
    watchers: Sequence[Watcher]
    for_ort: bool = False
    executor: concurrent.futures.Executor | None = None
    effective: Recipe = dataclasses.field(default_factory=Recipe)
    bytes_before: int = 0
    foreign: Sequence[str] = ()
    defaults: Sequence[str] = ()
    notes_of_source: tuple[str, ...] = ()
    notes_of_passes: tuple[str, ...] = ()

    def run_passes(self) -> ir.Model:
        """Load the model, and run the passes on it."""
        pipeline = self._pipeline()
        self.clock.total = len(pipeline.steps) + 4
        self.clock.start("load")
        model = load_model(self.source, *self.example)
        check_source(model)
        if is_of_torch(self.source):
            self.source, self.example = model.clone(), ()  # the export takes long
        self.bytes_before = _source_bytes(self.source, model)
        self.foreign = foreign_domains(model)
        self.defaults = inputs_with_defaults(model)
        self.notes_of_source = (*notes_on_state(model), *notes_on_infinity(model))
        if self.chooser is not None:
            self.chooser.check(model)
        if self.on_samples is not None:
            # All of them, whether or not a pass will ask for them.
            self.on_samples.samples.check(model_inputs(model))
        with source_is_blamed(self.source, bool(self.foreign)):
            model = pipeline.run(model, lambda step: self.clock.start(step.name), self.watchers)
        self.effective, self.notes_of_passes = pipeline.effective_recipe, pipeline.notes
        return model

    def _pipeline(self) -> Pipeline:
        if isinstance(self.passes, Pipeline):
            pipeline = self.passes
        else:
            assert self.chooser is not None
            pipeline = self.chooser.pipeline(self.recipe, self._runs())
            if self.passes is not None:
                pipeline = pipeline.select(self.passes)
                _check_read(pipeline, self.recipe, self.chooser.wishes)
        pipeline = pipeline if self.stop_after is None else pipeline.up_to(self.stop_after)
        if self.for_ort:
            pipeline.steps.append(Step("lower-few-bits", LowerFewBits(), Stage.QDQ))
        return pipeline

    def _runs(self) -> ModelRuns:
        if self.on_samples is not None:
            return self.on_samples.runs(self.executor, self._tell_layer)
        return ModelRuns(layers=LayerRuns(executor=self.executor, tell=self._tell_layer))

    def _tell_layer(self, text: str, share: float, left: float) -> None:
        self.clock.detail(f"{text}, {_duration(left)} left" if left > 1 else text, share)

    def is_large(self, stage: Path) -> bool:
        """Whether a session of the model or of its bundle would take more memory than this."""
        return self.bytes_before + size_of(stage) > _LOAD_CHECK_LIMIT

    def write(self, model: ir.Model, stage: Path) -> None:
        """Write a bundle into the folder `stage` in the place of what is there."""
        for file in stage.iterdir():
            file.unlink()
        self.clock.start("kernels")
        library = build_kernels(model, self.target, stage, self.clock)
        self.clock.start("write")
        write_bundle(model, stage, self.target, self.effective, library)
        if not (self.foreign or self.is_large(stage)):
            self._open(stage)

    def _open(self, stage: Path) -> None:
        """Open the bundle, as its users will.

        Raises:
            ModelError: ONNX Runtime refuses it, or already the model that it was made from.
        """
        try:
            load(
                stage, providers=["CPUExecutionProvider"], native=self.target.arch == "x86",
                session_options=new_session_options(quiet=True),
            )  # fmt: skip
        except ModelError:
            check_opens(self.source)
            raise

    def is_slower(self, model: ir.Model, stage: Path) -> bool:
        """Whether the bundle is to be made again with other choices."""
        if self.chooser is None or not self.chooser.may_retreat:
            return False
        if self.foreign or self.is_large(stage):
            return False
        if self.passes is not None:
            return False  # what was asked for by name is what is to be had
        if all(decision.action == "float" for decision in decisions(model)):
            return False
        self.clock.start("time the whole")
        with onnx_file(self.source) as file:
            return self.chooser.is_slower(stage, file)

    def write_choices(self, stage: Path) -> None:
        """Add to the manifest what was chosen."""
        if self.chooser is not None:
            choices = self.chooser.record().to_dict()
            dataclasses.replace(Manifest.read(stage), choices=choices).write(stage)

    def notes(self) -> tuple[str, ...]:
        """What the user should know, in sentences."""
        notes = self.notes_of_source + self.notes_of_passes
        notes += () if self.chooser is None else self.chooser.notes
        used = self.chooser is not None and self.chooser.used_samples
        if self.on_samples is not None and not self.on_samples.was_asked and not used:
            unused = "the calibration samples were not used: nothing here needs them for"
            notes = (f"{unused} {self.target.name}", *notes)
        if self.for_ort and (self.recipe.float or self.target.float_type) == "fp16":
            notes = ("--emit ort ends before convert-float16: floats stay in float32", *notes)
        if self.foreign:
            ops = ", ".join(self.foreign)
            notes = (f"not opened in ONNX Runtime: ops of {ops} need a library of theirs", *notes)
        if self.defaults:
            named = ", ".join(self.defaults)
            notes = (f"the values that inputs {named} have by default are constants now", *notes)
        return notes


def _duration(seconds: float) -> str:
    """As people say it, good to a percent or so."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


_READERS = {
    "keep_float": "assign-precision",
    "group_size": "assign-precision",
    "nodes": "assign-precision",
    "rounding": "assign-precision",
    "zero_points": "assign-precision",
    "scales": "assign-precision",
    "calibration": "insert-qdq",
    "attention": "fuse-attention",
    "float": "convert-float16",
    "shapes": "choose-kernels",
    "choices": "choose-kernels",
}
"""What a user may ask for, and the pass that reads it."""


def _check_read(pipeline: Pipeline, recipe: Recipe, wishes: Wishes) -> None:
    """Refuse what no pass of the pipeline would hear of.

    Raises:
        OptionError: Names it, and the pass that is missing.
    """
    names = {step.name for step in pipeline}
    usual = {key: getattr(Recipe(), key) for key in Recipe.names_of_keys()}
    given = {key: value for key in usual if (value := getattr(recipe, key)) != usual[key]}
    given |= {key: value for key in ("shapes", "choices") if (value := getattr(wishes, key))}
    readers = [(option, reader) for option, reader in _READERS.items() if option in given]
    readers += [(f"{recipe.source}: passes: {name}", name) for name in recipe.passes]
    for option, reader in readers:
        if reader not in names:
            raise OptionError(
                f"{option} is for {reader}, which the pipeline leaves out: add {reader} to it, or "
                f"leave out {option}"
            )


def size_of(folder: Path, pattern: str = "*") -> int:
    """Bytes of the files of a folder."""
    return sum(file.stat().st_size for file in folder.glob(pattern))


def _source_bytes(source: object, model: ir.Model) -> int:
    """Size of the model as it came: its file, plus tensors that lie outside it."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    if not isinstance(source, str | os.PathLike):
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
    outside = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, ir.ExternalTensor))
    return Path(source).stat().st_size + outside

"""A compilation from source to bundle."""

from __future__ import annotations

import concurrent.futures
import os
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from qcompiler.arguments import require, require_path, require_utf8
from qcompiler.chooser import Chooser, Wishes
from qcompiler.clipping import Clipping
from qcompiler.destination import check_file, check_folder, real_path, staged_folder
from qcompiler.frontend import check_kind
from qcompiler.ir.decisions import Decision, decisions
from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.ir.stages import Stage
from qcompiler.job import Job, size_of
from qcompiler.model_file import beside, save_model
from qcompiler.model_runs import SampleRuns
from qcompiler.pipeline import Pipeline
from qcompiler.progress import Clock, Progress
from qcompiler.recipe import Recipe
from qcompiler.report import Report
from qcompiler.samples import Samples, Source, samples_from
from qcompiler.step import Watcher, check_watchers
from qcompiler.targets.catalog import get_target
from qcompiler.targets.target import Target
from qcompiler.watch import check_dumps

if TYPE_CHECKING:
    import torch

__all__ = ["Progress", "compile"]

_FIRST = 5
"""So many of the nodes that `strict` refuses are named."""


def compile(
    source: str | os.PathLike[str] | ir.Model | torch.export.ExportedProgram | torch.nn.Module,
    target: str,
    output: str | os.PathLike[str] | None = None,
    *,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    recipe: Recipe | None = None,
    calibration: Source | Samples | None = None,
    pipeline: Pipeline | str | None = None,
    strict: bool = False,
    timing: bool = True,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    choices: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    stop_after: Stage | str | None = None,
    emit: str = "bundle",
    executor: concurrent.futures.Executor | None = None,
    watchers: Sequence[Watcher] = (),
) -> Report:
    """Compile a model into a bundle.

    Args:
        source: An ONNX file, a `.pt2`, an `onnx_ir.Model`, a `torch.export` program, or a torch
            module, such as a `torch.fx.GraphModule`, with example inputs.
        target: A target name, see `qcompile targets`.
        output: The bundle's folder; by default `<model>.<target>` in the current folder.
        example_inputs: For a module: its positional arguments, or a mapping of keyword arguments.
        dynamic_shapes: For a module: which dimensions vary, as `torch.export.export` takes them.
        recipe: What to do differently from the target's defaults.
        calibration: Samples for what must be static, see `Samples`.
        pipeline: Passes to run instead of the default ones, for which kernels are then not chosen;
            and which has its target, recipe and samples; or a text that names some of the default
            ones, see `Pipeline.parse`.
        strict: Raise if a node that could be fast is not.
        timing: Time kernels, and the bundle, on this machine, where it runs the target; else a
            cost model decides where quantizing gains something.
        shapes: Shapes of the model's inputs that matter, for timing.
        choices: A bundle, or its manifest, whose choices are to be made again.
        progress: Told about each step.
        stop_after: Write the model as it is after this stage ("float", "qdq", …), as an ONNX file
            and no bundle; by default `<model>.<target>.<stage>.onnx`.
        emit: "bundle", or "ort" for an ONNX file with ONNX Runtime's own MatMulNBits for weights of
            few bits in groups, and nothing of ours; by default `<model>.<target>.ort.onnx`.
        executor: Where layers that read the same activations are rounded side by side: of threads,
            of processes, or of a cluster.
        watchers: Shown the model at the start, and before and after each pass.

    Returns:
        What was done, and where the bundle is.

    Raises:
        QCompilerError: A mistake in the input; each subclass says which.
    """
    check_kind(source)
    _check_arguments(output, recipe, pipeline, shapes, choices, progress, executor, watchers)
    goal, clock = get_target(target), Clock(progress)
    last, suffix = _end(goal, emit, stop_after)
    chosen_by_hand = shapes is not None or choices is not None
    recipe = _recipe(pipeline, goal, recipe, calibration, chosen_by_hand)
    destination = _destination(source, target, output, suffix)
    check_dumps(watchers, source, destination)
    samples = None if calibration is None else samples_from(calibration)
    chooser = None
    if not isinstance(pipeline, Pipeline):
        chooser = Chooser(goal, Wishes(timing, shapes, choices), samples, clock.detail)
    job = Job(
        source, (example_inputs, dynamic_shapes), goal, recipe, clock,
        _runs_on(samples, recipe, clock), chooser, pipeline, last, watchers, emit == "ort",
        executor,
    )  # fmt: skip
    model = _run_passes(job, strict)
    if last is not None:
        save_model(model, destination)
    else:
        model = _write_bundle(job, model, destination, strict)
    return _report(job, model, destination)


def _check_arguments(
    output: object, recipe: object, pipeline: object, shapes: object, choices: object,
    progress: object, executor: object, watchers: Sequence[Watcher],
) -> None:  # fmt: skip
    """Refuse what is of a wrong type, before it is used in some odd place.

    Raises:
        OptionError: Names the argument, the value, and what it should be.
    """
    require("recipe", recipe, Recipe, "a qcompiler.Recipe")
    require("pipeline", pipeline, Pipeline | str, "a qcompiler.Pipeline or the text of one")
    require("shapes", shapes, Mapping, "sizes by input name, {'input_ids': (1, 128)}")
    require("progress", progress, Callable, "a function")
    require_path("output", output)
    require_utf8("output", output)
    require_path("choices", choices)
    require("executor", executor, concurrent.futures.Executor, "a concurrent.futures.Executor")
    check_watchers(watchers)


def _run_passes(job: Job, strict: bool) -> ir.Model:
    model = job.run_passes()
    if strict:
        _refuse_fallbacks(decisions(model))
    return model


def _write_bundle(job: Job, model: ir.Model, destination: Path, strict: bool) -> ir.Model:
    """Write the bundle, anew with other choices while it is slower; the model of the last one."""
    with staged_folder(destination) as stage:
        job.write(model, stage)
        while job.is_slower(model, stage):
            model = _run_passes(job, strict)
            job.write(model, stage)
        job.write_choices(stage)
    return model


def _runs_on(samples: Samples | None, recipe: Recipe, clock: Clock) -> SampleRuns | None:
    if samples is None:
        return None
    return SampleRuns(samples, Clipping.parse(recipe.calibration), clock.count_samples)


def _end(
    target: Target, emit: str, stop_after: Stage | str | None
) -> tuple[Stage | None, str | None]:
    """The stage that is written as a file, and how its name ends; None for a bundle."""
    stage = _stage(stop_after)
    if _emits_for_ort(emit, target, stage):
        return Stage.QDQ, "ort"
    return stage, None if stage is None else stage.name.lower()


def _recipe(
    pipeline: Pipeline | str | None,
    target: Target,
    recipe: Recipe | None,
    calibration: object,
    chosen_by_hand: bool,
) -> Recipe:
    """The recipe of a pipeline of the user's, else the one that was given."""
    if not isinstance(pipeline, Pipeline):
        return recipe or Recipe()
    _check_complete(pipeline, target, recipe, calibration)
    if chosen_by_hand:
        raise OptionError("a pipeline of your own chooses nothing: leave out shapes and choices")
    return pipeline.recipe


def _stage(given: Stage | str | None) -> Stage | None:
    names = [stage.name.lower() for stage in Stage]
    if given is None or isinstance(given, Stage):
        return given
    if given not in names:
        raise OptionError(f"stop_after must be one of {', '.join(names)}, not {given!r}")
    return Stage[given.upper()]


def _emits_for_ort(emit: str, target: Target, stage: Stage | None) -> bool:
    """Whether the result is to be a file for ONNX Runtime alone.

    Raises:
        OptionError: No such kind of result, or one that does not fit.
    """
    if emit not in ("bundle", "ort"):
        hint = did_you_mean(str(emit), ("bundle", "ort"))
        raise OptionError(f"emit must be bundle or ort, not {emit!r}{hint}")
    if emit == "ort" and stage is not None:
        raise OptionError("emit says what to write, and stop_after too: give one, not both")
    if emit == "ort" and not target.scheme.group_sizes:
        raise OptionError(
            f"--emit ort (emit='ort') writes MatMulNBits, and {target.name} has no weights in "
            "groups; choose an int4 target"
        )
    return emit == "ort"


def _check_complete(
    pipeline: Pipeline, target: Target, recipe: Recipe | None, calibration: object
) -> None:
    """Refuse what passes that were made before would not hear of.

    Raises:
        OptionError: A recipe, samples, or another target.
    """
    if recipe is not None:
        raise OptionError(
            "a pipeline of your own has its recipe: give it to Pipeline.default(target, recipe)"
        )
    if calibration is not None:
        raise OptionError(
            "a pipeline of your own runs the model for itself: give the samples to "
            "Pipeline.default(target, runs=ModelRuns.on(samples))"
        )
    if pipeline.target is not None and pipeline.target != target:
        raise OptionError(
            f"the pipeline was made for {pipeline.target.name}: compile for that, or make it by "
            f"Pipeline.default({target.name!r})"
        )


def _report(job: Job, model: ir.Model, written: Path) -> Report:
    job.clock.stop()
    made = written.is_dir()
    return Report(
        written,
        job.target.name,
        tuple(decisions(model)),
        job.bytes_before,
        bytes_after=size_of(written) if made else _size_of_file(written),
        bytes_of_kernels=size_of(written, "*.so") if made else 0,
        seconds=job.clock.seconds,
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        notes=job.notes(),
        choices=None if job.chooser is None else job.chooser.record().to_dict(),
    )


def _size_of_file(written: Path) -> int:
    """Bytes of a model and of the weights beside it."""
    return sum(file.stat().st_size for file in (written, beside(written)) if file.is_file())


def _destination(
    source: object, target: str, output: str | os.PathLike[str] | None, suffix: str | None
) -> Path:
    """Where the bundle goes; with a suffix, the file whose default name ends in it."""
    file = Path(source) if isinstance(source, str | os.PathLike) else None
    if output is None and file is None:
        raise OptionError("give output=...: only a model from a file has a name of its own")
    stem = f"{file.stem if file else ''}.{target}"
    if suffix is not None:
        return check_file(real_path(output or f"{stem}.{suffix}.onnx"), file)
    return check_folder(real_path(output or stem), source)


def _refuse_fallbacks(made: Iterable[Decision]) -> None:
    slow = [decision for decision in made if not decision.expected]
    if slow:
        named = [f"{d.node} ({d.op}): {d.why}" for d in slow[:_FIRST]]
        named += [f"and {len(slow) - _FIRST} more"] if len(slow) > _FIRST else []
        count = "1 node falls back" if len(slow) == 1 else f"{len(slow)} nodes fall back"
        raise OptionError(f"--strict: {count}: {'; '.join(named)}; leave it out to accept that")

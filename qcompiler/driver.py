"""A compilation from source to bundle."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from qcompiler.bundle import MANIFEST, MODEL, LibraryEntry, Manifest, sha256_of, staged_folder
from qcompiler.calibrate import Samples, observe
from qcompiler.frontend import load_model
from qcompiler.ir.decisions import decisions
from qcompiler.ir.errors import ModelError, OptionError, QCompilerError
from qcompiler.ir.types import TensorStats
from qcompiler.passes.bind_kernels import bound_domain, bound_regions
from qcompiler.pipeline import Pipeline
from qcompiler.recipe import Recipe
from qcompiler.report import Report
from qcompiler.runtime import load
from qcompiler.targets.catalog import get_target
from qcompiler.targets.target import Target

if TYPE_CHECKING:
    import torch

__all__ = ["Progress", "compile"]

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""

_LOAD_CHECK_LIMIT = 1 << 30
"""Above this many bytes a bundle is not opened once more after writing: it would not be bounded
by the largest layer."""


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
        output: The bundle's folder; by default `<model>.<target>` beside nothing else of that name.
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
    clock = _Clock(progress or (lambda label, done, total: None))
    goal, recipe = get_target(target), recipe or Recipe()
    destination = _destination(source, target, output)
    clock.start("load")
    model = load_model(source)
    bytes_before = _source_bytes(source, model)
    samples = Samples(calibration) if calibration is not None else None
    pipeline = pipeline or Pipeline.default(goal, recipe, _observer(samples, clock))
    clock.total = len(pipeline.steps) + 3
    model = pipeline.run(model, lambda step: clock.start(step.name))
    report = Report(destination, target, tuple(decisions(model)), bytes_before, 0, {}, 0)
    if strict and (slow := report.fallbacks()):
        named = "; ".join(f"{d.node} ({d.op}): {d.why}" for d in slow[:5])
        raise OptionError(f"--strict: {len(slow)} nodes fall back: {named}")
    with staged_folder(destination) as stage:
        clock.start("kernels")
        library = _build_library(model, goal, stage, clock)
        clock.start("write")
        _write(model, stage, goal, recipe, report, library)
        bytes_after = sum(file.stat().st_size for file in stage.iterdir())
        if bytes_after <= _LOAD_CHECK_LIMIT:
            load(stage, providers=["CPUExecutionProvider"], native=goal.arch == "x86")
    clock.stop()
    return dataclasses.replace(
        report,
        bytes_after=bytes_after,
        seconds=clock.seconds,
        warnings=tuple(_warnings(report)),
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


class _Clock:
    """Times the phases and passes them on to the progress display."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.seconds, self.total = progress, dict[str, float](), 1
        self._label, self._since, self._done = "", 0.0, -1

    def start(self, label: str) -> None:
        self.stop()
        self._label, self._since, self._done = label, time.perf_counter(), self._done + 1
        self.detail("")

    def detail(self, text: str) -> None:
        label = f"{self._label}: {text}" if text else self._label
        self.progress(label, self._done, max(self.total, self._done + 1))

    def stop(self) -> None:
        if self._label:
            self.seconds[self._label] = time.perf_counter() - self._since
            self._label = ""


def _destination(source: object, target: str, output: str | os.PathLike[str] | None) -> Path:
    if output is not None:
        return Path(output)
    if isinstance(source, str | os.PathLike):
        return Path(f"{Path(source).stem}.{target}")
    raise OptionError("give output=...: only a model from a file has a name of its own")


def _source_bytes(source: object, model: ir.Model) -> int:
    """Size of the model as it came: its file, plus tensors that lie outside it."""
    tensors = [
        v.const_value for v in model.graph.initializers.values() if v.const_value is not None
    ]
    if not isinstance(source, str | os.PathLike):
        return sum(tensor.nbytes for tensor in tensors)
    outside = sum(t.nbytes for t in tensors if isinstance(t, ir.ExternalTensor))
    return Path(source).stat().st_size + outside


def _observer(
    samples: Samples | None,
    clock: _Clock,
) -> Callable[[ir.Model, Sequence[str]], Mapping[str, TensorStats]] | None:
    if samples is None:
        return None
    return lambda model, names: observe(
        model, names, samples, lambda done, total: clock.detail(f"sample {done} of {total}")
    )


def _build_library(
    model: ir.Model,
    target: Target,
    stage: Path,
    clock: _Clock,
) -> LibraryEntry | None:
    domain, regions = bound_domain(model), bound_regions(model)
    if domain is None:
        return None
    from qcompiler.targets.library import KernelCache, build_library  # imports tvm

    file = f"lib{domain.replace('.', '-')}-{target.machine}.so"
    library = build_library(
        regions, domain, stage / file, cache=KernelCache(), progress=clock.detail
    )
    return LibraryEntry(file, domain, target.machine, library.isa, library.minimum_glibc)


def _write(
    model: ir.Model,
    stage: Path,
    target: Target,
    recipe: Recipe,
    report: Report,
    library: LibraryEntry | None,
) -> None:
    _save(model, stage / MODEL)
    names = sorted(file.name for file in stage.iterdir() if file.name != MANIFEST)
    packages = ("qcompiler", "apache-tvm", "onnx-ir", "onnx")
    Manifest(
        target=target.name,
        tools={name: importlib.metadata.version(name) for name in packages},
        minimum_ort=minimum_ort(model),
        recipe=recipe.to_dict(),
        decisions=[dataclasses.asdict(decision) for decision in report.decisions],
        files={name: sha256_of(stage / name) for name in names},
        library=library,
    ).write(stage)


def _save(model: ir.Model, path: Path) -> None:
    try:
        # Large tensors start on a page of their own, so that ORT maps rather than copies them.
        ir.save(
            model,
            path,
            external_data=f"{path.name}.data",
            size_threshold_bytes=1024,
            alignment=4096,
            align_threshold=4096,
        )
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error.strerror}") from error
    except Exception as error:
        # Names that are not UTF-8, for one, come as far as this.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"the compiled model cannot be saved: {cause}") from error


def _warnings(report: Report) -> list[str]:
    warnings = []
    if report.count("kernel", "body", "qdq") == 0:
        warnings.append("nothing was quantized: the bundle runs in float like the original")
    elif report.count("kernel") == 0:
        warnings.append(
            f"{report.target} has no kernels of its own for this model yet: its "
            f"{report.count('body')} quantized nodes run as ONNX Runtime runs their bodies"
        )
    return warnings


def minimum_ort(model: ir.Model) -> str:
    """The oldest ONNX Runtime that loads the model's opset, never below our library's floor.

    Raises:
        QCompilerError: None that this version knows of does.
    """
    opset = model.graph.opset_imports.get("", 1)
    for version, newest in _OPSET_OF_ORT:
        if opset <= newest:
            return version
    raise QCompilerError(f"no ONNX Runtime known to this qcompiler runs opset {opset}")


_OPSET_OF_ORT = (("1.23", 23), ("1.24", 25), ("1.25", 26))
"""The newest opset each ONNX Runtime loads; tried with the wheels 1.23.0 to 1.31.1."""

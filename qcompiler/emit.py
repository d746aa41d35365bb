"""Write a compiled model as a bundle: library, weights, model, manifest."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.bundle import MANIFEST, MODEL, LibraryEntry, Manifest, sha256_of
from qcompiler.ir.decisions import decisions
from qcompiler.ir.errors import ModelError
from qcompiler.ir.on_disk import letting_go
from qcompiler.model_file import saving
from qcompiler.passes.bind_kernels import bound_domain, bound_regions
from qcompiler.progress import Clock
from qcompiler.recipe import Recipe
from qcompiler.targets.target import Target

__all__ = ["build_kernels", "minimum_ort", "write_bundle"]

_GLUE_STEPS = 10

_OPSET_OF_ORT = (("1.23", 23), ("1.24", 25), ("1.25", 26), ("1.32", 28))
"""The newest opset each ONNX Runtime loads; tried with the wheels 1.23.0 to 1.32.0."""


def build_kernels(
    model: ir.Model,
    target: Target,
    folder: Path,
    clock: Clock,
) -> LibraryEntry | None:
    """Build the library of the model's bound regions into `folder`; None if there are none.

    Raises:
        ToolchainError: No linker, or one that fails.
    """
    domain, regions = bound_domain(model), bound_regions(model)
    if domain is None:
        return None
    from qcompiler.targets.library import KernelCache, build_library

    steps = itertools.count()

    def tell(line: str) -> None:
        # A line for each kernel that is not cached, a few for the glue and the link.
        clock.detail(line, min(next(steps) / (len(regions) + _GLUE_STEPS), 1.0))

    file = f"lib{domain.replace('.', '-')}-{target.machine}.so"
    library = build_library(
        regions, domain, folder / file, cache=KernelCache(), arch=target.arch, progress=tell
    )
    return LibraryEntry(file, domain, target.machine, library.isa, library.minimum_glibc)


def write_bundle(
    model: ir.Model,
    folder: Path,
    target: Target,
    recipe: Recipe,
    library: LibraryEntry | None,
    choices: dict[str, Any] | None = None,
) -> None:
    """Write model, weights and manifest beside the library that is already in `folder`.

    Raises:
        OptionError: The disk refuses.
        ModelError: The model cannot be expressed as a file.
    """
    _save(model, folder / MODEL)
    names = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST)
    Manifest(
        target=target.name,
        tools={name: _version(name) for name in ("qcompiler", "apache-tvm", "onnx-ir", "onnx")},
        minimum_ort=minimum_ort(model),
        recipe=recipe.to_dict(),
        decisions=[dataclasses.asdict(decision) for decision in decisions(model)],
        files={name: sha256_of(folder / name) for name in names},
        library=library,
        choices=choices,
    ).write(folder)


def minimum_ort(model: ir.Model) -> str:
    """The oldest ONNX Runtime that loads the model's opset, never below our library's floor.

    Raises:
        ModelError: None that this version knows of does.
    """
    opset = model.graph.opset_imports.get("", 1)
    for version, newest in _OPSET_OF_ORT:
        if opset <= newest:
            return version
    raise ModelError(
        f"no ONNX Runtime known to this qcompiler runs opset {opset}; export the model again with "
        f"opset {_OPSET_OF_ORT[-1][1]} or older"
    )


def _save(model: ir.Model, path: Path) -> None:
    with saving(path):
        # Large tensors start on a page of their own, so that ORT maps rather than copies them.
        ir.save(
            model,
            path,
            external_data=f"{path.name}.data",
            size_threshold_bytes=1024,
            callback=letting_go(),
            alignment=4096,
            align_threshold=4096,
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

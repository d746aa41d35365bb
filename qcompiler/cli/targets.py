"""`qcompile targets`: what each target is, and what of it exists and runs here."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich.text import Text

from qcompiler.cli.console import Terminal
from qcompiler.cli.figures import FigureTable, facts
from qcompiler.cli.host import gpu_capability, instruction_sets, machine
from qcompiler.cli.options import Command, json_option, verbose_option

if TYPE_CHECKING:
    from qcompiler.targets.target import Scheme, Target

__all__ = ["targets_command"]


@dataclasses.dataclass(frozen=True)
class TargetStatus:
    """One target, here and now.

    Attributes:
        target: Its name.
        weights: Storage and granularity of MatMul weights.
        activations: The same of activations.
        convolutions: Of both, for Conv.
        planned_isa: Variants a bundle may carry one day, best first.
        built_isa: Variants kernels are generated for today; empty: bodies only.
        runs_native: Whether this machine runs one of those.
        provider: Execution provider its kernels belong to.
        provider_available: Whether the installed ONNX Runtime has it.
    """

    target: str
    weights: str
    activations: str
    convolutions: str
    planned_isa: tuple[str, ...]
    built_isa: tuple[str, ...]
    runs_native: bool
    provider: str
    provider_available: bool


@click.command("targets", cls=Command)
@json_option
@verbose_option
@click.pass_obj
def targets_command(terminal: Terminal, as_json: bool) -> None:
    """List the targets, and what of each exists and runs here."""
    from qcompiler.targets.catalog import TARGETS

    version, providers = _onnxruntime()
    found = [_status(target, providers) for target in TARGETS.values()]
    here = {
        "machine": machine(),
        "instruction_sets": list(instruction_sets()),
        "gpu": _gpu(),
        "onnxruntime": version,
        "providers": list(providers),
        "linker": _linker(),
        "cuda_compiler": _cuda_compiler(),
    }
    if as_json:
        terminal.json({"targets": [dataclasses.asdict(status) for status in found], "here": here})
        return
    _print(terminal, found, here)


def _status(target: Target, providers: tuple[str, ...]) -> TargetStatus:
    from qcompiler.targets.catalog import built_isas

    built = built_isas(target)
    able = instruction_sets() if target.arch != "cuda" else _gpu_variants(target)
    available = target.provider in providers
    runs = machine() == target.machine and any(isa in able for isa in built) and available
    return TargetStatus(
        target.name, *_scheme(target.scheme), target.isa, built, runs, target.provider, available
    )


def _gpu_variants(target: Target) -> tuple[str, ...]:
    """The target's variants that the GPU here runs: "sm_80" runs on all 8.x, "sm_90a" on 9.0."""
    capability = gpu_capability()
    if capability is None:
        return ()
    major, minor = capability
    return tuple(
        isa
        for isa in target.isa
        if isa == f"sm_{major}{minor}a" or isa in [f"sm_{major}{i}" for i in range(minor + 1)]
    )


def _scheme(scheme: Scheme) -> tuple[str, str, str]:
    """Weights, activations and convolutions in words."""
    name = {"FLOAT8E4M3FN": "e4m3"}
    weight = name.get(scheme.weight.name, scheme.weight.name.lower())
    if scheme.group_sizes:
        weights = f"{weight}, groups of {scheme.group_sizes[0]}"
    else:
        weights = f"{weight} per channel"
    if scheme.activation is None:
        activations = "float"
    else:
        stored = scheme.activation.name
        activations = f"{name.get(stored, stored.lower())} per token"
    if scheme.conv_weight is None:
        return weights, activations, "float"
    convolutions = f"{scheme.conv_weight.name.lower()}, {scheme.conv_activation.name.lower()}"
    return weights, activations, f"{convolutions} static"


def _onnxruntime() -> tuple[str | None, tuple[str, ...]]:
    """Version and providers of the installed ONNX Runtime."""
    from qcompiler.installed import import_onnxruntime
    from qcompiler.ir.errors import RuntimeMissingError

    try:
        ort = import_onnxruntime()
    except RuntimeMissingError:
        return None, ()
    return ort.__version__, tuple(ort.get_available_providers())


def _linker() -> str | None:
    from qcompiler.ir.errors import ToolchainError
    from qcompiler.targets.toolchain import find_linker

    try:
        return find_linker().name
    except ToolchainError:
        return None


def _cuda_compiler() -> str | None:
    from qcompiler.ir.errors import ToolchainError
    from qcompiler.targets.cubin import find_cubin_compiler

    try:
        return find_cubin_compiler().name
    except ToolchainError:
        return None


def _gpu() -> str | None:
    capability = gpu_capability()
    return None if capability is None else f"compute capability {capability[0]}.{capability[1]}"


def _print(terminal: Terminal, found: list[TargetStatus], here: dict[str, Any]) -> None:
    table = FigureTable("Target", "Weights", "Activations", "Convolutions", "Kernels", "Here",
                        droppable=["Convolutions"])  # fmt: skip
    for status in found:
        # One to a line: side by side they would take the width that other columns need.
        kernels = "\n".join(status.built_isa) or Text("none yet", "yellow")
        table.add_row(
            Text(status.target, "bold"), status.weights, status.activations, status.convolutions,
            kernels, _here(status),
        )  # fmt: skip
    terminal.out.print(table)
    terminal.out.print()
    terminal.out.print(facts(
        ("Processor", f"{here['machine']}: {', '.join(here['instruction_sets']) or 'unknown'}"),
        ("GPU", here["gpu"] or "none"),
        ("ONNX Runtime", _onnxruntime_in_words(here)),
        ("Linker", here["linker"] or "none: pip install 'qcompiler[zig]', or set CC"),
        ("CUDA compiler", here["cuda_compiler"] or "none: install CUDA, or pip install "
         "'qcompiler[nvrtc]'"),
    ))  # fmt: skip
    if terminal.verbose:
        terminal.out.print("\nInstruction sets planned, best first", style="dim")
        terminal.out.print(facts(*((s.target, ", ".join(s.planned_isa)) for s in found)))


def _onnxruntime_in_words(here: dict[str, Any]) -> str | Text:
    from qcompiler.installed import check_onnxruntime
    from qcompiler.ir.errors import RuntimeMissingError

    try:
        check_onnxruntime()
    except RuntimeMissingError as error:
        return Text(str(error), "yellow")
    return f"{here['onnxruntime']}: {', '.join(here['providers'])}"


def _here(status: TargetStatus) -> Text:
    if status.runs_native:
        return Text("native", "green")
    if status.built_isa:
        return Text("bodies only", "yellow")
    return Text("bodies only" if status.provider_available else "bodies, on the CPU", "yellow")

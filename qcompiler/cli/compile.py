"""`qcompile MODEL --target T`: compile, and say what came of it."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich.text import Text

from qcompiler.cli.choices import every_choice, grounds
from qcompiler.cli.console import Terminal
from qcompiler.cli.decisions import decision_table, every_decision
from qcompiler.cli.figures import FigureTable, facts, size, span
from qcompiler.cli.options import (
    FILE,
    Shapes,
    ShapesType,
    TargetName,
    json_option,
    verbose_option,
)

if TYPE_CHECKING:
    from qcompiler.recipe import Recipe
    from qcompiler.report import Report

__all__ = ["compile_command"]


@click.command("compile", hidden=True, add_help_option=False)
@click.argument("model", type=FILE, metavar="MODEL", help="An ONNX file.")
@click.option(
    "--target",
    type=TargetName(),
    metavar="TARGET",
    required=True,
    help="What to compile for; `qcompile targets` lists them.",
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="DIR",
    help="The bundle's folder; <model>.<target> if not given.",
)
@click.option(
    "--calib",
    type=FILE,
    metavar="DIR",
    help="Folder of .npz samples, an array per input; needed for convolutions.",
)
@click.option(
    "--recipe",
    "recipe_file",
    type=FILE,
    metavar="FILE",
    help="A TOML file with the keys keep_float, group_size, attention and smooth.",
)
@click.option(
    "--keep-float",
    multiple=True,
    metavar="PATTERN",
    help="Do not quantize these nodes: a name, an op type or a pattern; may repeat.",
)
@click.option("--group-size", type=int, metavar="N", help="Weights per scale, for int4.")
@click.option(
    "--shapes",
    type=ShapesType(),
    metavar="NAME=1x128,…",
    help="Shapes of inputs that matter, to choose kernels by.",
)
@click.option(
    "--no-timing",
    "untimed",
    is_flag=True,
    help="Choose kernels by a cost model, not by timing them here.",
)
@click.option(
    "--choices",
    type=FILE,
    metavar="BUNDLE",
    help="Choose the kernels that this bundle or manifest chose.",
)
@click.option("--strict", is_flag=True, help="Fail if a node that could be fast is not.")
@click.option("-q", "--quiet", is_flag=True, help="Print warnings and errors only.")
@json_option
@verbose_option
@click.pass_obj
def compile_command(
    terminal: Terminal, model: Path, target: str, output: Path | None, calib: Path | None,
    recipe_file: Path | None, keep_float: tuple[str, ...], group_size: int | None,
    shapes: Shapes | None, untimed: bool, choices: Path | None, strict: bool, quiet: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Compile a model into a bundle."""
    with terminal.progress(shown=not (quiet or as_json)) as progress:
        # Imported here, so that the progress covers it.
        import qcompiler
        from qcompiler.runtime import check_onnxruntime

        check_onnxruntime()
        report = qcompiler.compile(
            model, target, output, recipe=_recipe(recipe_file, keep_float, group_size),
            calibration=calib, strict=strict, timing=not untimed, shapes=shapes, choices=choices,
            progress=progress,
        )  # fmt: skip
    if as_json:
        terminal.json(report.to_dict())
        return
    if not quiet:
        _print_report(terminal, model, report)
    for warning in report.warnings:
        terminal.warning(warning)
    if not quiet:
        terminal.next(*_next_commands(model, report))


def _recipe(file: Path | None, keep_float: tuple[str, ...], group_size: int | None) -> Recipe:
    """The recipe of the file, with the options on top."""
    from qcompiler.recipe import Recipe

    recipe = Recipe() if file is None else Recipe.read(file)
    return dataclasses.replace(
        recipe,
        keep_float=(*recipe.keep_float, *keep_float),
        group_size=recipe.group_size if group_size is None else group_size,
    )


def _print_report(terminal: Terminal, model: Path, report: Report) -> None:
    out = terminal.out
    out.print(Text.assemble("\n", (str(model), "bold"), " → ", (str(report.bundle), "bold"), "\n"))
    out.print(decision_table(report.groups()))
    out.print()
    out.print(facts(*_totals(report)))
    out.print()
    if terminal.verbose:
        out.print(every_decision(report.decisions))
        out.print()
        if report.choices is not None and report.choices["sites"]:
            out.print(every_choice(report.choices))
            out.print()
            out.print(facts(*grounds(report.choices)))
            out.print()
        out.print(_phases(report.seconds))
        out.print()


def _totals(report: Report) -> list[tuple[str, str | Text]]:
    before, kernels = report.bytes_before, report.bytes_of_kernels
    after = report.bytes_after - kernels
    slowest = sorted(report.seconds.items(), key=lambda item: -item[1])[:2]
    named = ", ".join(f"{name} {span(seconds)}" for name, seconds in slowest)
    total = sum(report.seconds.values())
    change = f"{before / after:.1f} times smaller" if after < before else "not smaller"
    library = f"; kernels {size(kernels)}" if kernels else ""
    return [
        ("Size", f"{size(before)} → {size(after)}, {change}{library}"),
        ("Time", f"{span(total)}, of it {named}"),
        ("Memory", f"{size(report.peak_memory)} at its peak"),
        ("Bundle", f"{report.bundle}/"),
    ]


def _phases(seconds: dict[str, float]) -> FigureTable:
    table = FigureTable("Phase", ">Time")
    for name, value in seconds.items():
        table.add_row(name, span(value))
    return table


def _next_commands(model: Path, report: Report) -> list[str]:
    bundle = str(report.bundle)
    # Not the samples of --calib: answers on those say little about others.
    return [
        shlex.join(["qcompile", "bench", bundle, "--against", str(model)]),
        shlex.join(["qcompile", "compare", str(model), bundle, "--data", "DIR"]),
    ]

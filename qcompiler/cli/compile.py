"""`qcompile MODEL --target T`: compile, and say what came of it."""

from __future__ import annotations

import collections
import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich.table import Table
from rich.text import Text

from qcompiler.cli.console import Terminal, facts, figure_table, size, span
from qcompiler.cli.options import FILE, TargetName, json_option, verbose_option

if TYPE_CHECKING:
    from qcompiler.ir.decisions import Decision
    from qcompiler.recipe import Recipe
    from qcompiler.report import Group, Report

__all__ = ["compile_command", "decision_table"]

_WHO = {
    "kernel": ("our kernel", "green"),
    "qdq": ("ONNX Runtime, int8", "green"),
    "body": ("function body", "yellow"),
    "float": ("float", ""),
}


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
    help="A TOML file with the keys keep_float and group_size.",
)
@click.option(
    "--keep-float",
    multiple=True,
    metavar="PATTERN",
    help="Do not quantize these nodes: a name, an op type or a pattern; may repeat.",
)
@click.option("--group-size", type=int, metavar="N", help="Weights per scale, for int4.")
@click.option("--strict", is_flag=True, help="Fail if a node that could be fast is not.")
@click.option("-q", "--quiet", is_flag=True, help="Print warnings and errors only.")
@json_option
@verbose_option
@click.pass_obj
def compile_command(
    terminal: Terminal, model: Path, target: str, output: Path | None, calib: Path | None,
    recipe_file: Path | None, keep_float: tuple[str, ...], group_size: int | None, strict: bool,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compile a model into a bundle."""
    with terminal.progress(shown=not (quiet or as_json)) as progress:
        # Imported here, so that the progress covers it.
        import qcompiler

        report = qcompiler.compile(
            model, target, output, recipe=_recipe(recipe_file, keep_float, group_size),
            calibration=calib, strict=strict, progress=progress,
        )  # fmt: skip
    if as_json:
        terminal.json(report.to_dict())
        return
    if not quiet:
        _print_report(terminal, model, report)
    for warning in report.warnings:
        terminal.warning(warning)
    if not quiet:
        terminal.next(*_next_commands(model, report, calib))


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
        out.print(_every_decision(report.decisions))
        out.print()
        out.print(_phases(report.seconds))
        out.print()


def decision_table(groups: Iterable[Group]) -> Table:
    """Nodes counted by who computes them and why; ops without weights on one line."""
    from qcompiler.ir.decisions import NO_WEIGHTS

    table = figure_table(">Nodes", "Computed by", "Op", "Why")
    weightless = collections.Counter[str]()
    for group in groups:
        if group.action == "float" and group.why == NO_WEIGHTS:
            weightless[group.op] += group.count
            continue
        who, style = _WHO[group.action]
        table.add_row(str(group.count), Text(who, style), group.op, Text(group.why, "dim"))
    if weightless:
        listed = ", ".join(f"{op} {count}" for op, count in weightless.most_common(6))
        more = f" and {len(weightless) - 6} more ops" if len(weightless) > 6 else ""
        why = Text(f"no weights to quantize: {listed}{more}", "dim")
        table.add_row(str(weightless.total()), "float", "others", why)
    return table


def _totals(report: Report) -> list[tuple[str, str | Text]]:
    before, after = report.bytes_before, report.bytes_after
    slowest = sorted(report.seconds.items(), key=lambda item: -item[1])[:2]
    named = ", ".join(f"{name} {span(seconds)}" for name, seconds in slowest)
    total = sum(report.seconds.values())
    change = f"{before / after:.1f} times smaller" if after < before else "not smaller"
    return [
        ("Size", f"{size(before)} → {size(after)}, {change}"),
        ("Time", f"{span(total)}, of it {named}"),
        ("Memory", f"{size(report.peak_memory)} at its peak"),
        ("Bundle", f"{report.bundle}/"),
    ]


def _every_decision(decisions: Sequence[Decision]) -> Table:
    table = figure_table("Node", "Op", "Computed by", "Why")
    for decision in decisions:
        who, style = _WHO[decision.action]
        table.add_row(decision.node, decision.op, Text(who, style), Text(decision.why, "dim"))
    return table


def _phases(seconds: dict[str, float]) -> Table:
    table = figure_table("Phase", ">Time")
    for name, value in seconds.items():
        table.add_row(name, span(value))
    return table


def _next_commands(model: Path, report: Report, calib: Path | None) -> list[str]:
    bundle = str(report.bundle)
    commands = [["qcompile", "bench", bundle, "--against", str(model)]]
    if calib is not None:
        commands.append(["qcompile", "compare", str(model), bundle, "--data", str(calib)])
    return [shlex.join(command) for command in commands]

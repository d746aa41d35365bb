"""What came of a compilation, in words and tables for people."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from qcompiler.cli.choices import every_choice, grounds
from qcompiler.cli.console import Terminal
from qcompiler.cli.decisions import decision_table, every_decision
from qcompiler.cli.figures import FigureTable, facts, size, span

if TYPE_CHECKING:
    from qcompiler.report import Report

__all__ = ["print_emitted", "print_report", "print_stopped"]


def print_report(terminal: Terminal, model: Path, report: Report, quiet: bool) -> None:
    """What was done to each kind of node, and what to do next; only warnings if `quiet`."""
    if not quiet:
        _print_tables(terminal, model, report)
    for warning in report.warnings:
        terminal.warning(warning)
    if not quiet:
        terminal.next(*_next_commands(model, report))


def print_stopped(terminal: Terminal, stage: str, report: Report, quiet: bool) -> None:
    """Where the model of a stage is."""
    for note in report.notes:
        terminal.warning(note)
    if not quiet:
        terminal.out.print(f"The model after stage {stage} is {report.bundle}")


def print_emitted(terminal: Terminal, report: Report, quiet: bool) -> None:
    """Where the model for ONNX Runtime alone is, and what its ops are."""
    for note in report.notes:
        terminal.warning(note)
    if not quiet:
        terminal.out.print(decision_table(report.groups()))
        terminal.out.print(f"\nWritten for ONNX Runtime without qcompiler: {report.bundle}")


def _print_tables(terminal: Terminal, model: Path, report: Report) -> None:
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

"""`qcompile bench`: a bundle against its model, timed in turn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich.text import Text

from qcompiler.cli.console import Terminal
from qcompiler.cli.figures import FigureTable, facts, span
from qcompiler.cli.options import (
    FILE,
    Command,
    Count,
    Shapes,
    ShapesType,
    json_option,
    preprocess_option,
    quiet_option,
    samples_of,
    verbose_option,
)
from qcompiler.cores import are_busy

if TYPE_CHECKING:
    from qcompiler.bench import Bench

__all__ = ["bench_command"]


class SecondsType(click.FloatRange):
    """A time above 0 that ends."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Also refuse what no range does: nan."""
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


@click.command("bench", cls=Command)
@click.argument("bundle", type=FILE, metavar="BUNDLE")
@click.option(
    "--against",
    type=FILE,
    metavar="MODEL",
    required=True,
    help="The ONNX file it was compiled from, or another bundle.",
)
@click.option(
    "--threads",
    type=Count(min=1),
    multiple=True,
    metavar="N",
    help="Threads inside an op; may repeat. One, and all cores, if not given.",
)
@click.option(
    "--shapes", type=ShapesType(), metavar="NAME=1x128,…", help="Shapes of random inputs."
)
@click.option(
    "--data", type=FILE, metavar="DIR",
    help="Feed samples instead: a folder of .npz, .npy, test data or images, or module:function.",
)  # fmt: skip
@preprocess_option
@click.option(
    "--seconds",
    type=SecondsType(min=0, min_open=True),
    default=5.0,
    metavar="S",
    show_default=True,
    help="How long to measure, per number of threads.",
)
@quiet_option
@json_option
@verbose_option
@click.pass_obj
def bench_command(
    terminal: Terminal, bundle: Path, against: Path, threads: tuple[int, ...],
    shapes: Shapes | None, data: Path | None, preprocess: str | None, seconds: float,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Time a bundle against its model, in turn, in one process."""
    with terminal.progress(shown=not (quiet or as_json)) as progress:
        from qcompiler.bench import bench

        if data is None and preprocess is not None:
            raise click.UsageError("--preprocess is about samples: add --data")
        samples = None if data is None else samples_of(data, preprocess)
        found = bench(bundle, against, threads=threads, shapes=shapes, data=samples,
                      seconds=seconds, progress=progress)  # fmt: skip
    if as_json:
        terminal.json(found.to_dict())
        return
    _print(terminal, found)


def _print(terminal: Terminal, found: Bench) -> None:
    out = terminal.out
    title = Text.assemble(
        "\n", (str(found.bundle), "bold"), " against ", (str(found.model), "bold"), "\n"
    )
    out.print(title)
    out.print(facts(*_conditions(found)))
    out.print()
    out.print(_table(found))
    out.print()
    for result in found.results:
        low, high = result.spread
        if low <= 1 <= high:
            plural = "s" if result.threads > 1 else ""
            text = f"On {result.threads} thread{plural} neither is clearly faster."
            out.print(text, style="yellow")


def _table(found: Bench) -> FigureTable:
    table = FigureTable(
        ">Threads", ">Model\nmedian", ">Model\nfastest", ">Bundle\nmedian", ">Bundle\nfastest",
        ">Speedup\nmedian", ">Speedup\nfastest", ">Speedup\nmiddle 50%", ">Runs",
        droppable=["Runs", "Speedup\nfastest", "Model\nfastest", "Bundle\nfastest"],
    )  # fmt: skip
    for result in found.results:
        low, high = result.spread
        style = "green" if low > 1 else "red" if high < 1 else "yellow"
        table.add_row(
            str(result.threads), span(result.model.median), span(result.model.minimum),
            span(result.bundle.median), span(result.bundle.minimum),
            Text(f"{result.speedup:.2f}x", f"bold {style}"), f"{result.speedup_of_minima:.2f}x",
            f"{low:.2f}-{high:.2f}x", f"{result.rounds:,}",
        )  # fmt: skip
    return table


def _conditions(found: Bench) -> list[tuple[str, str | Text]]:
    """What was fed, and under which circumstances."""
    rows: list[tuple[str, str | Text]] = []
    for index, fed in enumerate(found.inputs):
        values = f"first of {found.samples} samples" if found.samples else fed.values
        assumed = "".join(f", {name} taken as {size}" for name, size in fed.assumed.items())
        shape = "x".join(map(str, fed.shape)) or "scalar"
        text = f"{fed.name} {fed.dtype} {shape}, {values}{assumed}"
        rows.append(("Input" if index == 0 else "", text))
    rows += [("Provider", ", ".join(found.providers)), ("Spinning", found.spinning)]
    if are_busy(found.load, found.cores):
        text = f"{found.load:.1f} of {found.cores} cores were busy already: times may be too long"
        rows.append(("Load", Text(text, "yellow")))
    return rows

"""`qcompile compare`: how far a bundle's answers are from its model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich.text import Text

from qcompiler.cli.console import Terminal
from qcompiler.cli.figures import FigureTable
from qcompiler.cli.options import FILE, json_option, verbose_option

if TYPE_CHECKING:
    from qcompiler.compare import Comparison
    from qcompiler.output_error import OutputError

__all__ = ["compare_command"]

_MANY_OUTPUTS, _FIRST_OUTPUTS = 10, 6
"""Above so many outputs (a decoder's cache has 60) only the first are shown."""


@click.command("compare")
@click.argument("model", type=FILE, metavar="MODEL")
@click.argument("bundle", type=FILE, metavar="BUNDLE")
@click.option(
    "--data",
    type=FILE,
    metavar="DIR",
    required=True,
    help="Folder of .npz samples, an array per input.",
)
@click.option("--labels", metavar="NAME", help="Array of the samples with the right classes.")
@click.option(
    "--native/--no-native",
    default=True,
    help="Run the bundle's kernels, or only its functions' bodies.",
)
@json_option
@verbose_option
@click.pass_obj
def compare_command(
    terminal: Terminal, model: Path, bundle: Path, data: Path, labels: str | None, native: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Run a model and its bundle on samples, and measure the difference."""
    # Without a bar there is nothing to say on the way: samples are no stages.
    with terminal.progress(shown=not as_json and terminal.err.is_terminal) as progress:
        from qcompiler.compare import compare

        found = compare(model, bundle, data, labels=labels, native=native, progress=progress)
    if as_json:
        terminal.json(found.to_dict())
        return
    plural = "s" if found.samples > 1 else ""
    how = "" if native else ", function bodies only"
    terminal.out.print(Text.assemble(
        "\n", (str(model), "bold"), " → ", (str(bundle), "bold"),
        (f"  {found.samples} sample file{plural}{how}\n", "dim"),
    ))  # fmt: skip
    many = len(found.outputs) > _MANY_OUTPUTS and not terminal.verbose
    shown = _FIRST_OUTPUTS if many else len(found.outputs)
    terminal.out.print(_table(found.outputs[:shown]))
    if many:
        terminal.out.print(_rest(found.outputs[shown:]), style="dim")
    terminal.out.print()
    _warn(terminal, found)


def _table(outputs: Sequence[OutputError]) -> FigureTable:
    scores = any(output.top1 is not None for output in outputs)
    labelled = any(output.accuracy is not None for output in outputs)
    titles = ["Output", ">Values", ">SQNR", ">Cosine", ">Max\nerror"]
    titles += [">Same\ntop-1"] * scores
    titles += [">Accuracy\nmodel", ">Accuracy\nbundle"] * labelled
    table = FigureTable(*titles, droppable=["Values", "Cosine"])
    for output in outputs:
        cells = _figures(output)
        if scores:
            cells.append("" if output.top1 is None else f"{output.top1:.2%}")
        if labelled and output.accuracy is not None:
            cells += [f"{output.accuracy.model:.2%}", f"{output.accuracy.bundle:.2%}"]
        table.add_row(*cells)
    return table


def _figures(output: OutputError) -> list[str]:
    if not output.values:
        return [output.name, "0", "no numbers", "", ""]
    sqnr = "equal" if output.sqnr is None else f"{output.sqnr:.1f} dB"
    cosine = "" if output.cosine is None else f"{output.cosine:.6f}"
    return [output.name, f"{output.values:,}", sqnr, cosine, f"{output.max_error:.3g}"]


def _rest(outputs: Sequence[OutputError]) -> str:
    """The outputs that are not shown, on one line."""
    told = [(output.sqnr, output.name) for output in outputs if output.sqnr is not None]
    worst = f"worst SQNR {min(told)[0]:.1f} dB ({min(told)[1]})" if told else "all equal"
    return f"and {len(outputs)} more: {worst}; -v lists them"


def _warn(terminal: Terminal, found: Comparison) -> None:
    broken = [output for output in found.outputs if output.not_finite]
    if not broken:
        return
    count = sum(output.not_finite for output in broken)
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    verb = "are" if more else "is"
    terminal.warning(
        f"output {broken[0].name!r}{more} of the bundle {verb} NaN or Inf {count:,} times where "
        "the model's is a number"
    )

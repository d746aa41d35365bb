"""`qcompile compare`: how far a bundle's answers are from its model's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich.table import Table
from rich.text import Text

from qcompiler.cli.console import Terminal, figure_table
from qcompiler.cli.options import FILE, json_option, verbose_option

if TYPE_CHECKING:
    from qcompiler.compare import Comparison, OutputError

__all__ = ["compare_command"]


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
    with terminal.progress(shown=not as_json) as progress:
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
    terminal.out.print(_table(found))
    terminal.out.print()
    for output in found.outputs:
        if output.not_finite:
            terminal.warning(
                f"output {output.name!r} of the bundle is NaN or Inf {output.not_finite} times "
                "where the model's is a number"
            )


def _table(found: Comparison) -> Table:
    scores = any(output.top1 is not None for output in found.outputs)
    labelled = any(output.accuracy is not None for output in found.outputs)
    titles = ["Output", ">Values", ">SQNR", ">Cosine", ">Max error"]
    titles += [">Same top-1"] * scores + [">Accuracy, model", ">bundle"] * labelled
    table = figure_table(*titles)
    for output in found.outputs:
        cells = _figures(output)
        if scores:
            cells.append("" if output.top1 is None else f"{output.top1:.2%}")
        if labelled and output.accuracy is not None:
            cells += [f"{output.accuracy.model:.2%}", f"{output.accuracy.bundle:.2%}"]
        table.add_row(*cells)
    return table


def _figures(output: OutputError) -> list[str]:
    if not output.values:
        return [output.name, "0", "nothing to compare"]
    sqnr = "equal" if output.sqnr is None else f"{output.sqnr:.1f} dB"
    cosine = "" if output.cosine is None else f"{output.cosine:.6f}"
    return [output.name, f"{output.values:,}", sqnr, cosine, f"{output.max_error:.3g}"]

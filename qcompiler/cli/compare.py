"""`qcompile compare`: how far a bundle's answers are from its model's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich.text import Text

from qcompiler.cli.console import Terminal
from qcompiler.cli.figures import FigureTable
from qcompiler.cli.options import (
    FILE,
    Command,
    Count,
    json_option,
    preprocess_option,
    quiet_option,
    samples_of,
    verbose_option,
)
from qcompiler.ir.errors import OptionError

if TYPE_CHECKING:
    from qcompiler.compare import Comparison
    from qcompiler.node_errors import NodeError
    from qcompiler.output_error import OutputError
    from qcompiler.recipe import Recipe

__all__ = ["compare_command"]

_MANY_OUTPUTS, _FIRST_OUTPUTS = 10, 6
"""Above so many outputs (a decoder's cache has 60) only the first are shown."""


@click.command("compare", cls=Command)
@click.argument("model", type=FILE, metavar="MODEL")
@click.argument("bundle", type=FILE, metavar="BUNDLE")
@click.option(
    "--data",
    type=FILE,
    metavar="DIR",
    required=True,
    help="Samples: a folder of .npz, .npy, test data or images, or module:function.",
)
@preprocess_option
@click.option("--labels", metavar="NAME", help="Array of the samples with the right classes.")
@click.option(
    "--native/--no-native",
    default=True,
    help="Run the bundle's kernels, or only its functions' bodies.",
)
@click.option(
    "--nodes",
    type=Count(min=0),
    default=8,
    show_default=True,
    metavar="N",
    help="List the N nodes that err most; 0 does not look inside.",
)
@click.option(
    "--metric",
    metavar="MODULE:FUNCTION",
    help="A figure of merit of your own: function(run, samples) -> number.",
)
@click.option(
    "--keep-worst",
    type=Count(min=1),
    metavar="N",
    help="Print a recipe that keeps the N worst nodes float, and nothing else.",
)
@quiet_option
@json_option
@verbose_option
@click.pass_obj
def compare_command(
    terminal: Terminal, model: Path, bundle: Path, data: Path, preprocess: str | None,
    labels: str | None, native: bool, nodes: int, metric: str | None, keep_worst: int | None,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run a model and its bundle on samples, and measure the difference."""
    with terminal.progress(shown=not (quiet or as_json)) as progress:
        from qcompiler.compare import compare

        found = compare(
            model, bundle, samples_of(data, preprocess), labels=labels, native=native,
            nodes=nodes > 0 or keep_worst is not None, metric=metric, progress=progress,
        )  # fmt: skip
    if keep_worst is not None:
        if (count := len(_keepable(found))) < keep_worst:
            terminal.warning(f"only {count} of its nodes err and could be kept float")
        recipe = _recipe(found, keep_worst)
        if as_json:
            terminal.json(recipe.to_dict())
        else:
            terminal.out.print(recipe.to_toml(), end="", highlight=False, soft_wrap=True)
        return
    if as_json:
        terminal.json(found.to_dict())
        return
    _show(terminal, found, nodes)
    _warn(terminal, found)


def _show(terminal: Terminal, found: Comparison, nodes: int) -> None:
    """Tables of the outputs and of the nodes that err most."""
    plural = "s" if found.samples > 1 else ""
    how = "" if found.native else ", function bodies only"
    terminal.out.print(Text.assemble(
        "\n", (str(found.model), "bold"), " → ", (str(found.bundle), "bold"),
        (f"  {found.samples} sample file{plural}{how}\n", "dim"),
    ))  # fmt: skip
    many = len(found.outputs) > _MANY_OUTPUTS and not terminal.verbose
    shown = _FIRST_OUTPUTS if many else len(found.outputs)
    terminal.out.print(_table(found.outputs[:shown]))
    if many:
        terminal.out.print(_rest(found.outputs[shown:]), style="dim")
    terminal.out.print()
    if found.metric is not None:
        before, after = found.metric.model, found.metric.bundle
        terminal.out.print(f"{found.metric.name}: {before:.6g} → {after:.6g}\n")
    if found.nodes:
        terminal.out.print(_worst(found.nodes, None if terminal.verbose else nodes))
        terminal.out.print(
            "\n--keep-worst N > recipe.toml keeps the N worst of them float (qcompile --recipe)\n",
            style="dim",
        )


def _worst(errors: Sequence[NodeError], count: int | None) -> FigureTable:
    """The nodes with the largest errors of their own, and what would take those away."""
    from qcompiler.node_errors import worst_first
    from qcompiler.report import op_in_words

    table = FigureTable("Node", "Op", ">Own\nSQNR", ">With those\nbefore it", "Remedy",
                        droppable=["Op"])  # fmt: skip
    for error in worst_first(errors)[:count]:
        table.add_row(error.node, op_in_words(error.op), _sqnr(error.own), _sqnr(error.total),
                      _remedy(error))  # fmt: skip
    return table


def _remedy(error: NodeError) -> str:
    """In a few words: what is done to the node itself need not name it again."""
    if error.can_stay_float and error.node != " + ".join(error.keep):
        more = f" and {len(error.keep) - 1} more" if len(error.keep) > 1 else ""
        return f"keep {error.keep[0]}{more} float"
    return "keep float" if error.can_stay_float else error.remedy


def _recipe(found: Comparison, count: int) -> Recipe:
    """The bundle's recipe, with its worst nodes kept float.

    Raises:
        OptionError: The other side is no bundle, or all of its nodes are exact.
    """
    from qcompiler.bundle import Manifest
    from qcompiler.recipe import Recipe

    recipe = Recipe.from_dict(Manifest.read(found.bundle).recipe)
    worst = _keepable(found)[:count]
    if not worst:
        raise OptionError(f"{found.bundle}: no node of it errs, so there is none to keep float")
    keep = [name for error in worst for name in error.keep]
    return dataclasses.replace(recipe, keep_float=tuple(dict.fromkeys([*recipe.keep_float, *keep])))


def _keepable(found: Comparison) -> list[NodeError]:
    from qcompiler.node_errors import worst_first

    return [error for error in worst_first(found.nodes) if error.can_stay_float]


def _sqnr(error: OutputError) -> str:
    return "equal" if error.sqnr is None else f"{error.sqnr:.1f} dB"


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
    cosine = "" if output.cosine is None else f"{output.cosine:.6f}"
    return [output.name, f"{output.values:,}", _sqnr(output), cosine, f"{output.max_error:.3g}"]


def _rest(outputs: Sequence[OutputError]) -> str:
    """The outputs that are not shown, on one line."""
    told = [(output.sqnr, output.name) for output in outputs if output.sqnr is not None]
    worst = f"worst SQNR {min(told)[0]:.1f} dB ({min(told)[1]})" if told else "all equal"
    return f"and {len(outputs)} more: {worst}; -v lists them"


def _warn(terminal: Terminal, found: Comparison) -> None:
    for output in found.outputs:
        if output.resized:
            terminal.warning(
                f"output {output.name!r} has another size on {output.resized} of {found.samples} "
                "samples, which are left out of its figures: how much it holds depends on values"
            )
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

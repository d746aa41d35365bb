"""`qcompile pass`: list the passes, or run some of them on an ONNX file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from click import get_current_context
from click.core import ParameterSource
from rich.text import Text

from qcompiler.cli.console import Terminal
from qcompiler.cli.debugging import Debugging, debugging_options
from qcompiler.cli.figures import FigureTable
from qcompiler.cli.options import (
    FILE,
    Command,
    TargetName,
    json_option,
    preprocess_option,
    samples_of,
    verbose_option,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcompiler.cli.progress import ProgressCallback
    from qcompiler.pipeline import Pipeline
    from qcompiler.samples import Samples
    from qcompiler.step import Watcher

__all__ = ["pass_command"]

_SAMPLED = (
    "choose-kernels", "equalize-layers", "smooth-activations", "split-outliers", "bias-correction",
    "keep-sensitive", "awq", "gptq", "insert-qdq", "convert-float16",
)  # fmt: skip
"""Passes that look at samples."""


@click.command("pass", cls=Command)
@click.argument("words", metavar="[PASSES] IN.onnx OUT.onnx", nargs=-1)
@click.option("--list", "listed", is_flag=True, help="List the passes in order, with options.")
@click.option(
    "--target", type=TargetName(), metavar="TARGET", help="For passes that depend on one."
)
@click.option(
    "--calib",
    type=FILE,
    metavar="DIR",
    help="Samples, for passes that measure, and for insert-qdq.",
)
@preprocess_option
@debugging_options
@json_option
@verbose_option
@click.pass_obj
def pass_command(
    terminal: Terminal, words: tuple[str, ...], listed: bool, target: str | None,
    calib: Path | None, preprocess: str | None, debugging: Debugging, as_json: bool,
) -> None:  # fmt: skip
    """List the passes, or run some of them on an ONNX file.

    PASSES is what --pipeline takes: names with commas between, as in canonicalize,fold-qdq.  A file
    that fold-qdq left takes only the passes after it, and a compiled model none.
    """
    if listed:
        _check_alone(words)
        _list(terminal, as_json)
        return
    text, source, output = _operands(words, debugging.pipeline)
    if preprocess is not None and calib is None:
        raise click.UsageError("--preprocess is about samples: add --calib")
    from qcompiler.destination import check_file, real_path

    output = check_file(real_path(output), source)
    pipeline = _pipeline(target, None if calib is None else samples_of(calib, preprocess))
    pipeline = pipeline.select(text, complete=target is not None)
    if target is None:
        pipeline.check_needs_no_target()
    if debugging.stage is not None:
        pipeline = pipeline.up_to(debugging.stage)
    if calib is not None and not any(step.name in _SAMPLED for step in pipeline):
        raise click.UsageError(f"none of these passes reads --calib; {', '.join(_SAMPLED)} do")
    with (
        debugging.watching(terminal, as_json) as watchers,
        terminal.progress(shown=not as_json) as progress,
    ):
        rows = _run(pipeline, source, output, watchers.all, progress)
    if as_json:
        terminal.json({"output": str(output), "passes": rows} | watchers.to_dict())
    else:
        _show(terminal, rows, output)


def _run(
    pipeline: Pipeline, source: Path, output: Path, watchers: Sequence[Watcher],
    progress: ProgressCallback,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run the passes on the file `source`; a row for each."""
    from qcompiler.frontend import load_model, source_is_blamed
    from qcompiler.model_file import save_model
    from qcompiler.progress import Clock
    from qcompiler.source import foreign_domains
    from qcompiler.watch import check_dumps

    check_dumps(watchers, source, output)
    rows, clock = list[dict[str, Any]](), Clock(progress)
    clock.total = len(pipeline.steps) + 2
    clock.start("load")
    model = load_model(source)
    _check_order(model, pipeline)
    count = _count_nodes(rows, model)
    with source_is_blamed(source, bool(foreign_domains(model))):
        model = pipeline.run(model, lambda step: clock.start(step.name), [count, *watchers])
    clock.start("write")
    save_model(model, output)
    return rows


def _show(terminal: Terminal, rows: Sequence[dict[str, Any]], output: Path) -> None:
    table = FigureTable("Pass", ">Nodes\nbefore", ">Nodes\nafter", "")
    for row in rows:
        note = "" if row["changed"] else Text("changed nothing", "yellow")
        table.add_row(row["pass"], str(row["nodes_before"]), str(row["nodes_after"]), note)
    terminal.out.print(table)
    terminal.out.print(f"\nWritten to {output}")


def _check_alone(words: Sequence[str]) -> None:
    """Refuse what `--list` would not heed.

    Raises:
        UsageError: Names the first of it.
    """
    if words:
        raise click.UsageError(f"--list takes no passes or files: leave out {words[0]}")
    context = get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and option.name not in ("listed", "as_json", "verbose"):
            name = max(option.opts, key=len)
            raise click.UsageError(f"--list lists all passes, whatever {name} says: leave that out")


def _operands(words: Sequence[str], pipeline: str | None) -> tuple[str, Path, Path]:
    """The passes as text, and both files.

    Raises:
        UsageError: Too few words, or too many.
    """
    if pipeline is not None:
        words = (pipeline, *words)
    if len(words) != 3:
        raise click.UsageError("give PASSES IN.onnx OUT.onnx, or --list")
    return words[0], Path(words[1]), Path(words[2])


def _check_order(model: ir.Model, pipeline: Pipeline) -> None:
    """Refuse passes that a model with ops of ours is beyond.

    Raises:
        ModelError: It was compiled, or a pass is one that comes before these ops.
    """
    from qcompiler.ir.stages import Stage
    from qcompiler.passes.bind_kernels import bound_domain
    from qcompiler.source import check_not_compiled

    if bound_domain(model) is not None or any(step.stage < Stage.KERNEL for step in pipeline):
        check_not_compiled(model)


def _list(terminal: Terminal, as_json: bool) -> None:
    from qcompiler.pass_docs import entries

    found = entries()
    if as_json:
        terminal.json({"passes": [dataclasses.asdict(entry) for entry in found]})
        return
    table = FigureTable("Pass", "Leaves", "Needs", "What it does")
    for entry in found:
        table.add_row(Text(entry.name, "bold"), entry.stage, entry.needs, entry.summary)
    terminal.out.print(table)
    options = FigureTable("Option", "Type", "Default", "What it is")
    for entry in found:
        for option in entry.options:
            name = Text.assemble((entry.name, "bold"), f"{{{option.name}}}")
            first_sentence = option.help.partition(". ")[0].removesuffix(".")
            options.add_row(name, option.type, option.default, f"{first_sentence}.")
    terminal.out.print()
    terminal.out.print(options)


def _pipeline(target: str | None, samples: Samples | None) -> Pipeline:
    """What a compilation runs, untimed; without a target some of its passes must not run."""
    from qcompiler.chooser import Chooser, Wishes
    from qcompiler.model_runs import ModelRuns
    from qcompiler.recipe import Recipe
    from qcompiler.targets.catalog import TARGETS, get_target

    goal = next(iter(TARGETS.values())) if target is None else get_target(target)
    chooser = Chooser(goal, Wishes(timing=False), samples, lambda text, share: None)
    runs = ModelRuns() if samples is None else ModelRuns.on(samples)
    return chooser.pipeline(Recipe(), runs)


def _count_nodes(rows: list[dict[str, Any]], model: ir.Model) -> Any:
    """A watcher that adds a row per pass."""
    from qcompiler.step import Step, Watcher

    class CountNodes(Watcher):
        def start(self, steps: Sequence[Step], model: ir.Model) -> None:
            self.count = _count(model)

        def after(self, step: Step, model: ir.Model, changed: bool) -> None:
            before, self.count = self.count, _count(model)
            rows.append({"pass": step.name, "changed": changed, "nodes_before": before,
                         "nodes_after": self.count})  # fmt: skip

    return CountNodes()


def _count(model: ir.Model) -> int:
    from qcompiler.ir.graph import every_node

    return sum(1 for _ in every_node(model.graph))

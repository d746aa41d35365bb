"""`qcompile pass`: list the passes, or run some of them on an ONNX file."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich.text import Text

from qcompiler.cli.console import Terminal
from qcompiler.cli.figures import FigureTable
from qcompiler.cli.options import FILE, TargetName, json_option, verbose_option
from qcompiler.ir.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcompiler.pipeline import Pipeline, Step

__all__ = ["pass_command"]

_INLINE_LIMIT = 1 << 30
"""Above this many bytes weights go into a file of their own: protobuf ends at 2 GiB."""


@dataclasses.dataclass(frozen=True)
class PassEntry:
    """A pass as it is listed."""

    name: str
    stage: str
    needs: str
    summary: str


@click.command("pass")
@click.argument("names", metavar="NAME[+NAME…]", required=False)
@click.argument("source", type=FILE, metavar="IN.onnx", required=False)
@click.argument("output", type=FILE, metavar="OUT.onnx", required=False)
@click.option("--list", "listed", is_flag=True, help="List the passes in order.")
@click.option(
    "--target", type=TargetName(), metavar="TARGET", help="For passes that depend on one."
)
@click.option("--calib", type=FILE, metavar="DIR", help="Samples, for insert-qdq.")
@json_option
@verbose_option
@click.pass_obj
def pass_command(
    terminal: Terminal, names: str | None, source: Path | None, output: Path | None, listed: bool,
    target: str | None, calib: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """List the passes, or run some of them on an ONNX file."""
    if listed:
        _list(terminal, as_json)
        return
    if names is None or source is None or output is None:
        raise click.UsageError("give NAME IN.onnx OUT.onnx, or --list")
    if output.exists() and output.samefile(source):
        raise OptionError(f"{output} is the input; name another file")
    steps = _chosen(names, target, calib)
    from qcompiler.frontend import load_model

    model = load_model(source)
    rows: list[dict[str, Any]] = []
    for step in steps:
        before = _count(model)
        result = step.apply(model)
        changed, model = result.modified, result.model
        rows.append({"pass": step.name, "changed": changed, "nodes_before": before,
                     "nodes_after": _count(model)})  # fmt: skip
    _save(model, output)
    if as_json:
        terminal.json({"output": str(output), "passes": rows})
        return
    table = FigureTable("Pass", ">Nodes\nbefore", ">Nodes\nafter", "")
    for row in rows:
        note = "" if row["changed"] else Text("changed nothing", "yellow")
        table.add_row(row["pass"], str(row["nodes_before"]), str(row["nodes_after"]), note)
    terminal.out.print(table)
    terminal.out.print(f"\nWritten to {output}")


def _list(terminal: Terminal, as_json: bool) -> None:
    entries = [_entry(step) for step in _pipeline(None, None)]
    if as_json:
        terminal.json({"passes": [dataclasses.asdict(entry) for entry in entries]})
        return
    table = FigureTable("Pass", "Leaves", "Needs", "What it does")
    for entry in entries:
        table.add_row(Text(entry.name, "bold"), entry.stage, entry.needs, entry.summary)
    terminal.out.print(table)


def _entry(step: Step) -> PassEntry:
    text = sys.modules[type(step.rewrite).__module__].__doc__ or type(step.rewrite).__doc__ or ""
    summary = text.strip().partition("\n\n")[0].replace("\n", " ")
    needs = {"": "", "target": "--target", "plans": "assign-precision"}[step.needs]
    return PassEntry(step.name, step.stage.name.lower(), needs, summary)


def _chosen(names: str, target: str | None, calib: Path | None) -> list[Step]:
    """The steps called `names`, each with all that it needs.

    Raises:
        OptionError: There is no such pass, or it needs something that was not given.
    """
    steps = {step.name: step for step in _pipeline(target, calib)}
    chosen = names.split("+")
    for index, name in enumerate(chosen):
        if name not in steps:
            hint = did_you_mean(name, steps) or f"; one of {', '.join(steps)}"
            raise OptionError(f"no pass {name!r}{hint}")
        needs = steps[name].needs
        if needs == "target" and target is None:
            raise OptionError(f"{name} depends on the target: add --target TARGET")
        if needs == "plans" and "assign-precision" not in chosen[:index]:
            raise OptionError(
                f"{name} needs the plans of assign-precision, which files do not hold; run both: "
                f"qcompile pass assign-precision+{name} … --target TARGET"
            )
    return [steps[name] for name in chosen]


def _pipeline(target: str | None, calib: Path | None) -> Pipeline:
    """The default pipeline; without a target some of its passes must not run."""
    from qcompiler.pipeline import Pipeline
    from qcompiler.targets.catalog import TARGETS, get_target

    goal = next(iter(TARGETS.values())) if target is None else get_target(target)
    if calib is None:
        return Pipeline.default(goal)
    from qcompiler.calibrate import observe
    from qcompiler.samples import Samples

    samples = Samples(calib)
    return Pipeline.default(goal, observe=lambda model, names: observe(model, names, samples))


def _count(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())


def _save(model: ir.Model, output: Path) -> None:
    import onnx_ir as ir

    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value]
    outside = any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
    if outside or sum(tensor.nbytes for tensor in tensors) > _INLINE_LIMIT:
        ir.save(model, output, external_data=f"{output.name}.data")
    else:
        ir.save(model, output)

"""What the passes are, read off their code: for `qcompile pass --list` and docs/passes.md.

`python -m qcompiler.pass_docs > docs/passes.md` writes the latter.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator

from qcompiler import pipeline_text
from qcompiler.chooser import Chooser, Wishes
from qcompiler.ir.stages import Stage
from qcompiler.model_runs import ModelRuns
from qcompiler.passes.options import PassOption, options_of
from qcompiler.recipe import Recipe
from qcompiler.step import Step
from qcompiler.targets.catalog import get_target

__all__ = ["PassEntry", "document", "entries"]

_NEEDS = {"": "", "target": "--target", "plans": "assign-precision"}

_INTRO = """\
# Passes

Written by `python -m qcompiler.pass_docs > docs/passes.md`: change the code instead.

In the order in which a compilation runs them, each with the stage in which it leaves the model
(see [design.md](design.md)).  A pass is an `onnx_ir` pass; `examples/custom_pass.py` adds one of
your own and a rewrite rule to a pipeline.  `qcompile pass NAMES IN.onnx OUT.onnx` runs some on a
file, `qcompile MODEL --target TARGET --pipeline NAMES` compiles with these only.  NAMES are written

"""


@dataclasses.dataclass(frozen=True)
class PassEntry:
    """A pass as it is listed.

    Attributes:
        name: What a pipeline calls it.
        stage: Where it leaves the model.
        needs: What has to be given or run before it.
        summary: One sentence.
        details: The rest of its module's docstring, with the rewrite equation.
        rounds: Whether it may change the numbers.
        options: What may be set.
    """

    name: str
    stage: str
    needs: str
    summary: str
    details: str
    rounds: bool
    options: tuple[PassOption, ...]


def entries() -> list[PassEntry]:
    """All passes, in order."""
    target = get_target("x86-int8")
    chooser = Chooser(target, Wishes(timing=False), None, lambda text, share: None)
    return [_entry(step) for step in chooser.pipeline(Recipe(), ModelRuns())]


def document() -> str:
    """The text of docs/passes.md."""
    syntax = (inspect.getdoc(pipeline_text) or "").partition("\n\n")[2]
    lines = [_INTRO + syntax]
    listed = entries()
    for stage in Stage:
        lines += ["", f"## Stage `{stage.name.lower()}`"]
        for entry in listed:
            if entry.stage == stage.name.lower():
                lines += _section(entry)
    return "\n".join(lines) + "\n"


def _entry(step: Step) -> PassEntry:
    written = inspect.getdoc(sys.modules[type(step.rewrite).__module__])
    summary, _, details = (written or inspect.getdoc(type(step.rewrite)) or "").partition("\n\n")
    return PassEntry(
        step.name, step.stage.name.lower(), _NEEDS[step.needs], " ".join(summary.split()), details,
        step.rounds, tuple(options_of(step.rewrite)),
    )  # fmt: skip


def _section(entry: PassEntry) -> Iterator[str]:
    yield from ("", f"### {entry.name}", "", entry.summary)
    facts = [f"Needs `{entry.needs}`."] if entry.needs else []
    facts += ["Rounds: the numbers change."] if entry.rounds else []
    if facts:
        yield from ("", "  ".join(facts))
    if entry.details:
        yield from ("", "```text", entry.details, "```")
    if entry.options:
        yield from ("", "| option | type | default | |", "|---|---|---|---|")
        for option in entry.options:
            cells = (f"`{option.name}`", option.type, option.default, option.help)
            yield f"| {' | '.join(cell.replace('|', ' or ') for cell in cells)} |"


if __name__ == "__main__":
    sys.stdout.write(document())

"""What was decided about each node, in words for people."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from qcompiler.cli.figures import FigureTable

if TYPE_CHECKING:
    from qcompiler.ir.decisions import Decision
    from qcompiler.report import Group

__all__ = ["decision_table", "every_decision"]

_WHO = {
    "kernel": ("our kernel", "green"),
    "qdq": ("ONNX Runtime, int8", "green"),
    "body": ("function body", "yellow"),
    "float": ("float", ""),
}

_IN_WORDS = {
    "outlined": "by itself",
    "folded, no kernel bound yet": "no kernel yet",
    "static pair at the border of integer ops": "on the way into or out of integer ops",
    "scores, softmax and context in one": "with its softmax, as one",
}
"""Reasons in the compiler's own language, and what they mean."""

_STEP = re.compile(r"(?P<op>\w*[a-z0-9])(?P<operands>[CRT]+)")
"""A step of a region's name with its operands: C one value per channel, T one per element, R one
per element of the last dimensions."""


def decision_table(groups: Iterable[Group]) -> FigureTable:
    """Nodes counted by who computes them and why; ops without weights on one line."""
    from qcompiler.ir.decisions import NO_WEIGHTS

    table = FigureTable(">Nodes", "Computed by", "Op", "Why")
    weightless = collections.Counter[str]()
    for group in groups:
        if group.action == "float" and group.why == NO_WEIGHTS:
            weightless[group.op] += group.count
            continue
        who, style = _WHO[group.action]
        table.add_row(
            str(group.count), Text(who, style), _op_in_words(group.op), _why_in_words(group.why)
        )
    if weightless:
        listed = ", ".join(f"{op} {count}" for op, count in weightless.most_common(6))
        more = f" and {len(weightless) - 6} more ops" if len(weightless) > 6 else ""
        why = Text(f"no weights to quantize: {listed}{more}", "dim")
        table.add_row(str(weightless.total()), "float", "others", why)
    return table


def every_decision(decisions: Sequence[Decision]) -> FigureTable:
    """One row per node."""
    table = FigureTable("Node", "Op", "Computed by", "Why")
    for decision in decisions:
        who, style = _WHO[decision.action]
        table.add_row(decision.node, decision.op, Text(who, style), _why_in_words(decision.why))
    return table


def _why_in_words(why: str) -> Text:
    return Text(_IN_WORDS.get(why, why), "dim")


def _op_in_words(op: str) -> str:
    """Of QMatMulW8A8 + AddC + AddT: "QMatMulW8A8 + Add per channel + Add"."""
    head, *steps = op.split(" + ")
    return " + ".join([head, *map(_step_in_words, steps)])


def _step_in_words(step: str) -> str:
    found = _STEP.fullmatch(step)
    if found is None:
        return step
    return found["op"] + (" per channel" if set(found["operands"]) == {"C"} else "")

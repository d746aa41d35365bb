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
    """Nodes counted by who computes them and why; ops without weights on a line or two."""
    from qcompiler.ir.decisions import MAY_OVERFLOW, NO_WEIGHTS

    table = FigureTable(">Nodes", "Computed by", "Op", "Why")
    headings = {
        f"{NO_WEIGHTS}; {MAY_OVERFLOW}": "float32, where float16 may overflow",
        NO_WEIGHTS: "no weights to quantize",
    }
    weightless = {why: collections.Counter[str]() for why in headings}
    for group in groups:
        if group.action == "float" and group.why in weightless:
            weightless[group.why][group.op] += group.count
            continue
        who, style = _WHO[group.action]
        table.add_row(
            str(group.count), Text(who, style), _op_in_words(group.op), _why_in_words(group.why)
        )
    for why, ops in weightless.items():
        if ops:
            listed = Text(f"{headings[why]}: {_most(ops)}", "dim")
            table.add_row(str(ops.total()), "float", "others", listed)
    return table


def _most(ops: collections.Counter[str]) -> str:
    listed = ", ".join(f"{op} {count}" for op, count in ops.most_common(6))
    return f"{listed} and {len(ops) - 6} more ops" if len(ops) > 6 else listed


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

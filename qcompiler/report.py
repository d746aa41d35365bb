"""What a compilation did, as data: for the closing table, `--json` and the manifest."""

from __future__ import annotations

import collections
import dataclasses
import re
from pathlib import Path
from typing import Any

from qcompiler.ir.decisions import MAY_OVERFLOW, Action, Decision

__all__ = ["Group", "Report", "op_in_words"]


@dataclasses.dataclass(frozen=True)
class Group:
    """Nodes of one op that were decided alike."""

    op: str
    action: Action
    why: str
    count: int


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one compilation.

    Attributes:
        bundle: The folder written; the file, if the compilation stopped after a stage.
        target: Target name.
        decisions: One per node of the final model.
        bytes_before: Model and external data as given.
        bytes_after: All files of the bundle.
        bytes_of_kernels: The library among them.
        seconds: Wall time per phase, in order.
        notes: What else the user should know, in sentences.
        peak_memory: Largest resident size of this process so far, in bytes.
        choices: Which kernel was chosen where and on what grounds, as in the manifest.
    """

    bundle: Path
    target: str
    decisions: tuple[Decision, ...] = dataclasses.field(repr=False)
    bytes_before: int
    bytes_after: int = 0
    bytes_of_kernels: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_memory: int = 0

    notes: tuple[str, ...] = ()
    choices: dict[str, Any] | None = dataclasses.field(default=None, repr=False)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know, in sentences."""
        if self.count("kernel", "body", "qdq") == 0:
            first = "nothing was quantized: the bundle runs in float like the original"
            return (first, *self.notes)
        lacking = [d.why for d in self.decisions if d.action == "body" and not d.expected]
        if self.count("kernel") == 0 and lacking:
            first = (
                f"{self.target} has no kernels of its own for this model: its {len(lacking)} "
                "quantized nodes run as ONNX Runtime runs their bodies "
                f"({collections.Counter(lacking).most_common(1)[0][0]})"
            )
            return (first, *self.notes)
        return self.notes

    def count(self, *actions: Action) -> int:
        """Nodes decided one of these ways."""
        return sum(decision.action in actions for decision in self.decisions)

    def groups(self) -> list[Group]:
        """Decisions counted by op, action and reason; kernels first, then by count."""
        alike = ((op_in_words(d.op), d.action, _why(d)) for d in self.decisions)
        keys = collections.Counter(alike)
        order = {"kernel": 0, "qdq": 1, "body": 2, "float": 3}
        groups = [Group(*key, count) for key, count in keys.items()]
        return sorted(groups, key=lambda g: (order[g.action], -g.count, g.op))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "bundle": str(self.bundle),
            "target": self.target,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_of_kernels": self.bytes_of_kernels,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_memory": self.peak_memory,
            "warnings": list(self.warnings),
            "groups": [dataclasses.asdict(group) for group in self.groups()],
            "choices": self.choices,
            "decisions": [dataclasses.asdict(decision) for decision in self.decisions],
        }


def op_in_words(op: str) -> str:
    """Regions of one anchor count together, whatever their sizes."""
    head, *rest = op.split("_")
    # Neither sizes nor widths of merged results, nor groups of heads, nor flags, nor the digest of
    # attributes.
    hidden = re.compile("[A-Zg][0-9]+|[0-9]+(x[0-9]+)+|[a-z]+|[0-9a-f]{6}")
    return " + ".join([head, *(part for part in rest if not hidden.fullmatch(part))])


def _why(decision: Decision) -> str:
    """Choices made on different times count together, and nodes whose notes have other figures."""
    why = decision.why
    if decision.note is not None:
        why = why.replace(f"; {decision.note}", "")
        if MAY_OVERFLOW in decision.note:
            why = f"{why}; {MAY_OVERFLOW}"
    return re.sub(r": \S+ us against .*", "", why)

"""Decisions are data: what was done to each node, and why, travels with the node.

The reason lies in the node's `metadata_props`, so it survives saving, shows in Netron, and the
report and the manifest only have to read it off the final graph.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import onnx_ir as ir

from qcompiler.ir.types import QuantSpec, QuantType

__all__ = [
    "NO_WEIGHTS",
    "Action",
    "Decision",
    "NodePlan",
    "decide",
    "decision_of",
    "decisions",
    "inherit",
    "plan_of",
    "set_plan",
]

Action = Literal["kernel", "body", "qdq", "float"]
"""Who computes a node: our kernel, its function's body in ORT, ORT's own quantized op, or float."""

NO_WEIGHTS = "holds no weights to quantize"
"""Why an op that nobody decided about stays float."""

_ACTION = "qcompiler.action"
_WHY = "qcompiler.why"
_PLAN = "qcompiler.plan"


@dataclasses.dataclass(frozen=True)
class Decision:
    """One node of the final graph: who computes it and why."""

    node: str
    op: str
    action: Action
    why: str


@dataclasses.dataclass(frozen=True)
class NodePlan:
    """How one node is to be quantized: an intent, before any Q or DQ exists.

    Attributes:
        weight: Type of the constant weight.
        activation: Its data input; None leaves it float (W4A16).
        output: Its result, for ops whose quantized form stores an integer result (Conv).
    """

    weight: QuantType
    activation: QuantSpec | None
    output: QuantSpec | None = None

    def __str__(self) -> str:
        parts = [f"weight {self.weight}"]
        if self.activation:
            parts.append(f"activation {self.activation}")
        return ", ".join(parts)


def set_plan(node: ir.Node, plan: NodePlan) -> None:
    """Attach a plan; passes read it back with `plan_of` until the node is folded."""
    node.meta[_PLAN] = plan


def plan_of(node: ir.Node) -> NodePlan | None:
    """The plan attached to `node`, if it is to be quantized."""
    plan: NodePlan | None = node.meta.get(_PLAN)
    return plan


def decide(node: ir.Node, action: Action, why: str) -> None:
    """Record what happens to `node`; a later decision replaces an earlier one."""
    node.metadata_props[_ACTION] = action
    node.metadata_props[_WHY] = why


def inherit(new: ir.Node, old: ir.Node) -> None:
    """Let `new`, which takes the place of `old`, keep its name, decision and plan."""
    new.name = old.name
    new.metadata_props.update(old.metadata_props)
    new.meta.update(old.meta)


def decision_of(node: ir.Node) -> Decision:
    """The decision recorded on a node; plain ops without one run in float as they came."""
    return Decision(
        node=node.name or "",
        op=node.op_type,
        action=node.metadata_props.get(_ACTION, "float"),  # type: ignore[arg-type]
        why=node.metadata_props.get(_WHY, NO_WEIGHTS),
    )


def decisions(model: ir.Model) -> list[Decision]:
    """The decision of every node of the graph and its subgraphs, in order."""
    return [decision_of(node) for node in model.graph.all_nodes()]

"""Decisions are data: what was done to each node, and why, travels with the node.

The reason lies in the node's `metadata_props`, so it survives saving, shows in Netron, and the
report and the manifest only have to read it off the final graph.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.graph import every_node
from qcompiler.ir.region import Region
from qcompiler.ir.types import QuantSpec, QuantType

__all__ = [
    "MAY_OVERFLOW",
    "NO_WEIGHTS",
    "Action",
    "Decision",
    "NodePlan",
    "OperandPlan",
    "Preference",
    "add_note",
    "bias_shift",
    "decide",
    "decision_of",
    "decisions",
    "drop_plan",
    "inherit",
    "is_kept_float",
    "keep_float",
    "leave_to_ort",
    "left_to_ort",
    "note_of",
    "operand_plan_of",
    "plan_of",
    "region_of",
    "set_bias_shift",
    "set_operand_plan",
    "set_plan",
    "set_region",
]

Action = Literal["kernel", "body", "qdq", "float"]
"""Who computes a node: our kernel, its function's body in ORT, ORT's own quantized op, or float."""

NO_WEIGHTS = "holds no weights to quantize"
"""Why an op that nobody decided about stays float."""

MAY_OVERFLOW = "float32: float16 may overflow"
"""Why a node stays in float32 where others do not; its note goes on with what it reached."""

_ACTION = "qcompiler.action"
_WHY = "qcompiler.why"
_UNEXPECTED = "qcompiler.unexpected"
_NOTE = "qcompiler.note"
_PLAN = "qcompiler.plan"
_OPERANDS = "qcompiler.operands"
_KEPT = "qcompiler.kept_float"
_REGION = "qcompiler.region"
_BIAS_SHIFT = "qcompiler.bias_shift"
_LEFT = "qcompiler.left_to_ort"


@dataclasses.dataclass(frozen=True)
class Decision:
    """One node of the final graph.

    Attributes:
        node: Its name.
        op: Its type.
        action: Who computes it.
        why: For people.
        expected: False where a user would have expected better: `--strict` refuses it.
        note: What passes added to the reason of this node alone, with its own figures; a part of
            `why`.
    """

    node: str
    op: str
    action: Action
    why: str
    expected: bool = True
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class NodePlan:
    """How one node is to be quantized: an intent, before any Q or DQ exists.

    Attributes:
        weight: Type of the constant weight.
        activation: Its data input; None leaves it float (W4A16).
        output: Its result, for ops whose quantized form stores an integer result (Conv).
        calibration: Where static ranges are cut off, as in a recipe; None as for all others.
        rounding: How the weight is rounded: "nearest", or by which passes.
        requested: A user asked for this precision here: it is not weighed against float.
    """

    weight: QuantType
    activation: QuantSpec | None
    output: QuantSpec | None = None
    calibration: str | None = None
    rounding: str = "nearest"
    requested: bool = False

    def __str__(self) -> str:
        parts = [f"weight {self.weight}"]
        if self.activation:
            parts.append(f"activation {self.activation}")
        if self.rounding != "nearest":
            parts.append(f"rounded by {self.rounding}")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class OperandPlan:
    """How a node without weights is to be quantized: an intent, before any Q or DQ exists.

    Attributes:
        operands: All its tensors of floats.
        output: Its result; None leaves it float.
    """

    operands: QuantSpec
    output: QuantSpec | None


def set_plan(node: ir.Node, plan: NodePlan) -> None:
    """Attach a plan; passes read it back with `plan_of` until the node is folded."""
    node.meta[_PLAN] = plan


def plan_of(node: ir.Node) -> NodePlan | None:
    """The plan attached to `node`, if it is to be quantized."""
    plan: NodePlan | None = node.meta.get(_PLAN)
    return plan


def set_operand_plan(node: ir.Node, plan: OperandPlan) -> None:
    """Attach a plan to a node without weights."""
    node.meta[_OPERANDS] = plan


def operand_plan_of(node: ir.Node) -> OperandPlan | None:
    """The plan attached to a node without weights, if it is to compute in integers."""
    plan: OperandPlan | None = node.meta.get(_OPERANDS)
    return plan


def drop_plan(node: ir.Node) -> None:
    """Take the plan back, of either kind: the node is not quantized after all."""
    node.meta.pop(_PLAN, None)
    node.meta.pop(_OPERANDS, None)
    _, note = node.meta.pop(_BIAS_SHIFT, (None, None))
    if note is not None:
        _take_back(node, note)


def keep_float(node: ir.Node, why: str) -> None:
    """Decide that a node stays float, whatever later passes would gain by planning it."""
    drop_plan(node)
    node.meta[_KEPT] = True
    decide(node, "float", why)


def is_kept_float(node: ir.Node) -> bool:
    """Whether somebody decided that the node stays float."""
    return bool(node.meta.get(_KEPT))


def set_bias_shift(node: ir.Node, shift: NDArray[np.float32], note: str) -> None:
    """Plan that rounding takes `shift`, [C], from the bias of `node`.  The note goes with it."""
    node.meta[_BIAS_SHIFT] = shift, note
    add_note(node, note)


def bias_shift(node: ir.Node) -> NDArray[np.float32] | None:
    """What is to be taken from the bias of `node` when it is rounded, if anything."""
    shift: NDArray[np.float32] | None = node.meta.get(_BIAS_SHIFT, (None,))[0]
    return shift


def leave_to_ort(node: ir.Node, why: str) -> None:
    """Ask that no kernel of ours computes `node`, which is quantized all the same."""
    node.meta[_LEFT] = why


def left_to_ort(node: ir.Node) -> str | None:
    """Why no kernel of ours is to compute `node`, None where one may."""
    why: str | None = node.meta.get(_LEFT)
    return why


def set_region(node: ir.Node, region: Region) -> None:
    """Say what an outlined node computes; it survives saving."""
    node.metadata_props[_REGION] = region.to_json()


def region_of(node: ir.Node) -> Region | None:
    """What an outlined node computes, None for all others."""
    text = node.metadata_props.get(_REGION)
    return None if text is None else Region.from_json(text)


class Preference(str):
    """A reason that weighed what could be had, and so is no lack: `--strict` accepts it."""

    __slots__ = ()


def decide(node: ir.Node, action: Action, why: str, *, expected: bool | None = None) -> None:
    """Record what happens to `node`; a later decision replaces an earlier one.

    Args:
        node: Where it is recorded.
        action: Who computes it.
        why: The reason.
        expected: See `Decision`; by default all but "body" is, and that too by `Preference`.
    """
    if expected is None:
        expected = action != "body" or isinstance(why, Preference)
    node.metadata_props[_ACTION] = action
    # Of several notes some may be in the reason already.
    notes = (note_of(node) or "").split("; ")
    node.metadata_props[_WHY] = "; ".join([why, *(note for note in notes if note not in why)])
    if expected:
        node.metadata_props.pop(_UNEXPECTED, None)
    else:
        node.metadata_props[_UNEXPECTED] = "true"


def add_note(node: ir.Node, text: str) -> None:
    """Add `text` to the reason of `node`, and to every later reason of what takes its place."""
    decision, earlier = decision_of(node), note_of(node)
    if earlier is not None and text in earlier:
        return
    node.metadata_props[_NOTE] = text if earlier is None else f"{earlier}; {text}"
    decide(node, decision.action, decision.why, expected=decision.expected)


def _take_back(node: ir.Node, text: str) -> None:
    """Undo `add_note`."""
    for key in (_NOTE, _WHY):
        parts = node.metadata_props.pop(key, "").split("; ")
        if kept := [part for part in parts if part not in (text, "")]:
            node.metadata_props[key] = "; ".join(kept)


def note_of(node: ir.Node) -> str | None:
    """What `add_note` added to a node, or to the one whose place it took."""
    return node.metadata_props.get(_NOTE)


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
        expected=_UNEXPECTED not in node.metadata_props,
        note=note_of(node),
    )


def decisions(model: ir.Model) -> list[Decision]:
    """The decision of every node of the graph and its subgraphs, in order."""
    return [decision_of(node) for node in every_node(model.graph)]

"""Which ops that only move elements had better move integers.

    y = MaxPool(DQ(Q(x)))   =>   y = DQ(Q(MaxPool(DQ(Q(x))))), both with the scale of x

Part of `insert_qdq`, on what integer ops make.  The second pair changes no number, and ORT computes
what lies between the two in integers.  Where floats are read further down, a minimum cut says where
the fewest bytes are converted: after a MaxPool of 2x2, a quarter of those before it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import onnx_ir as ir

from qcompiler.ir.border import Crossing, bytes_of, cheapest_inside

__all__ = ["integer_movers"]

_MOVERS = frozenset({"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})
"""Exact on integers of one scale, and dropped between Q and DQ by ORT."""


def integer_movers(
    made: Mapping[ir.Value, ir.Node], planned: Collection[ir.Node]
) -> dict[ir.Value, ir.Value]:
    """What movers of integers make, each with the value it is moved from; in order.

    Args:
        made: The results of integer ops, with their makers.
        planned: The ops that read integers as their first input.
    """
    makers, moved = dict(made), dict[ir.Value, ir.Value]()
    waiting = list(made)
    for value in waiting:
        for node in dict.fromkeys(use.node for use in value.uses()):
            if _moves(node, value) and node.outputs[0] not in makers:
                makers[node.outputs[0]] = node
                moved[node.outputs[0]] = value
                waiting.append(node.outputs[0])
    # Of two equal places the border takes the one nearer to its maker.
    costs = {makers[value]: (1.0, 0.0) for value in moved}
    costs |= {node: (0.0, math.inf) for node in (*made.values(), *planned)}
    crossings = [
        Crossing(maker, _readers(value, costs), bytes_of(value)) for value, maker in makers.items()
    ]
    inside = cheapest_inside(costs, crossings)
    return {value: source for value, source in moved.items() if makers[value] in inside}


def _moves(node: ir.Node, value: ir.Value) -> bool:
    return (
        node.op_type in _MOVERS
        and node.domain == ""
        and node.inputs[0] is value
        and node.graph is value.graph
        and not node.outputs[0].is_graph_output()
        and all(not output.uses() for output in node.outputs[1:])
    )


def _readers(value: ir.Value, known: Collection[ir.Node]) -> list[ir.Node | None]:
    """Who may read it as integers; None for those who read floats."""
    uses = [use.node if use.idx == 0 and use.node in known else None for use in value.uses()]
    return list(dict.fromkeys([*uses, None] if value.is_graph_output() else uses))

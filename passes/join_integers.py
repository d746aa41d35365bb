"""Let ops between convolutions hand on integers where that saves conversions.

    y = Add(a, b), between a Conv that makes a and one that reads y   =>   the same, with a plan

Whose results are float by nature, and whose are integers, is settled when this runs; of what lies
between (`integer_links`) a minimum cut says who had better compute in integers: where the fewest
bytes are converted.  Of two equal places the border takes the one nearer to the makers, so that no
result is rounded to no purpose.

A MatMul that quantizes each of its tokens while it runs reads the integers as they are, if its
input is one of theirs by then: that adds no error, and there is nothing left to compute.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from qcompiler.ir.border import Crossing, bytes_of, cheapest_inside
from qcompiler.ir.decisions import (
    NO_WEIGHTS,
    NodePlan,
    OperandPlan,
    decide,
    drop_plan,
    operand_plan_of,
    plan_of,
    set_operand_plan,
    set_plan,
)
from qcompiler.ir.graph import rectified
from qcompiler.ir.types import QuantSpec
from qcompiler.passes.integer_links import Link, link_of
from qcompiler.passes.left_to_ort import FUSED_BY_ORT

__all__ = ["JoinIntegers", "links_of"]

_NODE = 16_000
"""What a Q or DQ costs beside its bytes, in bytes: half a microsecond."""

Links = Mapping[ir.Node, Link]


class JoinIntegers(ir.passes.InPlacePass):
    """Attach an `OperandPlan` to each node that is to hand on integers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Plan nodes of the main graph; those of branches have no static ranges."""
        static = {
            node: plan
            for node in model.graph
            if (plan := plan_of(node)) and plan.activation and plan.activation.scale == "static"
        }
        specs = [plan.output for plan in static.values() if plan.output is not None]
        if not specs:
            return ir.passes.PassResult(model, False)
        links = links_of(model.graph)
        stale = [node for node in links if operand_plan_of(node) is not None]
        heads = [node for node in model.graph if _quantizes_tokens(node)]
        inside = _inside(static, links, heads)
        changed = False
        for node in stale:
            if node not in inside:
                drop_plan(node)
                decide(node, "float", NO_WEIGHTS)
                changed = True
        made = {rectified(n.outputs[0]) for n, plan in static.items() if plan.output}
        for node, link in links.items():
            if node in inside:
                changed |= _plan(node, specs[0])
                made.update(link.results)
        for node in heads:
            if node.inputs[0] in made:
                _read_integers(node, specs[0])
                changed = True
        return ir.passes.PassResult(model, changed)


def links_of(graph: ir.Graph) -> dict[ir.Node, Link]:
    """The nodes of a graph that could hand on integers, in order."""
    return {node: link for node in graph if (link := link_of(node)) is not None}


def _quantizes_tokens(node: ir.Node) -> bool:
    """Whether a MatMul is to quantize each token by itself, and could take what it is given."""
    plan = plan_of(node)
    if plan is None or plan.activation is None or plan.activation.scale != "dynamic":
        return False
    return node.op_type == "MatMul" and plan.weight.storage is ir.DataType.INT8


def _inside(
    static: Mapping[ir.Node, NodePlan], links: Links, heads: Iterable[ir.Node]
) -> set[ir.Node]:
    """Who computes in integers: all of `static`, and the others where that saves conversions."""
    makers = {rectified(node.outputs[0]): node for node, plan in static.items() if plan.output}
    makers |= {value: node for node, link in links.items() for value in link.results}
    read = {node: {node.inputs[0]} for node in static}
    read |= {node: {node.inputs[0]} for node in heads}
    read |= {node: set(link.operands) for node, link in links.items()}
    costs = dict.fromkeys(static, (0.0, math.inf)) | dict.fromkeys(heads, (0.0, 0.0))
    costs |= dict.fromkeys(links, (1.0, 0.0))
    crossings = []
    for value in dict.fromkeys([*makers, *(v for values in read.values() for v in values if v)]):
        readers: list[ir.Node | None] = [
            use.node if value in read.get(use.node, ()) and _is_data(use.node, use.idx) else None
            for use in value.uses()
        ]
        readers += [None] if value.is_graph_output() else []
        cost = bytes_of(value) + _NODE
        crossings.append(Crossing(makers.get(value), list(dict.fromkeys(readers)), cost))
    return cheapest_inside(costs, crossings)


def _is_data(node: ir.Node, index: int) -> bool:
    """Whether a node reads its data there, not a weight."""
    return index == 0 or plan_of(node) is None


def _plan(node: ir.Node, spec: QuantSpec) -> bool:
    plan = OperandPlan(spec, spec)
    changed = operand_plan_of(node) != plan
    set_operand_plan(node, plan)
    op = FUSED_BY_ORT.get(node.op_type)
    how = f"ORT's own {op}" if op else "in integers, as the ops around it"
    decide(node, "qdq", f"between integer ops: {how}")
    return changed


def _read_integers(node: ir.Node, spec: QuantSpec) -> None:
    """Let a product that would quantize tokens take the integers that are there."""
    plan = plan_of(node)
    assert plan is not None
    plan = dataclasses.replace(plan, activation=spec)
    set_plan(node, plan)
    decide(node, "qdq", f"{plan}: its input is integers already")

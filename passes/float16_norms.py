"""Means of squares, which stay in float32: x up to what is divided by them.

    Div(x, Sqrt(Add(ReduceMean(Pow(x, 2)), epsilon)))

Squares leave the range of float16 where x does not.  Part of `convert_float16`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from qcompiler.ir.graph import constant
from qcompiler.passes.match_norms import Norm, match_norm

__all__ = ["norms_in_float32"]

_TO_ROOT = frozenset({
    "Add", "Clip", "Div", "Expand", "Max", "Mul", "Pow", "Reciprocal", "Reshape", "Sqrt",
    "Unsqueeze",
})  # fmt: skip


def norms_in_float32(nodes: Sequence[ir.Node]) -> dict[ir.Node, str]:
    """The nodes that stay, and why."""
    kept: dict[ir.Node, str] = {}
    for node in nodes:
        norm = match_norm(node)
        if isinstance(norm, Norm) and len(norm.nodes) > 1:
            kept.update(dict.fromkeys(norm.nodes, "float32: a part of RMSNorm"))
        elif (pieces := _mean_of_squares(node)) is not None:
            pieces += list(_up_to_division(node))
            kept.update(dict.fromkeys(pieces, f"float32: {node.op_type} of squares"))
    return kept


def _mean_of_squares(node: ir.Node) -> list[ir.Node] | None:
    """The nodes that make the squares `node` sums, and it; None if it sums none."""
    if node.domain != "":
        return None
    if node.op_type in ("ReduceL2", "ReduceSumSquare"):
        return [node]
    if node.op_type not in ("ReduceMean", "ReduceSum"):
        return None
    square = _maker(node, 0)
    if square is None or square.domain != "" or len(square.inputs) != 2:
        return None
    power = constant(square.inputs[1])
    is_pow = square.op_type == "Pow" and power is not None and power.size == 1 and power == 2
    if not is_pow and not (square.op_type == "Mul" and square.inputs[0] is square.inputs[1]):
        return None
    pieces = [square, node]
    centred = _maker(square, 0)
    if centred is not None and centred.op_type == "Sub":
        mean = _maker(centred, 1)
        if mean is not None and mean.op_type == "ReduceMean":
            pieces += [mean, centred]
    return pieces


def _up_to_division(node: ir.Node) -> Iterator[ir.Node]:
    """What makes a root of the sum, and multiplies or divides by it."""
    found, seen = [node.outputs[0]], {node}
    for value in found:
        for reader in dict.fromkeys(use.node for use in value.uses()):
            if reader.domain != "" or reader.op_type not in _TO_ROOT or reader in seen:
                continue
            seen.add(reader)
            others = [v for v in reader.inputs if v is not None and v is not value]
            joins = any(v.dtype is ir.DataType.FLOAT and constant(v) is None for v in others)
            yield reader
            if not joins:
                found.append(reader.outputs[0])


def _maker(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index]
    return None if value is None else value.producer()

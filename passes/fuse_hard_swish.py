"""Gather the pieces of HardSwish into one op.

    Div(Mul(x, Clip(Add(x, 3), 0, 6)), 6)   =>   HardSwish(x)
    Mul(x, Div(Clip(Add(x, 3), 0, 6), 6))   =>   HardSwish(x)
    Mul(x, HardSigmoid(x))                  =>   HardSwish(x)       alpha = 1/6, beta = 1/2

in any operand order; dividing by 6 may also be multiplying by 1/6.  As floats that is one pass over
the data instead of four; as integers two ops of ONNX Runtime's (see `integer_links`), and no range
of its own for each piece.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import constant, every_node, only_consumer, replace_nodes

__all__ = ["FuseHardSwish"]


class FuseHardSwish(ir.passes.InPlacePass):
    """Replace the pieces of a HardSwish by the op (opset 14)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every match."""
        gates = [
            node for node in every_node(model.graph) if node.op_type in ("Clip", "HardSigmoid")
        ]
        fused = sum(_try_fuse(gate) for gate in gates)
        return ir.passes.PassResult(model, fused > 0)


def _try_fuse(gate: ir.Node) -> bool:
    """Fuse the HardSwish whose gate this is."""
    if gate.domain:
        return False
    if gate.op_type == "HardSigmoid":
        alpha, beta = (gate.attributes.get_float(n, d) for n, d in (("alpha", 0.2), ("beta", 0.5)))
        x, covered, sixth = gate.inputs[0], [gate], False
        if not (np.isclose(alpha, 1 / 6, rtol=1e-4) and beta == 0.5):
            return False
    else:
        added = gate.inputs[0].producer() if gate.inputs[0] is not None else None
        bounds = [constant(value) for value in gate.inputs[1:3]]
        if len(bounds) < 2 or not (_is_number(bounds[0], 0) and _is_number(bounds[1], 6)):
            return False
        x = _other_than(added, "Add", 3)
        if added is None or x is None or only_consumer(added.outputs[0]) is not gate:
            return False
        covered, sixth = [added, gate], True
    return x is not None and _try_gather(x, covered, sixth)


def _try_gather(x: ir.Value, covered: list[ir.Node], sixth: bool) -> bool:
    """Follow what becomes of the gate: it is multiplied by x, and if `sixth` divided by 6."""
    multiplied = False
    while sixth or not multiplied:
        last = covered[-1].outputs[0]
        node = only_consumer(last)
        if node is None or node.domain or node.graph is not covered[0].graph:
            return False
        if not multiplied and node.op_type == "Mul" and _operands(node) == {x, last}:
            multiplied = True
        elif sixth and last in (_other_than(node, "Div", 6), _other_than(node, "Mul", 1 / 6)):
            sixth = False
        else:
            return False
        covered.append(node)
    if any(node.outputs[0].is_graph_output() for node in covered[:-1]):
        return False
    new = ir.node("HardSwish", [x], name=covered[-1].name)
    replace_nodes(covered, [new])
    return True


def _operands(node: ir.Node) -> set[ir.Value | None]:
    return set(node.inputs)


def _other_than(node: ir.Node | None, op: str, number: float) -> ir.Value | None:
    """The tensor that `node`, an `op`, has beside a constant number."""
    if node is None or node.op_type != op or node.domain or len(node.inputs) != 2:
        return None
    left, right = node.inputs
    if _is_number(constant(right), number):
        return left
    return right if op != "Div" and _is_number(constant(left), number) else None


def _is_number(array: object, number: float) -> bool:
    return (
        isinstance(array, np.ndarray)
        and array.size == 1
        and array.ndim <= 1
        and bool(np.isclose(float(array.item()), number, rtol=1e-4))
    )

"""Gather the pieces of a GELU into one op.

    Mul(x, Mul(0.5, Add(Erf(Div(x, sqrt 2)), 1)))   =>   Gelu(x)
    Mul(Mul(x, Add(Erf(Div(x, sqrt 2)), 1)), 0.5)   =>   Gelu(x)
    Mul(Mul(x, 0.5), Add(Erf(Div(x, sqrt 2)), 1))   =>   Gelu(x)

in any operand order; `Div(x, sqrt 2)` may also be `Mul(x, 1 / sqrt 2)`.  So is the one with tanh,
`Gelu<approximate = "tanh">`, in every spelling (`match_tanh_gelu`).  Between Q and DQ these pieces
could not be found again, so this runs before any are inserted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import constant, every_node, only_consumer, replace_nodes
from qcompiler.passes.match_tanh_gelu import match_tanh_gelu

__all__ = ["FuseGelu"]


_ROUNDED = 2e-4
"""So far from their numbers the constants of a model in float16 are."""


class FuseGelu(ir.passes.InPlacePass):
    """Replace a GELU, exact or approximated by tanh, by `Gelu` (opset 20)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every match."""
        fused = 0
        for node in list(every_node(model.graph)):
            if node.op_type == "Erf":
                fused += _try_fuse(node)
            elif node.op_type == "Tanh" and (match := match_tanh_gelu(node)) is not None:
                x, covered = match
                fused += _replace(covered, covered[-1], x, approximate="tanh")
        return ir.passes.PassResult(model, fused > 0)


def _try_fuse(erf: ir.Node) -> bool:
    scaled = erf.inputs[0].producer() if erf.inputs[0] is not None else None
    x = _divided_by_sqrt2(scaled)
    plus_one = only_consumer(erf.outputs[0])
    if scaled is None or x is None or not _is_scalar_op(plus_one, "Add", 1.0):
        return False
    assert plus_one is not None
    covered, factors, last = [scaled, erf, plus_one], {"x", "half"}, plus_one
    while factors:
        product = only_consumer(last.outputs[0])
        if product is None or product.op_type != "Mul":
            return False
        other = next((value for value in product.inputs if value is not last.outputs[0]), None)
        taken = _factor(other, x)
        if taken is None or not taken <= factors:
            return False
        if taken == {"x", "half"} and other is not None:
            halved = other.producer()
            assert halved is not None
            covered.append(halved)
        factors -= taken
        covered.append(product)
        last = product
    return _replace(covered, last, x)


def _factor(value: ir.Value | None, x: ir.Value) -> set[str] | None:
    """Which of the factors `x` and 0.5 a value stands for."""
    if value is x:
        return {"x"}
    if _is_scalar(value, 0.5):
        return {"half"}
    product = value.producer() if value is not None else None
    if product is not None and _is_scalar_op(product, "Mul", 0.5) and x in product.inputs:
        return {"x", "half"}
    return None


def _replace(covered: list[ir.Node], last: ir.Node, x: ir.Value, **attributes: str) -> bool:
    inner = {value for node in covered for value in node.outputs} - set(last.outputs)
    if any(value.is_graph_output() for value in inner):
        return False
    new = ir.node("Gelu", [x], attributes, name=last.name)
    read = list(last.inputs)
    # Only the last node is removed here: `x * 0.5` or `x / sqrt 2` may have other readers.
    replace_nodes([last], [new])
    _remove_unread(read, x)
    return True


def _remove_unread(values: Sequence[ir.Value | None], x: ir.Value) -> None:
    """Remove what made values that nobody reads now, back to `x`."""
    for value in values:
        node = value.producer() if value is not None and value is not x else None
        if node is None or node.graph is None or any(output.uses() for output in node.outputs):
            continue
        if not any(output.is_graph_output() for output in node.outputs):
            read = list(node.inputs)
            node.graph.remove(node, safe=True)
            _remove_unread(read, x)


def _divided_by_sqrt2(node: ir.Node | None) -> ir.Value | None:
    if _is_scalar_op(node, "Div", math.sqrt(2.0)):
        assert node is not None
        return node.inputs[0]
    if _is_scalar_op(node, "Mul", math.sqrt(0.5)):
        assert node is not None
        return next(value for value in node.inputs if constant(value) is None)
    return None


def _is_scalar_op(node: ir.Node | None, op: str, number: float) -> bool:
    """Whether `node` is `op` of a tensor and the constant `number`."""
    if node is None or node.op_type != op or node.domain != "":
        return False
    constants = [value for value in node.inputs if constant(value) is not None]
    return (
        len(constants) == 1
        and _is_scalar(constants[0], number)
        and (op != "Div" or node.inputs[1] is constants[0])
    )


def _is_scalar(value: ir.Value | None, number: float) -> bool:
    array = constant(value)
    return (
        array is not None
        and array.ndim == 0
        and bool(np.isclose(np.asarray(array, np.float64).item(), number, rtol=_ROUNDED))
    )

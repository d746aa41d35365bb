"""Gather the pieces of a LayerNormalization, as exporters wrote them before opset 17, into one op.

    d = Sub(x, ReduceMean(x, -1));  Add(Mul(Div(d, Sqrt(mean(d^2) + epsilon)), gamma), beta)
        =>   LayerNormalization(x, gamma, beta)

with `d / Sqrt(...)` in every spelling that `match_norms` knows, operands in any order, and without
beta where nothing is added.  ONNX Runtime would gather them too, but only between ops of its own:
once a product beside them is ours, and what they make is quantized, nobody finds them again.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.graph import constant, every_node, only_consumer, remove_unread, replace_nodes
from qcompiler.passes.match_norms import Norm, is_mean_over_last_axis, match_norm

__all__ = ["FuseLayerNorm"]


class FuseLayerNorm(ir.passes.InPlacePass):
    """Replace a spelled out norm of centred values by `LayerNormalization` (opset 17)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every match."""
        products = [node for node in every_node(model.graph) if node.op_type == "Mul"]
        fused = sum(_try_fuse(product) for product in products)
        if fused:  # x less its mean may have other readers: that is known at the end
            remove_unread(model.graph)
        return ir.passes.PassResult(model, fused > 0)


def _try_fuse(scaled: ir.Node) -> bool:
    norm = match_norm(scaled)
    if not isinstance(norm, Norm):
        return False
    x = _centred(norm.x)
    if x is None or x.dtype is not ir.DataType.FLOAT:
        return False
    last, beta = _beta(scaled, norm.depth)
    new = ir.node(
        "LayerNormalization",
        [x, norm.gamma, *([beta] if beta is not None else [])],
        {"axis": -1, "epsilon": norm.epsilon},
        name=last.name,
    )
    replace_nodes([last], [new])
    return True


def _centred(value: ir.Value) -> ir.Value | None:
    """X, where `value` is x less the mean of its last axis."""
    difference = value.producer()
    if difference is None or difference.domain or difference.op_type != "Sub":
        return None
    x, subtracted = difference.inputs
    mean = subtracted.producer() if subtracted is not None else None
    if x is None or mean is None or mean.domain or mean.op_type != "ReduceMean":
        return None
    return x if mean.inputs[0] is x and is_mean_over_last_axis(mean, x) else None


def _beta(scaled: ir.Node, depth: int) -> tuple[ir.Node, ir.Value | None]:
    """What ends the norm, and the bias per channel if that is an Add of one."""
    total = only_consumer(scaled.outputs[0])
    if total is None or total.domain or total.op_type != "Add":
        return scaled, None
    for beta in total.inputs:
        array = constant(beta)
        if array is not None and array.shape == (depth,):
            return total, beta
    return scaled, None

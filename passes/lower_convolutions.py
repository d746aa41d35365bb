"""Bring what surrounds planned convolutions into forms that ONNX Runtime has integer kernels for.

1. Conv(x, W)  auto_pad    =>   Conv(x, W)  pads                           where sizes are known
2. ConvTranspose(x, W)     =>   DepthToSpace(Conv(x, W'))                  both strides alike
                                (cut at its ends by a Slice)
3. ReduceMean(x)           =>   Squeeze(GlobalAveragePool(x))              over all spatial axes

For 2 see `sub_pixel`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import NO_WEIGHTS, decide, inherit, plan_of, set_plan
from qcompiler.ir.graph import constant, drop_if_unread, every_node, new_initializer, replace_nodes
from qcompiler.ir.types import PerAxis
from qcompiler.passes.conv_pads import explicit_pads
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.passes.sub_pixel import convolution_of, phases, phases_of

__all__ = ["LowerConvolutions"]


class LowerConvolutions(ir.passes.InPlacePass):
    """Rewrite planned convolutions, and means that may lie between them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; nothing if no convolution is planned."""
        nodes = list(every_node(model.graph))
        planned = [node for node in nodes if node.op_type in ("Conv", "ConvTranspose")]
        planned = [node for node in planned if plan_of(node) is not None]
        changed = 0
        for node in planned:
            lower = _lower_transposed if node.op_type == "ConvTranspose" else _pad_explicitly
            changed += lower(model.graph, node)
        if planned:
            means = [node for node in model.graph if node.op_type == "ReduceMean"]
            changed += sum(_try_pool(model.graph, node) for node in means)
        if changed:
            FixNames()(model)
            InferShapes()(model)
        return ir.passes.PassResult(model, changed > 0)


def _pad_explicitly(graph: ir.Graph, conv: ir.Node) -> bool:
    weight = constant(conv.inputs[1])
    assert weight is not None  # it has a plan
    if conv.attributes.get_string("auto_pad", "NOTSET") == "NOTSET":
        return False
    pads = explicit_pads(conv, weight.shape[2:])
    if pads is None:
        return False
    del conv.attributes["auto_pad"]
    conv.attributes["pads"] = ir.AttrInt64s("pads", pads)
    return True


def _lower_transposed(graph: ir.Graph, node: ir.Node) -> bool:
    plan, old = plan_of(node), list(node.inputs[1:])
    assert plan is not None
    weight = _array(node.inputs[1])
    arrays = {"weight": phases_of(node, weight)}
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        arrays["bias"] = np.repeat(_array(node.inputs[2]), phases(node))
    operands = [new_initializer(graph, f"{node.name}_{stem}", a) for stem, a in arrays.items()]
    chain = convolution_of(graph, node, operands, weight.shape)
    set_plan(chain[0], dataclasses.replace(plan, weight=dataclasses.replace(
        plan.weight, granularity=PerAxis(0))))  # fmt: skip
    replace_nodes([node], chain)
    for value in old:
        if value is not None:
            drop_if_unread(value)
    return True


def _array(value: ir.Value | None) -> NDArray[np.float32]:
    array = constant(value)
    assert array is not None  # see assign_precision
    return np.asarray(array, np.float32)


def _try_pool(graph: ir.Graph, node: ir.Node) -> bool:
    """GlobalAveragePool for a mean over all axes but the first two."""
    x, axes = node.inputs[0], constant(node.inputs[1]) if len(node.inputs) > 1 else None
    rank = len(x.shape) if x is not None and x.shape is not None else 0
    # Over the last of three axes it is mostly part of a norm, which is found by its pieces later.
    if axes is None or rank < 4 or node.domain or sorted(axes % rank) != list(range(2, rank)):
        return False
    pool = ir.node("GlobalAveragePool", [x])
    inherit(pool, node)
    decide(pool, "float", NO_WEIGHTS)
    chain = [pool]
    if not node.attributes.get_int("keepdims", 1):
        pool.outputs[0].name, pool.outputs[0].type = f"{node.name}_pooled", node.outputs[0].type
        given = new_initializer(graph, f"{node.name}_axes", np.arange(2, rank))
        squeeze = ir.node("Squeeze", [pool.outputs[0], given], name=f"{node.name}_squeeze")
        chain.append(squeeze)
    old = node.inputs[1]
    replace_nodes([node], chain)
    if old is not None:
        drop_if_unread(old)
    return True

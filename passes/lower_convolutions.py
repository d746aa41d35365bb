"""Bring what surrounds planned convolutions into forms that ONNX Runtime has integer kernels for.

1. Conv(x, W)  auto_pad    =>   Conv(x, W)  pads                           where sizes are known
2. ConvTranspose(x, W)     =>   DepthToSpace(Conv(x, W'))                  kernel a multiple of the
                                (cut at its ends by a Slice)               stride, both axes alike
3. ReduceMean(x)           =>   Squeeze(GlobalAveragePool(x))              over all spatial axes

2 is a sub-pixel convolution (Shi et al., 2016).  With strides of s and kernels of s T, element
s q + r of a transposed convolution is the sum over t of x[q - t] W[r + s t]: a convolution of T
taps for each of the s s phases r, that DepthToSpace puts in their places.  It multiplies no zeros,
and sums the same products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import NO_WEIGHTS, decide, inherit, plan_of, set_plan
from qcompiler.ir.graph import constant, drop_if_unread, new_initializer, replace_nodes
from qcompiler.ir.types import PerAxis
from qcompiler.passes.conv_pads import explicit_pads
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.infer_shapes import InferShapes

__all__ = ["LowerConvolutions", "no_convolution_of"]

_END = np.iinfo(np.int64).max


class LowerConvolutions(ir.passes.InPlacePass):
    """Rewrite planned convolutions, and means that may lie between them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; nothing if no convolution is planned."""
        nodes = list(model.graph.all_nodes())
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


def no_convolution_of(node: ir.Node) -> str | None:
    """Why a ConvTranspose by a constant kernel cannot become a convolution; None if it can."""
    weight = constant(node.inputs[1])
    if weight is None or weight.ndim != 4:
        return "DepthToSpace puts phases in place along two axes, no other number"
    step, group = _steps(node)[0], node.attributes.get_int("group", 1)
    if set(_steps(node)) != {step} or set(node.attributes.get_ints("dilations", [1])) != {1}:
        return "its axes have different strides, or it has dilations"
    if any(size % step for size in weight.shape[2:]):
        return f"its kernel of {weight.shape[2]}x{weight.shape[3]} is no multiple of its stride"
    if "output_shape" in node.attributes or node.attributes.get_string("auto_pad", "") not in (
        "", "NOTSET", "VALID",
    ):  # fmt: skip
        return "what it cuts off depends on sizes that are not known"
    if group > 1 and weight.shape[0] % group:
        return "its groups do not divide its channels"
    pads, extra = _cuts(node)
    if any(e > pad for e, pad in zip(extra, pads[2:], strict=True)):
        return "its output_padding reaches beyond what its kernel covers"
    return None


def _lower_transposed(graph: ir.Graph, node: ir.Node) -> bool:
    plan, result = plan_of(node), node.outputs[0]
    assert plan is not None
    step, old = _steps(node)[0], list(node.inputs[1:])
    taps = [size // step for size in _array(node.inputs[1]).shape[2:]]
    ends = [count - 1 for count in taps]
    attributes = {"group": node.attributes.get_int("group", 1), "pads": ends * 2}
    conv = ir.node("Conv", [node.inputs[0], *_operands(graph, node, taps)], attributes)
    inherit(conv, node)
    set_plan(conv, dataclasses.replace(plan, weight=dataclasses.replace(
        plan.weight, granularity=PerAxis(0))))  # fmt: skip
    chain = [conv]
    if step > 1:
        phases = {"blocksize": step, "mode": "CRD"}
        chain.append(ir.node("DepthToSpace", [conv.outputs[0]], phases))
    pads, extra = _cuts(node)
    begins, cut = pads[:2], [pads[2 + axis] - extra[axis] for axis in (0, 1)]
    if any(begins) or any(cut):
        cuts = [begins, [-count or _END for count in cut], [2, 3]]
        inputs = [
            new_initializer(graph, f"{node.name}_{stem}", np.asarray(numbers, np.int64))
            for stem, numbers in zip(("begins", "ends", "axes"), cuts, strict=True)
        ]
        chain.append(ir.node("Slice", [chain[-1].outputs[0], *inputs]))
    for link in chain[:-1]:
        link.outputs[0].name, link.outputs[0].type = f"{result.name}_phases", result.type
    for link in chain[1:]:
        link.name = f"{node.name}_{link.op_type.lower()}"
    replace_nodes([node], chain)
    for value in old:
        if value is not None:
            drop_if_unread(value)
    return True


def _operands(graph: ir.Graph, node: ir.Node, taps: Sequence[int]) -> list[ir.Value]:
    """The kernel of the convolution, and its bias if it has one."""
    weight, step = _array(node.inputs[1]), _steps(node)[0]
    group = node.attributes.get_int("group", 1)
    channels, width = weight.shape[0] // group, weight.shape[1]
    # [g C, M, T s, T s] to [g M s s, C, T, T], taps in reverse, as a convolution reads them.
    parts = weight.reshape(group, channels, width, taps[0], step, taps[1], step)
    turned = parts[:, :, :, ::-1, :, ::-1].transpose(0, 2, 4, 6, 1, 3, 5)
    kernel = np.ascontiguousarray(turned).reshape(-1, channels, *taps)
    arrays = {"weight": kernel}
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        arrays["bias"] = np.repeat(_array(node.inputs[2]), step * step)
    return [new_initializer(graph, f"{node.name}_{stem}", a) for stem, a in arrays.items()]


def _steps(node: ir.Node) -> list[int]:
    return list(node.attributes.get_ints("strides", [1, 1]))


def _cuts(node: ir.Node) -> tuple[list[int], list[int]]:
    """What a ConvTranspose cuts off its result, and what of that output_padding gives back."""
    pads = [0] * 4
    if node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET":
        pads = list(node.attributes.get_ints("pads", pads))
    return pads, list(node.attributes.get_ints("output_padding", [0, 0]))


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

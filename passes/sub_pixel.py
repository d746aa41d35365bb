"""A transposed convolution as a convolution and a shuffle.

    ConvTranspose(x, W)   =>   DepthToSpace(Conv(x, W'))            kernel a multiple of the stride,
                               (cut at its ends by a Slice)         both axes alike

A sub-pixel convolution (Shi et al., 2016).  With strides of s and kernels of s T, element
s q + r of a transposed convolution is the sum over t of x[q - t] W[r + s t]: a convolution of T
taps for each of the s s phases r, that DepthToSpace puts in their places.  It multiplies no zeros,
and sums the same products.  Part of `lower_convolutions` and `lower_transposed_pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import inherit
from qcompiler.ir.graph import new_initializer

__all__ = ["convolution_of", "no_convolution_of", "phases", "phases_of"]

_END = np.iinfo(np.int64).max


def no_convolution_of(node: ir.Node, shape: Sequence[int] | None) -> str | None:
    """Why a ConvTranspose by a constant kernel of a shape cannot become one; None if it can."""
    if shape is None or len(shape) != 4:
        return "DepthToSpace puts phases in place along two axes, no other number"
    step, group = _step(node), node.attributes.get_int("group", 1)
    strides, dilations = (node.attributes.get_ints(n, [1]) for n in ("strides", "dilations"))
    if set(strides) != {step} or set(dilations) != {1}:
        return "its axes have different strides, or it has dilations"
    if any(size % step for size in shape[2:]):
        return f"its kernel of {shape[2]}x{shape[3]} is no multiple of its stride"
    if "output_shape" in node.attributes or node.attributes.get_string("auto_pad", "") not in (
        "", "NOTSET", "VALID",
    ):  # fmt: skip
        return "what it cuts off depends on sizes that are not known"
    if group > 1 and shape[0] % group:
        return "its groups do not divide its channels"
    pads, extra = _cuts(node)
    if any(e > pad for e, pad in zip(extra, pads[2:], strict=True)):
        return "its output_padding reaches beyond what its kernel covers"
    return None


def convolution_of(
    graph: ir.Graph, node: ir.Node, operands: Sequence[ir.Value], shape: Sequence[int]
) -> list[ir.Node]:
    """The convolution, the shuffle and the cut that compute what a ConvTranspose does.

    Args:
        graph: Where constants go.
        node: What `no_convolution_of` has nothing against.
        operands: The kernel by `phases_of`, and the bias of each phase if there is one.
        shape: The kernel's, before.
    """
    step, result = _step(node), node.outputs[0]
    ends = [size // step - 1 for size in shape[2:]]
    attributes = {"group": node.attributes.get_int("group", 1), "pads": ends * 2}
    chain = [ir.node("Conv", [node.inputs[0], *operands], attributes)]
    inherit(chain[0], node)
    if step > 1:
        phases = {"blocksize": step, "mode": "CRD"}
        chain.append(ir.node("DepthToSpace", [chain[0].outputs[0]], phases))
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
    return chain


def phases(node: ir.Node) -> int:
    """Channels of the convolution for each of the result."""
    return _step(node) ** 2


def phases_of(node: ir.Node, weight: NDArray[Any]) -> NDArray[Any]:
    """The kernel of the convolution: [g C, M, T s, T s] to [g M s s, C, T, T]."""
    step, group = _step(node), node.attributes.get_int("group", 1)
    (inputs, width), taps = weight.shape[:2], [size // step for size in weight.shape[2:]]
    channels = inputs // group
    # Taps in reverse, as a convolution reads them.
    parts = weight.reshape(group, channels, width, taps[0], step, taps[1], step)
    turned = parts[:, :, :, ::-1, :, ::-1].transpose(0, 2, 4, 6, 1, 3, 5)
    return np.ascontiguousarray(turned).reshape(-1, channels, *taps)


def _step(node: ir.Node) -> int:
    return int(node.attributes.get_ints("strides", [1, 1])[0])


def _cuts(node: ir.Node) -> tuple[list[int], list[int]]:
    """What a ConvTranspose cuts off its result, and what of that output_padding gives back."""
    pads = [0] * 4
    if node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET":
        pads = list(node.attributes.get_ints("pads", pads))
    return pads, list(node.attributes.get_ints("output_padding", [0, 0]))

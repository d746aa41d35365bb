"""A transposed convolution as a convolution and a shuffle.

    ConvTranspose(x, W)   =>   DepthToSpace(Conv(x, W'))            strides of both axes alike
                               (cut at its ends by a Slice)

A sub-pixel convolution (Shi et al., 2016).  With strides of s and kernels of s T, element
s q + r of a transposed convolution is the sum over t of x[q - t] W[r + s t]: a convolution of T
taps for each of the s s phases r, that DepthToSpace puts in their places.  It sums the same
products.  A kernel of another size, or one that output_padding reaches beyond, gets zeros at its
ends: of 3x3 with strides of 2 seven taps in sixteen, which integers make up for.  Part of
`lower_convolutions` and `lower_transposed_pairs`.
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
        return f"its axes have different strides, {list(strides)}, or it has dilations"
    if _pads(node, shape) is None:
        return "what it cuts off depends on sizes that are not known"
    if group > 1 and shape[0] % group:
        return "its groups do not divide its channels"
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
    ends = [taps - 1 for taps in _taps(node, shape)]
    attributes = {"group": node.attributes.get_int("group", 1), "pads": ends * 2}
    chain = [ir.node("Conv", [node.inputs[0], *operands], attributes)]
    inherit(chain[0], node)
    if step > 1:
        phases = {"blocksize": step, "mode": "CRD"}
        chain.append(ir.node("DepthToSpace", [chain[0].outputs[0]], phases))
    begins, cut = _cuts(node, shape)
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


def phases_of(node: ir.Node, weight: NDArray[Any], zero: Any = 0) -> NDArray[Any]:
    """The kernel of the convolution: [g C, M, k, k] to [g M s s, C, T, T].

    Args:
        node: The ConvTranspose.
        weight: Its kernel.
        zero: What stands for 0 in it, one value or [M].
    """
    step, group, taps = _step(node), node.attributes.get_int("group", 1), _taps(node, weight.shape)
    (inputs, width), channels = weight.shape[:2], weight.shape[0] // group
    zeros = np.reshape(np.asarray(zero, weight.dtype), (1, -1, 1, 1))
    whole = np.broadcast_to(zeros, (inputs, width, taps[0] * step, taps[1] * step)).copy()
    whole[:, :, : weight.shape[2], : weight.shape[3]] = weight
    # Taps in reverse, as a convolution reads them.
    parts = whole.reshape(group, channels, width, taps[0], step, taps[1], step)
    turned = parts[:, :, :, ::-1, :, ::-1].transpose(0, 2, 4, 6, 1, 3, 5)
    return np.ascontiguousarray(turned).reshape(-1, channels, *taps)


def _step(node: ir.Node) -> int:
    return int(node.attributes.get_ints("strides", [1, 1])[0])


def _extra(node: ir.Node) -> list[int]:
    return list(node.attributes.get_ints("output_padding", [0, 0]))


def _taps(node: ir.Node, shape: Sequence[int]) -> list[int]:
    """Taps along each axis: as many as the kernel needs, and what output_padding adds."""
    pads, step = _pads(node, shape), _step(node)
    assert pads is not None, "see no_convolution_of"
    beyond = [max(0, extra - pad) for extra, pad in zip(_extra(node), pads[2:], strict=True)]
    return [-(-(shape[2 + axis] + beyond[axis]) // step) for axis in (0, 1)]


def _cuts(node: ir.Node, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """What is to be cut off the phases, at the beginning and the end of each axis."""
    pads, step, extra = _pads(node, shape), _step(node), _extra(node)
    assert pads is not None, "see no_convolution_of"
    added = [step * taps - size for taps, size in zip(_taps(node, shape), shape[2:], strict=True)]
    return pads[:2], [pads[2 + axis] - extra[axis] + added[axis] for axis in (0, 1)]


def _pads(node: ir.Node, shape: Sequence[int]) -> list[int] | None:
    """What a ConvTranspose cuts off its result before output_padding; None if that is not known."""
    if "output_shape" in node.attributes:
        return None
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto in ("", "NOTSET"):
        return list(node.attributes.get_ints("pads", [0] * 4))
    if auto == "VALID":
        return [0] * 4
    # Sizes are multiplied by the stride, whatever they are.
    over = [size - _step(node) + more for size, more in zip(shape[2:], _extra(node), strict=True)]
    if min(over) < 0:
        return None
    less, more = [cut // 2 for cut in over], [cut - cut // 2 for cut in over]
    return less + more if auto == "SAME_UPPER" else more + less

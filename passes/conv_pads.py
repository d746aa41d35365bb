"""What a convolution pads, in numbers."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

__all__ = ["explicit_pads"]


def explicit_pads(conv: ir.Node, spans: Sequence[int]) -> list[int] | None:
    """The `pads` of a Conv, those that its auto_pad means included; None if those are not known.

    ONNX Conv: SAME pads so that the result has ceil(size / stride) elements, the odd one at the end
    (UPPER) or at the beginning (LOWER).

    Args:
        conv: Its `pads`, strides and dilations may be absent.
        spans: The sizes of its kernel.
    """
    axes, attributes = len(spans), conv.attributes
    mode = attributes.get_string("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(attributes.get_ints("pads", [0] * axes * 2))
    if mode == "VALID":
        return [0] * axes * 2
    data = conv.inputs[0]
    sizes = data.shape[2:] if data is not None and data.shape is not None else [None] * axes
    begins, ends = [], []
    for size, span, stride, dilation in zip(
        sizes,
        spans,
        attributes.get_ints("strides", [1] * axes),
        attributes.get_ints("dilations", [1] * axes),
        strict=True,
    ):
        reach = dilation * (span - 1) + 1
        if stride == 1:
            total = reach - 1
        elif isinstance(size, int):
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        else:
            return None
        begins.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
        ends.append(total - begins[-1])
    return begins + ends

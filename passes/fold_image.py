"""Fold a convolution into the two ops that GPUs have kernels of.

    Conv(DQ(Q(x, s, z)), DQ(W, ws), b)
        =>   Add(QConvW8A8(QuantizeImage(x, s, z), s, z, W, ws), b)

1. x: float, stored as uint8 by a constant scale.  Convolutions with the same pads share a
   QuantizeImage; the pair stays for other readers.
2. W: int8 without zero points, or what becomes that, a scale per tensor or per output channel; two
   dimensions; groups so large that kernels do not mostly multiply zeros, or of one channel.
3. b: none, or constant.  It stays float, as a Relu and a residual after it do: regions take them
   in (`fuse_regions`).

The integers and their sums are the same.  Results stay float: what else reads them has no kernels
of integers there.  Part of `fold_qdq`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decide, inherit
from qcompiler.ir.dialect_image import channels_at_once, padded_channels
from qcompiler.ir.graph import dequantize_of, new_initializer, place_after, replace_nodes
from qcompiler.ir.params import QuantParams, quant_params
from qcompiler.passes.conv_pads import explicit_pads
from qcompiler.passes.fold_conv import Kernel, kernel_of
from qcompiler.passes.fold_matmul import one_scale
from qcompiler.passes.widen_constants import dequantized_constant

__all__ = ["no_image_kernel", "try_fold_image"]

_MOST_WASTE = 32
"""Channels multiplied per channel that counts; not measured: it takes in ResNeXt's groups of 4."""


def no_image_kernel(weight: Sequence[int], group: int) -> str | None:
    """Why a convolution by weights of this shape has no kernel for GPUs, or None if it has."""
    if len(weight) != 4:
        return f"its weight has shape {list(weight)}: kernels for GPUs are of two dimensions"
    columns, given, channels = weight[0], weight[1], weight[1] * group
    if 2 * channels < padded_channels(channels):
        return (
            f"its {channels} channels would be padded to {padded_channels(channels)}, "
            "which is more work than floats are"
        )
    if group == channels == columns:
        return None
    at_once = channels_at_once(channels, columns, group)
    if group > 1 and at_once > _MOST_WASTE * given:
        return (
            f"{group} groups of {given} channels: kernels for GPUs would multiply each result's "
            f"with {at_once - given} zeros"
        )
    return None


def try_fold_image(graph: ir.Graph, conv: ir.Node) -> str | None:
    """Fold one Conv; the reason, and nothing changed, if it cannot be."""
    x, source = one_scale(dequantize_of(conv.inputs[0])), _quantized_from(conv.inputs[0])
    if isinstance(x, str):
        return x
    if x.scales is None or x.zeros is None:
        return "the scale of its activations is computed"
    if source is None:
        return "its activations are given as integers: no kernel for GPUs reads those of others"
    kernel = kernel_of(dequantize_of(conv.inputs[1]))
    if isinstance(kernel, str):
        return kernel
    if kernel.zeros.any():
        return "its weights have zero points"
    group = conv.attributes.get_int("group", 1)
    if (why := no_image_kernel(kernel.shape, group)) is not None:
        return why
    pads = explicit_pads(conv, kernel.shape[2:])
    if pads is None or min(pads) < 0:
        return f"its pads are {'not known' if pads is None else pads}"
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    added = dequantized_constant(bias)
    if bias is not None and (added is None or added.dtype != np.float32):
        return "its bias is computed, or not FLOAT"
    q = _image(graph, source, x, pads, kernel.shape[1] * group, conv)
    _replace(graph, conv, q, x, kernel, added)
    return None


def _quantized_from(value: ir.Value | None) -> ir.Value | None:
    """The floats that a pair of one and the same scale stores."""
    widened = dequantize_of(value)
    stored = widened.inputs[0] if widened is not None else None
    quantize = stored.producer() if stored is not None else None
    before, after = quant_params(quantize), quant_params(widened)
    if quantize is None or quantize.op_type != "QuantizeLinear" or before is None or after is None:
        return None
    x = quantize.inputs[0]
    is_float = x is not None and x.dtype is ir.DataType.FLOAT
    return x if is_float and before.equals(after) else None


def _image(
    graph: ir.Graph,
    x: ir.Value,
    params: QuantParams,
    pads: Sequence[int],
    channels: int,
    conv: ir.Node,
) -> ir.Value:
    """X as a stored image with this border, of a node that is there or a new one."""
    top, left, bottom, right = pads
    widths = [0, top, left, 0, 0, bottom, right, padded_channels(channels) - channels]
    zero = params.zero_point
    if zero is None:
        zero = new_initializer(graph, f"{x.name}_zero_point", np.zeros((), np.uint8))
    for use in x.uses():
        node = use.node
        if node.op_type != "QuantizeImage" or node.graph is not conv.graph:
            continue
        same = node.inputs[1] is params.scale and params.zero_point in (None, node.inputs[2])
        if same and list(node.attributes.get_ints("pads")) == widths:
            return node.outputs[0]
    new = ir.node(
        "QuantizeImage", [x, params.scale, zero], {"pads": widths},
        domain=dialect.DOMAIN, version=dialect.VERSION, name=f"{conv.name}_image",
    )  # fmt: skip
    result = new.outputs[0]
    result.name, result.dtype = f"{conv.name}_image", ir.DataType.UINT8
    if x.shape is not None and len(x.shape) == 4:
        count, _, height, width = x.shape
        spatial = [
            size + more if isinstance(size, int) else None
            for size, more in ((height, top + bottom), (width, left + right))
        ]
        result.shape = ir.Shape([count, *spatial, padded_channels(channels)])
    decide(new, "body", "folded, no kernel bound yet")
    place_after(x, [new])
    return result


def _replace(
    graph: ir.Graph,
    conv: ir.Node,
    q: ir.Value,
    x: QuantParams,
    kernel: Kernel,
    bias: NDArray[np.float32] | None,
) -> None:
    def initializer(stem: str, array: NDArray[np.generic]) -> ir.Value:
        return new_initializer(graph, f"{conv.name}_{stem}", array)

    weight, scales = kernel.stored, kernel.scale
    if not isinstance(weight, ir.Value):
        weight = initializer("weight", weight)
    if kernel.scales.shape != kernel.shape[:1]:
        scales = initializer("weight_scale", np.full(kernel.shape[0], kernel.scales))
    maker = q.producer()
    assert maker is not None
    new = ir.node(
        "QConvW8A8", [q, *maker.inputs[1:], weight, scales],
        {
            "dilations": conv.attributes.get_ints("dilations", [1, 1]),
            "group": conv.attributes.get_int("group", 1),
            "strides": conv.attributes.get_ints("strides", [1, 1]),
        },
        domain=dialect.DOMAIN, version=dialect.VERSION,
    )  # fmt: skip
    inherit(new, conv)
    last = [new]
    if bias is not None and bias.any():  # rounding gives a bias to those that have none
        added = initializer("bias_of_planes", bias.reshape(-1, 1, 1))
        last.append(ir.node("Add", [new.outputs[0], added], name=f"{conv.name}_add"))
        inner, result = new.outputs[0], conv.outputs[0]
        inner.name, inner.type, inner.shape = f"{result.name}_product", result.type, result.shape
    replace_nodes([conv], last)
    dialect.type_results(new, "QConvW8A8")
    decide(new, "body", "folded, no kernel bound yet")

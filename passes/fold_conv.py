"""Fold a static convolution into one integer op.

    Q(Conv(DQ(x), DQ(W), b), ys, yz)          =>  QConv(x, xs, xz, W, ws, wz, ys, yz, b)
    Q(Relu(Conv(DQ(x), DQ(W), b)), ys, yz)    =>  the same, if Q saturates at 0

1. x and y: uint8, one constant scale each.
2. W: int8 or uint8, a scale per tensor or per output channel.  uint8 is shifted by 128, exactly;
   zero points that differ between channels, which ORT does not take, are subtracted where W - wz is
   int8.
3. b: none, int32 at the scale of the products, or floats, which are rounded to that.  Half a step
   of the sums, it changes few results, and those by one step of y.
4. A Relu, or a Clip with constant bounds, goes where Q saturates at its bounds anyway.
5. auto_pad becomes pads where those are known.

6. A scale of x that is computed: see `fold_conv_integer`.

QConv's body is QLinearConv, which ORT runs with its own integer kernels; it rounds once where the
pair around a float convolution may round twice.  W stays int8, of which ORT has faster kernels, and
a session with exact sums stores it otherwise (see `qcompiler/session_options.py`); that takes
weights and zero points that no other node reads, and that lie in the convolution's own graph.  Part
of `fold_qdq`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decide, inherit
from qcompiler.ir.graph import (
    constant,
    dequantize_of,
    new_initializer,
    only_consumer,
    replace_nodes,
)
from qcompiler.ir.params import QuantParams, quant_params
from qcompiler.ir.types import PerAxis, PerTensor
from qcompiler.passes.conv_pads import explicit_pads
from qcompiler.passes.fold_conv_integer import try_fold_conv_integer
from qcompiler.passes.fold_matmul import one_scale
from qcompiler.passes.widen_constants import dequantized_constant

__all__ = ["Kernel", "kernel_of", "try_fold_conv"]

_MAX_BIAS = 2**31 - 1
_Operand = ir.Value | NDArray[np.generic] | None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Weights as QLinearConv takes them: int8, zero points all alike.

    Attributes:
        shape: Of the weights.
        integers: What they are.
        stored: The same, as the graph holds them if it does.
        scale: Of the graph: one, or one per output channel.
        scales: Its numbers.
        zeros: As many zero points.
    """

    shape: tuple[int, ...]
    integers: NDArray[np.int8]
    stored: ir.Value | NDArray[np.int8]
    scale: ir.Value
    scales: NDArray[np.float32]
    zeros: NDArray[np.int8]


def try_fold_conv(graph: ir.Graph, conv: ir.Node) -> str | None:
    """Fold one Conv; the reason, and nothing changed, if it cannot be."""
    x = one_scale(dequantize_of(conv.inputs[0]))
    if isinstance(x, str):
        return x
    kernel = kernel_of(dequantize_of(conv.inputs[1]))
    if isinstance(kernel, str):
        return kernel
    if x.scales is None or x.zeros is None:
        zero = int(kernel.zeros.flat[0])
        return try_fold_conv_integer(graph, conv, x, kernel.integers, kernel.scales, zero)
    covered, y = _covered(conv)
    if isinstance(y, str):
        return y
    bias = _bias(conv, x, kernel)
    if isinstance(bias, str):
        return bias
    pads = explicit_pads(conv, kernel.shape[2:])
    if pads is None:
        return "auto_pad, and what it pads depends on sizes that are not known"
    _replace(graph, covered, x, kernel, y, bias, pads)
    return None


def kernel_of(dequantize: ir.Node | None) -> Kernel | str:
    """The weights that a DQ widens, or the reason if they have no such form."""
    params = quant_params(dequantize)
    value = dequantize.inputs[0] if dequantize is not None else None
    stored = constant(value)
    if params is None or stored is None or value is None:
        return "its weight is not quantized"
    scales, zeros, storage = params.scales, params.zeros, params.type.storage
    if scales is None or zeros is None or storage not in (ir.DataType.INT8, ir.DataType.UINT8):
        return f"its weight is {storage.name}, or its scale is computed"
    if params.type.granularity not in (PerTensor(), PerAxis(0), PerAxis(-stored.ndim)):
        return f"its weight has a scale per {params.type.granularity}, not per output channel"
    wide, offset = stored.astype(np.int16), np.asarray(zeros, np.int16).reshape(-1)
    result: ir.Value | NDArray[np.int8] = value
    if np.unique(offset).size > 1:
        wide -= offset.reshape(-1, *[1] * (stored.ndim - 1))
        offset = np.zeros_like(offset)
    elif storage is ir.DataType.UINT8:
        wide, offset = wide - 128, offset - 128
    if wide.min(initial=0) < -128 or wide.max(initial=0) > 127:
        return "its weights minus their zero points do not fit int8"
    integers = wide.astype(np.int8)
    if np.any(wide != stored):
        result = integers
    zeros = np.full(scales.shape, offset[:1], np.int8)
    return Kernel(stored.shape, integers, result, params.scale, scales.reshape(-1), zeros)


def _covered(conv: ir.Node) -> tuple[list[ir.Node], QuantParams | str]:
    """The nodes from the convolution to the Q of its result, and how that quantizes."""
    covered, clips = [conv], []
    reader = only_consumer(conv.outputs[0])
    while reader is not None and reader.op_type in ("Relu", "Clip"):
        clips.append(reader)
        covered.append(reader)
        reader = only_consumer(reader.outputs[0])
    y = quant_params(reader)
    if reader is None or y is None or reader.op_type != "QuantizeLinear":
        return covered, "its result is not quantized: ORT's ConvInteger is slower than floats"
    if y.type.storage is not ir.DataType.UINT8 or not y.is_per_tensor or y.scales is None:
        return covered, f"its result is quantized to {y.type}, not to UINT8 with one constant scale"
    for clip in clips:
        if not _saturates(clip, y):
            return covered, f"its {clip.op_type} cuts within the range that its result is stored in"
    return [*covered, reader], y


def _saturates(clip: ir.Node, y: QuantParams) -> bool:
    """Whether Q stores the bounds of a Relu or Clip as its smallest and largest value."""
    if y.scales is None or y.zeros is None:
        return False
    bounds: list[ir.Value | None] = [*clip.inputs[1:], None, None]
    low, high = constant(bounds[0]), constant(bounds[1])
    if any(value is not None and constant(value) is None for value in bounds):
        return False
    lowest = np.float32(0) if clip.op_type == "Relu" else low
    first, last = y.type.range
    steps = [
        None if bound is None else np.rint(np.float32(bound) / y.scales) + y.zeros
        for bound in (lowest, high)
    ]
    below = steps[0] is None or np.all(steps[0] <= first)
    return bool(below and (steps[1] is None or np.all(steps[1] >= last)))


def _bias(conv: ir.Node, x: QuantParams, kernel: Kernel) -> NDArray[np.int32] | ir.Value | str:
    """The bias as int32 at the scale of the products."""
    value = conv.inputs[2] if len(conv.inputs) > 2 else None
    assert x.scales is not None
    if value is None:
        return np.zeros(kernel.shape[0], np.int32)
    products = np.broadcast_to(kernel.scales * x.scales.reshape(-1), kernel.shape[:1])
    dequantize = dequantize_of(value)
    params = quant_params(dequantize)
    integers = dequantize.inputs[0] if dequantize is not None else None
    if params is not None and integers is not None and params.scales is not None:
        is_sum = params.type.storage is ir.DataType.INT32 and params.type.symmetric
        if is_sum and np.allclose(params.scales, products, rtol=1e-5, atol=0):
            return integers
    floats = dequantized_constant(value)
    if floats is None or floats.dtype != np.float32:
        return "its bias is computed, or not FLOAT"
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.rint(floats.astype(np.float64) / products)
    if not np.all(np.abs(steps) <= _MAX_BIAS):
        return "its bias does not fit int32 at the scale of the products"
    return np.asarray(steps, np.int32)


def _alone(conv: ir.Node, stored: ir.Value | NDArray[np.int8]) -> ir.Value | NDArray[np.int8]:
    """The weight, or a copy of it unless only this convolution reads it, in its own graph."""
    widened = conv.inputs[1]
    if not isinstance(stored, ir.Value) or widened is None:
        return stored
    dequantize = only_consumer(stored)
    if dequantize is not None and stored.graph is conv.graph and only_consumer(widened) is conv:
        return stored
    return np.asarray(constant(stored), np.int8)


def _replace(
    graph: ir.Graph,
    covered: list[ir.Node],
    x: QuantParams,
    kernel: Kernel,
    y: QuantParams,
    bias: NDArray[np.int32] | ir.Value,
    pads: list[int],
) -> None:
    conv, data = covered[0], dequantize_of(covered[0].inputs[0])
    home = conv.graph
    assert isinstance(home, ir.Graph) and data is not None

    def value(stem: str, content: _Operand, within: ir.Graph = graph) -> ir.Value:
        if content is None:
            content = np.zeros((), np.uint8)
        if isinstance(content, ir.Value):
            return content
        return new_initializer(within, f"{conv.name}_{stem}", content)

    operands = [
        data.inputs[0], x.scale, value("zero_point", x.zero_point),
        value("weight", _alone(conv, kernel.stored), home), kernel.scale,
        value("weight_zero_point", kernel.zeros, home),
        y.scale, value("result_zero_point", y.zero_point), value("bias", bias),
    ]  # fmt: skip
    axes = len(pads) // 2
    new = ir.node(
        "QConv",
        operands,
        {
            "dilations": conv.attributes.get_ints("dilations", [1] * axes),
            "group": conv.attributes.get_int("group", 1),
            "pads": pads,
            "strides": conv.attributes.get_ints("strides", [1] * axes),
        },
        domain=dialect.DOMAIN,
        version=dialect.VERSION,
    )
    inherit(new, conv)
    replace_nodes(covered, [new])
    dialect.type_results(new, "QConv")
    decide(new, "qdq", "ORT's own QLinearConv")

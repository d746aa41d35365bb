"""What a region of `fuse_regions` grows by: the node that reads its result, as one more step.

y = Add(p, DQ(b))                   =>   Step("Add", (i, -j)), b as floats of each channel
y = QuantizeLinear(p, scale, zero)  =>   Step("QuantizeLinear", (i, -j, -k)), both likewise
y = Add(p, e), p of [B, T, N], e of [T, N]  =>  Step("Add", (i, -j)), e for each of the batch
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import constant, dequantize_of, new_initializer, same_shape
from qcompiler.ir.region import HALF, QUANTIZATION, ExtraKind, Region, Step
from qcompiler.passes.widen_constants import dequantized_constant

__all__ = ["Growth", "per_channel", "try_extend"]

_DEFAULTS = frozenset({("Gelu", "approximate", "none")})
"""Attributes written out with their default value name no other kernel."""

_SCALES = (2.0**-100, 2.0**100)
"""Of which kernels can take the reciprocal, and divide by that."""

_LEAST_ROWS, _LEAST_ROWS_OF_LARGE = 32, 512
_LARGE_WEIGHTS = 12 << 20
"""Rows of an operand that repeats, by how many weights there are, which are all read for so many.

On Zen 4, with 32 rows: up to 2048 x 2048 the product takes 0.94 to 0.99 of the time that it and an
Add take, but 1.07 where 32 are no multiple of a tile's rows, N = 1024.  Of 4096 x 4096 two threads
wait for memory: 1.05 to 1.14 up to 128 rows, 1.02 with 256 and 0.99 with 512; one takes 1.00,
and 1.05 if they are int4.
"""


@dataclasses.dataclass
class Growth:
    """A region while it grows, with the graph objects it stands for."""

    region: Region
    inputs: list[ir.Value | None]
    extras: list[ir.Value]
    covered: list[ir.Node]

    @property
    def was_dequantized(self) -> bool:
        """Whether the last step is a DequantizeLinear."""
        return bool(self.region.steps) and self.region.steps[-1].op == "DequantizeLinear"

    @property
    def values(self) -> list[ir.Value]:
        """The anchor's result and that of each step."""
        results = [node.outputs[0] for node in self.covered]
        return results[len(results) - len(self.region.steps) - 1 :]


def try_extend(growth: Growth, reader: ir.Node) -> Growth | None:
    """The growth with `reader` as its next step, or None if it or its operands do not fit."""
    values, region = growth.values, growth.region
    result = values[-1]
    if reader.domain != "" or reader.graph is not growth.covered[0].graph:
        return None
    if len(reader.outputs) != 1 or not same_shape(reader.outputs[0], result):
        return None
    if reader.op_type == "Cast":
        return None  # between two types a region ends
    if reader.op_type in QUANTIZATION and not _is_by_constants(reader, region):
        return None
    args: list[int] = []
    extras, kinds = list(growth.extras), list(region.extras)
    operands, bounds = _bounds(reader)
    if operands is None:
        return None
    for operand in operands:
        if operand in values:
            args.append(values.index(operand))
            continue
        kind = _extra_kind(operand, result, region)
        if kind is None or operand is None:
            return None
        if kind != "channel" and growth.was_dequantized and dequantize_of(operand) is not None:
            return None  # ORT's integer forms, such as QLinearAdd, read 8 bits
        extras.append(operand)
        kinds.append(kind)
        args.append(-len(extras))
    if reader.op_type in ("Add", "Mul"):
        args.sort(reverse=True)
    attributes = tuple(
        (key, attribute.value)
        for key, attribute in sorted(reader.attributes.items())
        if reader.op_type not in QUANTIZATION
        and (reader.op_type, key, attribute.value) not in _DEFAULTS
    )
    step = Step(reader.op_type, tuple(args), attributes + bounds)
    grown = dataclasses.replace(region, extras=tuple(kinds), steps=(*region.steps, step))
    return Growth(grown, growth.inputs, extras, [*growth.covered, reader])


def _bounds(
    reader: ir.Node,
) -> tuple[Sequence[ir.Value | None] | None, tuple[tuple[str, float], ...]]:
    """The operands of a step, and the constant bounds of a Clip as attributes.

    ONNX has them as inputs since opset 11; None for operands if they are not constant.
    """
    if reader.op_type != "Clip":
        return reader.inputs, ()
    found = []
    for name, value in zip(("min", "max"), reader.inputs[1:], strict=False):
        if value is not None:
            array = constant(value)
            if array is None or array.size != 1:
                return None, ()
            found.append((name, float(array.item())))
    return reader.inputs[:1], tuple(found)


def _extra_kind(operand: ir.Value | None, result: ir.Value, region: Region) -> ExtraKind | None:
    dtype = ir.DataType.FLOAT16 if HALF in region.flags else ir.DataType.FLOAT
    if operand is None or operand.dtype not in (dtype, ir.DataType.UINT8):
        return None
    array = dequantized_constant(operand)
    if array is not None and _is_per_channel(array.shape, region):
        return "channel"
    if operand.dtype is not dtype:
        return None
    if region.anchor == "QConvW8A8" and array is not None:
        return None  # images are stored with their channels last, this is not
    if same_shape(operand, result):
        return "tensor"
    return "repeated" if _repeats(operand, result, region) else None


def _is_per_channel(shape: tuple[int, ...], region: Region) -> bool:
    """Whether it is one number, or one for each channel of the result."""
    wanted = _per_channel_shape(region)
    leading, rest = shape[: -len(wanted)], shape[-len(wanted) :]
    return math.prod(shape) == 1 or (rest == wanted and math.prod(leading) == 1)


def _repeats(operand: ir.Value, result: ir.Value, region: Region) -> bool:
    """Whether an operand has the last dimensions of the result, and enough rows."""
    if operand.shape is None or result.shape is None:
        return False
    own = list(operand.shape)
    while own and own[0] == 1:
        del own[0]
    sizes = [size for size in own if isinstance(size, int)]
    if len(sizes) < len(own) or not 2 <= len(sizes) < len(result.shape):
        return False
    same = sizes == list(result.shape)[-len(sizes) :]
    return same and math.prod(sizes[:-1]) >= _least_rows(region)


def _least_rows(region: Region) -> int:
    sizes = dict(region.sizes)
    is_large = sizes.get("K", 0) * sizes.get("N", 0) > _LARGE_WEIGHTS
    return _LEAST_ROWS_OF_LARGE if is_large else _LEAST_ROWS


def _is_by_constants(node: ir.Node, region: Region) -> bool:
    """Whether a Q or DQ of uint8 has one scale and zero point, of which a kernel makes floats."""
    stored = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    if HALF in region.flags or len(node.inputs) < 3 or stored is None:
        return False
    scale, zero = (constant(value) for value in node.inputs[1:])
    if scale is None or zero is None or stored.dtype is not ir.DataType.UINT8:
        return False
    low, high = _SCALES
    return scale.size == zero.size == 1 and bool(low <= scale.item() <= high)


def _per_channel_shape(region: Region) -> tuple[int, ...]:
    """That of one number for each channel of the result."""
    return (region.size("N"), 1, 1) if region.anchor == "QConvW8A8" else (region.size("N"),)


def per_channel(graph: ir.Graph, operand: ir.Value, region: Region) -> ir.Value:
    """A constant as one float per channel; a scalar is repeated."""
    shape, array = _per_channel_shape(region), dequantized_constant(operand)
    assert array is not None
    dtype = np.float16 if HALF in region.flags else np.float32
    if array.shape == shape and array.dtype == dtype and constant(operand) is not None:
        return operand
    numbers = array if array.size == 1 else array.reshape(shape)
    return new_initializer(graph, f"{operand.name}_per_channel", np.full(shape, numbers, dtype))

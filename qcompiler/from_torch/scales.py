"""Scales and zero points while torch's ops become ONNX: their shapes, and how they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import opset21 as op

from qcompiler.ir.types import Granularity, PerAxis, PerGroup, PerTensor

__all__ = [
    "Value",
    "as_float",
    "cast",
    "choose",
    "constant",
    "fit",
    "grain_of",
    "grouped",
    "is_zeros",
    "shaped",
]

Value = Any
"""An `onnx_ir.Value` of the graph being built; onnxscript, which makes them, is not typed."""


def constant(content: float | Sequence[int] | NDArray[Any], dtype: ir.DataType) -> Value:
    """A constant of the graph."""
    tensor = ir.tensor(np.asarray(content, dtype.numpy()), dtype=dtype)
    value = op.Constant(value=tensor)
    value.dtype, value.shape = dtype, tensor.shape
    return value


def cast(value: Value, dtype: int) -> Value:
    """`value` as another type; the shape stays known, which the exporter infers only later."""
    if value.dtype == dtype:
        return value
    result = op.Cast(value, to=dtype)
    result.dtype, result.shape = ir.DataType(dtype), value.shape
    return result


def as_float(value: Value) -> Value:
    """`value` as FLOAT, which torch's quantized ops compute in; their scales may be float64."""
    return cast(value, ir.DataType.FLOAT)


def grain_of(block_size: Sequence[int], x: Value, scale: Value | None) -> Granularity:
    """What torchao's `block_size`, the part of `x` that shares a scale, stands for.

    A row of a matrix is an axis where the scale is a parameter and a token where it is computed.

    Raises:
        ValueError: Blocks that ONNX has no word for.
    """
    dims, last = list(x.shape), len(x.shape) - 1
    # What is not a number is a dimension that varies, whole.
    cut = [i for i, b in enumerate(block_size) if isinstance(b, int) and b != dims[i]]
    if not cut:
        return PerTensor()
    is_parameter = scale is not None and scale.producer() is None
    if len(cut) == 1 and block_size[cut[0]] == 1 and (is_parameter or block_size[last] == 1):
        return PerAxis(cut[0])
    if all(block_size[i] == 1 for i in range(last)) and isinstance(dims[last], int):
        return PerGroup(-1, block_size[last])
    raise ValueError(f"no ONNX form for blocks of {list(block_size)} in a tensor of {dims}")


def _groups(x: Value, grain: PerGroup) -> int:
    """How many groups the last axis has."""
    depth = x.shape[-1]
    if not isinstance(depth, int) or depth % grain.group_size:
        raise ValueError(f"the last dimension, {depth}, is not whole groups of {grain.group_size}")
    return depth // grain.group_size


def _leading(x: Value, *last: int) -> Value:
    """The shape of `x` with other last dimensions."""
    return op.Concat(op.Shape(x, end=-1), constant(last, ir.DataType.INT64), axis=0)


def grouped(x: Value, grain: PerGroup) -> Value:
    """`x` with its last axis as [groups, group_size]."""
    return op.Reshape(x, _leading(x, _groups(x, grain), grain.group_size))


def fit(value: Value, x: Value, grain: Granularity) -> Value:
    """A scale or zero point of `x` as QuantizeLinear takes it: [], [C] or [..., K / g]."""
    maker, rank = value.producer(), len(value.shape)
    wanted = {PerTensor: 0, PerAxis: 1, PerGroup: len(x.shape)}[type(grain)]
    if rank == wanted:
        return value
    if maker is not None and maker.op_type in ("Squeeze", "Unsqueeze"):
        return maker.inputs[0]  # what `choose` made, before it was given torch's shape
    if isinstance(grain, PerGroup):
        result = op.Reshape(value, _leading(x, _groups(x, grain)))
    elif isinstance(grain, PerAxis):
        result = op.Reshape(value, constant([-1], ir.DataType.INT64))
    else:
        result = op.Squeeze(value)
    result.dtype = value.dtype
    return result


def is_zeros(value: Value) -> bool:
    """Whether a symmetric scheme filled the zero point with 0."""
    maker = value.producer()
    if maker is not None and maker.op_type in ("Cast", "Squeeze", "Unsqueeze", "Reshape"):
        return is_zeros(maker.inputs[0])
    filled_with_zero = maker is not None and maker.op_type == "ConstantOfShape"
    return filled_with_zero and not maker.attributes["value"].value.numpy().any()


def choose(
    x: Value, grain: Granularity, low: int, high: int, tiny: float, middle: int | None
) -> tuple[Value, Value]:
    """The scale (FLOAT) and zero point (INT64) of `x` by its extent.

    Args:
        x: FLOAT.
        grain: What shares a scale; the results have its shape, see `fit`.
        low: The smallest stored value.
        high: The largest.
        tiny: The smallest scale.
        middle: The zero point of a symmetric scheme, None for an asymmetric one.
    """
    if middle is not None:
        steps = (high - low) / 2
        magnitude = op.Abs(x)
        magnitude.shape = x.shape
        bounded = op.Max(_reduce(op.ReduceMax, magnitude, grain), _float(tiny * steps))
        scale = op.Div(bounded, _float(steps))
        same = ir.tensor(np.asarray([middle], np.int64))
        return _typed(scale, op.ConstantOfShape(op.Shape(scale), value=same))
    zero = _float(0)
    bottom = op.Min(_reduce(op.ReduceMin, x, grain), zero)
    top = op.Max(_reduce(op.ReduceMax, x, grain), zero)
    scale = op.Max(op.Div(op.Sub(top, bottom), _float(high - low)), _float(tiny))
    offset = op.Sub(_float(low), op.Round(op.Div(bottom, scale)))
    return _typed(scale, op.Cast(op.Clip(offset, _float(low), _float(high)), to=ir.DataType.INT64))


def _typed(scale: Value, zero: Value) -> tuple[Value, Value]:
    scale.dtype, zero.dtype = ir.DataType.FLOAT, ir.DataType.INT64
    return scale, zero


def shaped(value: Value, x: Value, grain: Granularity, keepdim: bool) -> Value:
    """A scale or zero point out of `choose` in the shape that torchao gives it."""
    if isinstance(grain, PerGroup):
        token = _groups(x, grain) == 1
        last = constant([-1], ir.DataType.INT64)
        return op.Squeeze(value, last) if token and not keepdim else value
    if not keepdim:
        return value
    axis = grain.axis if isinstance(grain, PerAxis) else None
    shape = [-1 if i == axis else 1 for i in range(len(x.shape))]
    return op.Reshape(value, constant(shape, ir.DataType.INT64))


def _float(number: float) -> Value:
    return constant(number, ir.DataType.FLOAT)


def _reduce(reduction: Any, x: Value, grain: Granularity) -> Value:
    if isinstance(grain, PerTensor):
        return reduction(x, keepdims=0)
    if isinstance(grain, PerAxis):
        others = [i for i in range(len(x.shape)) if i != grain.axis]
        return reduction(x, constant(others, ir.DataType.INT64), keepdims=0)
    last = constant([-1], ir.DataType.INT64)
    if _groups(x, grain) > 1:
        return reduction(grouped(x, grain), last, keepdims=0)
    # ORT returns an empty batch unreduced, [0, K] for [0, 1]: the Slice takes its column 0.
    ends = [constant([i], ir.DataType.INT64) for i in (0, 1)]
    return op.Slice(reduction(x, last, keepdims=1), *ends, last)

"""Each quantized op of torch, by its signature, as the Q, DQ or arithmetic of `translate`."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

from qcompiler.from_torch.scales import Value, as_float, cast, choose, constant, grain_of, shaped
from qcompiler.from_torch.translate import dequantize, quantize
from qcompiler.ir.types import PerAxis, PerGroup, PerTensor, QuantType

__all__ = ["translations"]

_INT8 = -128, 127
_EPSILON = float(np.finfo(np.float32).eps)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Every op that is registered in this process, with the function that builds its ONNX."""
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.ao.quantization.fx._decomposed")
    found = {}
    for qualified, build in _BUILDERS.items():
        namespace, packet, overload = qualified.split(".")
        target = getattr(getattr(torch.ops, namespace), packet, None)
        if target is not None:
            found[getattr(target, overload)] = build
    return found


def _scalar_arguments(scale: float, zero: int) -> tuple[Value, Value]:
    return constant(scale, ir.DataType.FLOAT), constant(zero, ir.DataType.INT64)


def _quantize_tensor(x: Value, scale: Any, zero: Any, low: int, high: int, dtype: int) -> Value:
    if isinstance(scale, float):
        scale, zero = _scalar_arguments(scale, zero)
    return quantize(x, scale, zero, low, high, dtype, PerTensor())


def _dequantize_tensor(
    q: Value, scale: Any, zero: Any, low: int, high: int, dtype: int, out_dtype: int | None = None
) -> Value:
    if isinstance(scale, float):
        scale, zero = _scalar_arguments(scale, zero)
    return dequantize(q, scale, zero, low, high, dtype, PerTensor(), out_dtype)


def _quantize_channel(
    x: Value, scales: Value, zeros: Value, axis: int, low: int, high: int, dtype: int
) -> Value:
    return quantize(x, scales, zeros, low, high, dtype, PerAxis(axis))


def _dequantize_channel(
    q: Value, scales: Value, zeros: Value | None, axis: int, low: int, high: int, dtype: int,
    out_dtype: int | None = None,
) -> Value:  # fmt: skip
    return dequantize(q, scales, zeros, low, high, dtype, PerAxis(axis), out_dtype)


def _fake_quantize_channel(
    x: Value, scales: Value, zeros: Value, axis: int, low: int, high: int
) -> Value:
    dtype = ir.DataType.INT8 if low < 0 else ir.DataType.UINT8
    stored = quantize(x, scales, zeros, low, high, dtype, PerAxis(axis))
    return dequantize(stored, scales, zeros, low, high, dtype, PerAxis(axis))


def _token(x: Value) -> PerGroup:
    depth = x.shape[-1]
    if not isinstance(depth, int):
        raise ValueError(f"a token of varying size {depth}: fix the last dimension")
    return PerGroup(-1, depth)


def _quantize_token(
    x: Value, scales: Value, zeros: Value, low: int, high: int, dtype: int
) -> Value:
    return quantize(x, scales, zeros, low, high, dtype, _token(x))


def _dequantize_token(
    q: Value, scales: Value, zeros: Value, low: int, high: int, dtype: int, out_dtype: int
) -> Value:
    return dequantize(q, scales, zeros, low, high, dtype, _token(q), out_dtype)


def _quantize_group(
    x: Value, scales: Value, zeros: Value, low: int, high: int, dtype: int, group_size: int
) -> Value:
    return quantize(x, scales, zeros, low, high, dtype, PerGroup(-1, group_size))


def _dequantize_group(
    q: Value, scales: Value, zeros: Value | None, low: int, high: int, dtype: int,
    group_size: int, out_dtype: int | None = None,
) -> Value:  # fmt: skip
    grain = PerGroup(-1, group_size)
    return dequantize(q, scales, zeros, low, high, dtype, grain, out_dtype)


def _one(pair: tuple[Value, Value]) -> tuple[Value, Value]:
    """A scale and zero point of a whole tensor as torch has them: of shape [1]."""
    axis = constant([0], ir.DataType.INT64)
    return op.Unsqueeze(pair[0], axis), op.Unsqueeze(pair[1], axis)


def _choose_tensor(x: Value, low: int, high: int, tiny: float, dtype: int) -> tuple[Value, Value]:
    return _one(choose(as_float(x), PerTensor(), low, high, tiny, None))


def _choose_symmetric(
    x: Value, low: int, high: int, tiny: float, dtype: int
) -> tuple[Value, Value]:
    middle = 128 if dtype == ir.DataType.UINT8 else 0
    return _one(choose(as_float(x), PerTensor(), low, high, tiny, middle))


def _choose_token(x: Value, dtype: int) -> tuple[Value, Value]:
    # By absmax / 127, though -128 may be stored: nothing rounds to it.
    return choose(as_float(x), _token(x), -127, 127, 1e-5 / 127, 0)


def _choose_token_asymmetric(x: Value, dtype: int) -> tuple[Value, Value]:
    # Below a range of 255 epsilon torch may put zero at the other end; the values are the same.
    return choose(as_float(x), _token(x), *_INT8, _EPSILON, None)


def _ends(dtype: int, low: int | None, high: int | None) -> tuple[int, int]:
    """The range, by default the whole of the type."""
    bottom, top = QuantType(ir.DataType(dtype)).range
    return int(bottom) if low is None else int(low), int(top) if high is None else int(high)


def _quantize_affine(
    x: Value, block_size: Sequence[int], scale: Value, zero: Value | None, dtype: int,
    low: int | None = None, high: int | None = None,
) -> Value:  # fmt: skip
    grain = grain_of(block_size, x, scale)
    return quantize(x, scale, zero, *_ends(dtype, low, high), dtype, grain)


def _dequantize_affine(
    q: Value, block_size: Sequence[int], scale: Value, zero: Value | None, dtype: int,
    low: int | None = None, high: int | None = None, out_dtype: int | None = None,
) -> Value:  # fmt: skip
    grain = grain_of(block_size, q, scale)
    return dequantize(q, scale, zero, *_ends(dtype, low, high), dtype, grain, out_dtype)


def _choose_affine(
    x: Value, scheme: str, block_size: Sequence[int], dtype: int, low: int | None = None,
    high: int | None = None, tiny: float | None = None, scale_dtype: int | None = None,
    zero_dtype: int | None = None, keepdim: bool = False,
) -> tuple[Value, Value]:  # fmt: skip
    if scheme not in ("SYMMETRIC", "ASYMMETRIC"):
        raise ValueError(f"no ONNX form for scales of the scheme {scheme}")
    first, last = _ends(dtype, low, high)
    middle = (first + last + 1) // 2 if scheme == "SYMMETRIC" else None
    if tiny is None:
        tiny = float(ml_dtypes.finfo(x.dtype.numpy()).smallest_normal)
    grain = grain_of(block_size, x, None)
    scale, zero = choose(as_float(x), grain, first, last, tiny, middle)
    scale = cast(scale, x.dtype if scale_dtype is None else scale_dtype)
    zero = cast(zero, ir.DataType.INT32 if zero_dtype is None else zero_dtype)
    return shaped(scale, x, grain, keepdim), shaped(zero, x, grain, keepdim)


_BUILDERS: dict[str, Callable[..., Any]] = {
    "quantized_decomposed.quantize_per_tensor.default": _quantize_tensor,
    "quantized_decomposed.quantize_per_tensor.tensor": _quantize_tensor,
    "quantized_decomposed.quantize_per_tensor.tensor2": _quantize_tensor,
    "quantized_decomposed.dequantize_per_tensor.default": _dequantize_tensor,
    "quantized_decomposed.dequantize_per_tensor.tensor": _dequantize_tensor,
    "quantized_decomposed.dequantize_per_tensor.tensor2": _dequantize_tensor,
    "quantized_decomposed.quantize_per_channel.default": _quantize_channel,
    "quantized_decomposed.dequantize_per_channel.default": _dequantize_channel,
    "quantized_decomposed.fake_quant_per_channel.default": _fake_quantize_channel,
    "quantized_decomposed.quantize_per_token.default": _quantize_token,
    "quantized_decomposed.dequantize_per_token.default": _dequantize_token,
    "quantized_decomposed.quantize_per_channel_group.default": _quantize_group,
    "quantized_decomposed.dequantize_per_channel_group.default": _dequantize_group,
    "quantized_decomposed.choose_qparams.tensor": _choose_tensor,
    "quantized_decomposed.choose_qparams_symmetric.tensor": _choose_symmetric,
    "quantized_decomposed.choose_qparams_per_token.default": _choose_token,
    "quantized_decomposed.choose_qparams_per_token_asymmetric.default": _choose_token_asymmetric,
    "quantized_decomposed.convert_element_type.no_fuse": lambda x, dtype: op.Cast(x, to=dtype),
    "torchao.quantize_affine.default": _quantize_affine,
    "torchao.dequantize_affine.default": _dequantize_affine,
    "torchao.choose_qparams_affine.default": _choose_affine,
    "aten._int_mm.default": lambda a, b: op.MatMulInteger(a, b),
}

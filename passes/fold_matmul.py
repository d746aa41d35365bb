"""Fold a product of activations that share one scale by a constant matrix.

1. MatMul(DQ(q, s, z), DQ(w, ws))      =>  QMatMulU8S8(q, s, z, w, ws)
2. MatMul(DQ(q, s, z), DQ(w, ws, wz))  =>  QMatMulU8S8(q, s, z, w - wz, ws) where w - wz is int8,
                                           else QMatMulU8U8(q, s, z, w, ws, wz), w as uint8
3. Gemm(DQ(q, s, z), DQ(w, ws), b)     =>  Add(QMatMulU8S8(q, s, z, w', alpha * ws), beta * b)

s and z are constants, or what DynamicQuantizeLinear computes.  Weights have a scale per column or
per tensor.  The sums are the same integers; of a Gemm with a quantized result ORT itself would
round the bias to int32, which this does not.  Part of `fold_qdq`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decide, inherit
from qcompiler.ir.graph import constant, dequantize_of, new_initializer, replace_nodes
from qcompiler.ir.params import QuantParams, quant_params
from qcompiler.ir.types import PerAxis, PerTensor
from qcompiler.passes.widen_constants import dequantized_constant

__all__ = ["one_scale", "try_fold_matmul"]


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A weight [K, N] of int8, or with zero points [N] of uint8, and its scale [N].

    Each an array where it is not what the graph holds.
    """

    stored: ir.Value | NDArray[np.generic]
    scale: ir.Value | NDArray[np.float32]
    zeros: ir.Value | NDArray[np.uint8] | None = None


def try_fold_matmul(graph: ir.Graph, node: ir.Node) -> str | None:
    """Fold one MatMul or Gemm; the reason, and nothing changed, if it cannot be."""
    attributes = node.attributes
    activation = one_scale(dequantize_of(node.inputs[0]))
    if isinstance(activation, str):
        return activation
    if attributes.get_int("transA", 0):
        return "its activations are transposed"
    turn, alpha = bool(attributes.get_int("transB", 0)), attributes.get_float("alpha", 1.0)
    weight = _matrix(dequantize_of(node.inputs[1]), turn, alpha)
    if isinstance(weight, str):
        return weight
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    beta = attributes.get_float("beta", 1.0)
    added = dequantized_constant(bias)
    if bias is not None and added is None and beta != 1.0:
        return "its bias is computed, and multiplied by beta"
    operands = [*_activation(graph, node, activation), *_initializers(graph, node, weight)]
    op = "QMatMulU8S8" if weight.zeros is None else "QMatMulU8U8"
    new = ir.node(op, operands, domain=dialect.DOMAIN, version=dialect.VERSION)
    inherit(new, node)
    last = [new]
    if bias is not None:
        if added is not None and (beta != 1.0 or constant(bias) is None):
            scaled = (added * np.float32(beta)).astype(np.float32)
            bias = new_initializer(graph, f"{node.name}_bias", scaled)
        last.append(ir.node("Add", [new.outputs[0], bias], name=f"{node.name}_add"))
        inner, result = new.outputs[0], node.outputs[0]
        inner.name, inner.type, inner.shape = f"{result.name}_product", result.type, result.shape
    replace_nodes([node], last)
    dialect.type_results(new, op)
    decide(new, "body", "folded, no kernel bound yet")
    return None


def one_scale(dequantize: ir.Node | None) -> QuantParams | str:
    """What a DQ of uint8 activations with one scale reads by, or the reason if it is another."""
    params = quant_params(dequantize)
    if params is None:
        return "its activations are not quantized"
    if params.type.storage is not ir.DataType.UINT8:
        return f"its activations are stored as {params.type.storage.name}, not as UINT8"
    if not params.is_per_tensor:
        return f"its activations have a scale per {params.type.granularity}, not one"
    if params.type.expressed is not ir.DataType.FLOAT:
        return f"its activations stand for {params.type.expressed.name}, not FLOAT"
    return params


def _matrix(dequantize: ir.Node | None, turn: bool, alpha: float) -> _Matrix | str:
    """The weight, transposed and times alpha, or the reason if it has no such form."""
    params = quant_params(dequantize)
    if dequantize is None or params is None:
        return "its weight is not quantized"
    value = dequantize.inputs[0]
    assert value is not None
    if value.const_value is None or params.scales is None or params.zeros is None:
        return "both its operands are activations"
    shape = value.const_value.shape.numpy()
    if len(shape) != 2 or 0 in shape:
        return f"its weight has shape {list(shape)}, only matrices have kernels"
    if params.type.storage not in (ir.DataType.INT8, ir.DataType.UINT8):
        return f"its weight is {params.type.storage.name}, under activations with one scale"
    if params.type.granularity not in (PerTensor(), *map(PerAxis, _columns(turn))):
        return f"its weight has a scale per {params.type.granularity}, not per column"
    scale: ir.Value | NDArray[np.float32] = params.scale
    width = shape[0] if turn else shape[1]
    if params.is_per_tensor or alpha != 1.0:
        scale = np.full(width, params.scales * np.float32(alpha), np.float32)
    if not turn and params.type.storage is ir.DataType.INT8 and params.type.symmetric:
        return _Matrix(value, scale)
    wide = np.asarray(constant(value), np.int16)
    wide = np.ascontiguousarray(wide.T) if turn else wide
    zeros = np.full(width, params.zeros, np.int16)
    centred = wide - zeros
    if centred.min() >= -128 and centred.max() <= 127:
        return _Matrix(centred.astype(np.int8), scale)
    if params.type.storage is ir.DataType.INT8:
        return _Matrix((wide + 128).astype(np.uint8), scale, (zeros + 128).astype(np.uint8))
    return _Matrix(value if not turn else wide.astype(np.uint8), scale, zeros.astype(np.uint8))


def _columns(turn: bool) -> tuple[int, int]:
    """How the axis of the result's columns may be written."""
    return (0, -2) if turn else (1, -1)


def _activation(graph: ir.Graph, node: ir.Node, params: QuantParams) -> list[ir.Value | None]:
    dequantize = dequantize_of(node.inputs[0])
    assert dequantize is not None
    zero = params.zero_point
    if zero is None:
        zero = new_initializer(graph, f"{node.name}_zero_point", np.zeros((), np.uint8))
    return [dequantize.inputs[0], params.scale, zero]


def _initializers(graph: ir.Graph, node: ir.Node, weight: _Matrix) -> list[ir.Value]:
    parts = [("weight", weight.stored), ("scale", weight.scale)]
    if weight.zeros is not None:
        parts.append(("weight_zero_point", weight.zeros))
    return [
        part if isinstance(part, ir.Value) else new_initializer(graph, f"{node.name}_{stem}", part)
        for stem, part in parts
    ]

"""What ONNX Runtime makes of the pairs that are not folded, as a reason on each node.

    Q(Add(DQ(a), DQ(b)))   =>   QLinearAdd, when ORT loads the model

ORT fuses an op between pairs by itself if every input is dequantized and every result quantized,
each with one scale; else the op computes in float.  Part of `fold_qdq`.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.decisions import Action
from qcompiler.ir.graph import dequantize_of, only_consumer
from qcompiler.ir.params import quant_params
from qcompiler.ir.types import PerAxis, PerGroup, PerTensor

__all__ = ["FUSED_BY_ORT", "MOVES", "left_to_ort"]

FUSED_BY_ORT = {
    "Add": "QLinearAdd", "Mul": "QLinearMul", "Sigmoid": "QLinearSigmoid", "Where": "QLinearWhere",
    "LeakyRelu": "QLinearLeakyRelu", "Softmax": "QLinearSoftmax", "Concat": "QLinearConcat",
    "AveragePool": "QLinearAveragePool", "GlobalAveragePool": "QLinearGlobalAveragePool",
    "MatMul": "QLinearMatMul", "Gemm": "QGemm", "Conv": "QLinearConv",
}  # fmt: skip
"""The integer op that ORT 1.31 fuses each op between pairs to."""

_WEIGHTED = frozenset({"MatMul", "Gemm", "Conv"})
"""Whose other operands may be weights, with a scale per column or channel."""

MOVES = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Gather", "Slice", "Split", "Expand",
    "MaxPool", "Resize", "Identity",
})  # fmt: skip
"""Ops whose results are elements of their data."""


def left_to_ort(node: ir.Node) -> tuple[Action, str] | None:
    """Who computes a node that reads dequantized values or converts, and why; None for others."""
    if node.op_type == "QuantizeLinear":
        if (source := dequantize_of(node.inputs[0])) is not None:
            return "qdq", f"another scale than that of {source.name}: requantized in two nodes"
        return "qdq", "where floats become integers"
    if node.op_type == "DequantizeLinear":
        return "qdq", "where integers become floats"
    data = [v for v in node.inputs if v is not None and v.dtype in (None, ir.DataType.FLOAT)]
    widened = [value for value in data if dequantize_of(value) is not None]
    if not widened:
        return None
    reader = only_consumer(node.outputs[0])
    before, after = quant_params(dequantize_of(node.inputs[0])), quant_params(reader)
    if node.op_type in MOVES:
        if before is not None and after is not None and before.equals(after):
            return "qdq", "moves what is stored: ORT drops the pairs around it"
        return "float", "moves what was dequantized: its result is not quantized by the same scale"
    if node.op_type not in FUSED_BY_ORT:
        return "float", f"no integer form of {node.op_type} in ORT: computes what was dequantized"
    if node.op_type == "MatMul" and widened == data[1:] and _is_matrix(data[1]):
        return "qdq", "its weights stay as they are stored: ORT's own MatMulNBits"
    if len(widened) < len(data):
        return "float", "not all of its operands are quantized, as ORT's integer form needs"
    operands = data[:1] if node.op_type in _WEIGHTED else data
    if not all(map(_has_one_scale, operands)):
        return "float", "its operands have more than one scale each: no integer form in ORT"
    if reader is not None and reader.op_type == "QuantizeLinear":
        return "qdq", f"ORT's own {FUSED_BY_ORT[node.op_type]}"
    if node.op_type == "MatMul":
        return "qdq", "ORT's own MatMulIntegerToFloat"
    return "float", "its result is not quantized, as ORT's integer form needs"


def _is_matrix(value: ir.Value) -> bool:
    """Whether a weight is one that ORT multiplies as it is stored: scales per column or group."""
    node = dequantize_of(value)
    params = quant_params(node)
    if params is None or node is None or node.inputs[0] is None:
        return False
    if node.inputs[0].const_value is None or len(node.inputs[0].const_value.shape) != 2:
        return False
    match params.type.granularity:
        case PerTensor():
            return True
        case PerAxis(axis):
            return axis % 2 == 1
        case PerGroup(axis, _):
            return axis % 2 == 0


def _has_one_scale(value: ir.Value) -> bool:
    params = quant_params(dequantize_of(value))
    return params is not None and params.is_per_tensor

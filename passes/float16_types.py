"""Which operands and results of a node are float16 where it computes in float16.

Those whose type, by the op's ONNX schema, may be FLOAT and FLOAT16 alike: Resize(x, roi, scales)
takes x in float16, and scales, which the schema wants in FLOAT.  Part of `convert_float16`.
"""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir

from qcompiler.ir import dialect

__all__ = ["HALF_OPS", "IN_HALF", "following_inputs", "following_outputs", "reads_any_type"]

HALF_OPS = frozenset({
    "Abs", "Add", "ArgMax", "ArgMin", "AveragePool", "BatchNormalization", "Cast", "Ceil", "Clip",
    "Compress", "Concat", "Conv", "ConvTranspose", "Cos", "CumSum", "DepthToSpace",
    "DequantizeLinear", "Div", "Dropout", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand",
    "Flatten", "Floor", "GRU", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm",
    "GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish",
    "Identity", "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM", "LayerNormalization",
    "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "MatMul", "Max", "MaxPool", "Min",
    "Mod", "Mul", "Neg", "NonZero", "OneHot", "PRelu", "Pad", "Pow", "RNN", "Reciprocal",
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize",
    "ReverseSequence", "Round", "ScatterElements", "ScatterND", "Selu", "Shape", "Shrink",
    "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth",
    "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Tile", "TopK",
    "Transpose", "Trilu", "Unsqueeze", "Where",
})  # fmt: skip
"""Ops that ONNX Runtime's CUDA provider has float16 kernels of, by its list of kernels; the CPU
provider runs each of them too, between casts where it has none."""

IN_HALF = frozenset({
    "QConvW8A8", "QMatMulFp8", "QMatMulW8A8", "Quantize", "QuantizeFp8", "QuantizeImage",
})  # fmt: skip
"""Ops of ours that GPUs have kernels of whose floats are float16, and none of float32."""

_STAY = {"Resize": (1,)}
"""Operands that the schema takes in float16, and ONNX Runtime only in float32: roi."""

_ANY = frozenset({"Shape", "Size", "Cast"})


def reads_any_type(node: ir.Node) -> bool:
    """Whether it does not matter to a node which float type it reads."""
    return node.domain == "" and node.op_type in _ANY


def following_inputs(node: ir.Node, opset: int) -> list[int]:
    """The operands that are float16 where `node` computes in float16."""
    if dialect.is_ours(node.domain):
        return [i for i, value in enumerate(node.inputs) if _is_float(value)]
    schema = _schema(node.op_type, opset)
    formal = [_may_be_half(schema, parameter) for parameter in schema.inputs]
    stay = _STAY.get(node.op_type, ())
    return [
        i
        for i, value in enumerate(node.inputs)
        if _is_float(value) and i not in stay and formal and formal[min(i, len(formal) - 1)]
    ]


def following_outputs(node: ir.Node, opset: int) -> list[ir.Value]:
    """The results that are float16 then."""
    if dialect.is_ours(node.domain):
        return [value for value in node.outputs if _is_float(value)]
    schema = _schema(node.op_type, opset)
    formal = [_may_be_half(schema, parameter) for parameter in schema.outputs]
    return [
        value
        for i, value in enumerate(node.outputs)
        if _is_float(value) and formal[min(i, len(formal) - 1)]
    ]


def _is_float(value: ir.Value | None) -> bool:
    tensor = value is not None and isinstance(value.type, ir.TensorType)
    return tensor and value is not None and value.dtype is ir.DataType.FLOAT


@functools.cache
def _schema(op: str, opset: int) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(op, opset, "")


def _may_be_half(schema: onnx.defs.OpSchema, parameter: onnx.defs.OpSchema.FormalParameter) -> bool:
    allowed = {
        name
        for constraint in schema.type_constraints
        if constraint.type_param_str == parameter.type_str
        for name in constraint.allowed_type_strs
    }
    return {"tensor(float)", "tensor(float16)"} <= allowed

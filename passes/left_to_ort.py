"""What ONNX Runtime makes of the pairs that are not folded, as a reason on each node.

    Q(Add(DQ(a), DQ(b)))   =>   QLinearAdd, when ORT loads the model

ORT fuses an op between pairs by itself if every input is dequantized and every result quantized,
each with one scale and stored in 8 bits of the same sign; else the op computes in float.
Part of `fold_qdq`.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.decisions import Action
from qcompiler.ir.graph import dequantize_of, only_consumer
from qcompiler.ir.params import quant_params
from qcompiler.ir.types import PerAxis, PerGroup, PerTensor

__all__ = ["FUSED_BY_ORT", "MOVES", "left_to_ort", "misfit", "moves_stored", "reads_16_bits"]

FUSED_BY_ORT = {
    "Add": "QLinearAdd", "Mul": "QLinearMul", "Sigmoid": "QLinearSigmoid", "Where": "QLinearWhere",
    "LeakyRelu": "QLinearLeakyRelu", "Softmax": "QLinearSoftmax", "Concat": "QLinearConcat",
    "AveragePool": "QLinearAveragePool", "GlobalAveragePool": "QLinearGlobalAveragePool",
    "MatMul": "QLinearMatMul", "Gemm": "QGemm", "Conv": "QLinearConv",
}  # fmt: skip
"""The integer op that ORT 1.31 fuses each op between pairs to."""

_FLOAT_INSIDE = {
    "LSTM": "ORT's DynamicQuantizeLSTM rounds its activations too, and the state in each step",
    "GRU": "ORT has none of integers, only LSTMs with rounded activations",
    "RNN": "ORT has none of integers, only LSTMs with rounded activations",
}
"""Why ops whose weights others quantize compute in float."""

_WEIGHTED = frozenset({"MatMul", "Gemm", "Conv"})
"""Whose other operands may be weights, with a scale per column or channel."""

MOVES = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Gather", "Slice", "Split", "Expand",
    "MaxPool", "Resize", "Identity", "Tile", "DepthToSpace",
})  # fmt: skip
"""Ops whose results are elements of their data, if a Resize takes the nearest."""

_MOVES_8_BITS = frozenset({"MaxPool", "Resize", "DepthToSpace"})
"""Around which ORT 1.31 drops no pairs of 16 bits."""

_MOVES_STORED = MOVES | {"Pad", "Concat", "SpaceToDepth"}
_QUANTIZES = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"})
_WIDENED = "moves what was dequantized"
_8_BITS = (ir.DataType.INT8, ir.DataType.UINT8)
_16_BITS = (ir.DataType.INT16, ir.DataType.UINT16)


def left_to_ort(node: ir.Node) -> tuple[Action, str] | None:
    """Who computes a node that reads dequantized values or converts, and why; None for others."""
    if node.op_type == "QuantizeLinear":
        if (source := dequantize_of(node.inputs[0])) is not None:
            return "qdq", f"another scale than that of {source.name}: requantized in two nodes"
        return "qdq", "where floats become integers"
    if node.op_type == "DequantizeLinear":
        return "qdq", "where integers become floats"
    if node.op_type == "DynamicQuantizeLinear":
        return "qdq", "where floats become integers, by a scale of each run"
    if moves_stored(node):
        return "qdq", "moves stored integers"
    inputs = _alternatives(node) if node.op_type == "Where" else node.inputs
    data = [v for v in inputs if v is not None and v.dtype in (None, ir.DataType.FLOAT)]
    widened = [value for value in data if dequantize_of(value) is not None]
    if not widened:
        return None
    if node.op_type in MOVES and not _interpolates(node):
        return _mover(node)
    if (why := _FLOAT_INSIDE.get(node.op_type)) is not None:
        return "float", f"{why}: computes what was dequantized"
    if node.op_type not in FUSED_BY_ORT:
        return "float", f"no integer form of {node.op_type} in ORT: computes what was dequantized"
    if (found := _matmul_nbits(node, widened == data[1:])) is not None:
        return found
    if len(widened) < len(data):
        return "float", "not all of its operands are quantized, as ORT's integer form needs"
    if (why := misfit(node)) is not None:
        return "float", f"{why}: no integer form in ORT"
    reader = only_consumer(node.outputs[0])
    if reader is not None and reader.op_type != "QuantizeLinear":
        reader = None
    if reader is None and node.op_type not in ("MatMul", "Gemm"):
        return "float", "its result is not quantized, as ORT's integer form needs"
    if (why := _not_fused(node, data, reader)) is not None:
        return "float", f"{why}: computes what was dequantized"
    if reader is None and node.op_type == "MatMul":
        maker = data[0].producer().inputs[0].producer()  # type: ignore[union-attr]
        dynamic = maker is not None and maker.op_type == "DynamicQuantizeLinear"
        return "qdq", f"ORT's own {'DynamicQuantizeMatMul' if dynamic else 'MatMulIntegerToFloat'}"
    return "qdq", f"ORT's own {FUSED_BY_ORT[node.op_type]}"


def _mover(node: ir.Node) -> tuple[Action, str]:
    """Who computes a node that moves what was dequantized."""
    before = quant_params(dequantize_of(node.inputs[0]))
    after = quant_params(only_consumer(node.outputs[0]))
    if before is None or after is None or not before.equals(after):
        return "float", f"{_WIDENED}: its result is not quantized by the same scale"
    if node.op_type in _MOVES_8_BITS and before.type.storage not in _8_BITS:
        return "float", f"{_WIDENED}: ORT keeps pairs of {before.type.storage.name}"
    return "qdq", "moves what is stored: ORT drops the pairs around it"


def _matmul_nbits(node: ir.Node, float_activations: bool) -> tuple[Action, str] | None:
    """That ORT multiplies floats, or from 1.32 what 16 bits stand for, by a matrix of few bits."""
    plain = node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes)
    if not plain or len(node.inputs) > 2 or not _is_matrix(node.inputs[1]):
        return None
    if any(use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses()):
        return None
    stored = _storage(dequantize_of(node.inputs[0]))
    if not float_activations and stored not in _16_BITS:
        return None
    rounded = "" if float_activations else ", its activations rounded to 8 bits"
    return "qdq", f"its weights stay as they are stored{rounded}: ORT's own MatMulNBits"


def reads_16_bits(node: ir.Node) -> bool:
    """Whether a product multiplies what 16 bits stand for by a matrix that ORT could read stored.

    ORT 1.32 makes MatMulNBits of it, which rounds its activations to 8 bits.
    """
    return (
        node.op_type == "MatMul"
        and _storage(dequantize_of(node.inputs[0])) in _16_BITS
        and _is_matrix(node.inputs[1])
    )


def misfit(node: ir.Node) -> str | None:
    """Why ORT's integer form of an op between pairs computes something else; None: it does not.

    That form has one scale for each operand and for the result, but for weights, which may have one
    per column or output channel.
    """
    if all(node.attributes.get_int(name, 0) for name in ("ceil_mode", "count_include_pad")):
        return "it does not count what its last windows cover behind the padding, as that form does"
    weighted = node.op_type in _WEIGHTED
    operands = node.inputs[:1] if weighted else node.inputs
    pairs = [quant_params(dequantize_of(value)) for value in operands]
    if any(pair is not None and not pair.is_per_tensor for pair in pairs):
        return "its operands have more than one scale each"
    if weighted and (weight := quant_params(dequantize_of(node.inputs[1]))) is not None:
        match weight.type.granularity:
            case PerAxis(axis) if node.op_type == "Gemm" or axis == _axis_of_results(node):
                pass
            case PerAxis() | PerGroup():
                return f"its weight has a scale per {weight.type.granularity}"
        if _is_empty(node.inputs[1]):
            return "its weight is empty, which ORT multiplies to anything"
    readers = [quant_params(use.node) for use in node.outputs[0].uses()]
    if any(reader is not None and not reader.is_per_tensor for reader in readers):
        return "its result has more than one scale"
    return None


def _is_empty(weight: ir.Value | None) -> bool:
    return weight is not None and weight.shape is not None and 0 in weight.shape


def _axis_of_results(node: ir.Node) -> int:
    """The axis of a weight along which the results lie, as the axis of its pair is written."""
    shape = None if node.inputs[1] is None else node.inputs[1].shape
    if node.op_type == "Conv" or shape is None:
        return 0
    return len(shape) - 1


def _alternatives(where: ir.Node) -> list[ir.Value | None]:
    """What a Where chooses from, but for a constant of rank 0: ORT 1.31 quantizes that."""
    return [
        value
        for value in where.inputs[1:]
        if value is None or value.const_value is None or value.const_value.shape.rank() > 0
    ]


def _interpolates(node: ir.Node) -> bool:
    return node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "nearest"


def moves_stored(node: ir.Node) -> bool:
    """Whether a node moves integers that were quantized before it, or are dequantized behind it."""
    data = node.inputs[0] if node.op_type in _MOVES_STORED and node.inputs else None
    if data is None or node.domain or data.dtype not in (*_8_BITS, *_16_BITS):
        return False
    return _was_quantized(data) or any(map(_is_dequantized, node.outputs))


def _was_quantized(value: ir.Value) -> bool:
    node = value.producer()
    while node is not None and node.op_type in _MOVES_STORED and node.inputs[0]:
        node = node.inputs[0].producer()
    return node is not None and (node.op_type in _QUANTIZES or node.domain != "")


def _is_dequantized(value: ir.Value) -> bool:
    found = [value]
    for current in found:
        for node in (use.node for use in current.uses()):
            if node.op_type == "DequantizeLinear":
                return True
            if node.op_type in _MOVES_STORED:
                found += [output for output in node.outputs if output not in found]
    return False


def _not_fused(node: ir.Node, data: list[ir.Value], reader: ir.Node | None) -> str | None:
    """Why what the operands and the result are stored as fits no integer form in ORT 1.31."""
    operands = data[:2] if node.op_type in _WEIGHTED else data
    stored = [_storage(dequantize_of(value)) for value in operands]
    result = None if reader is None else _storage_of_result(reader)
    if node.op_type not in _WEIGHTED:
        kinds = {*stored, result}
        fits = len(kinds) == 1 and kinds <= {*_8_BITS}
    else:
        fits = {stored[0], result} <= {ir.DataType.UINT8, None} and stored[1] in _8_BITS
        without = [v for v in operands if len(v.producer().inputs) < 3]  # type: ignore[union-attr]
        if node.op_type == "Gemm" and without:
            return "ORT's QGemm needs zero points"
    if fits:
        return None
    names = [kind.name for kind in (*stored, result) if kind is not None]
    return f"no integer form in ORT of {' and '.join(dict.fromkeys(names))}"


def _storage(widened: ir.Node | None) -> ir.DataType | None:
    """What a DequantizeLinear reads, once ORT has made pairs of int8 that are alone uint8."""
    stored = widened.inputs[0] if widened is not None else None
    if widened is None or stored is None:
        return None
    quantize = stored.producer()
    if stored.dtype is ir.DataType.INT8 and quantize is not None and _is_alone(quantize, widened):
        return ir.DataType.UINT8
    return stored.dtype


def _storage_of_result(quantize: ir.Node) -> ir.DataType | None:
    widened = only_consumer(quantize.outputs[0])
    if widened is not None and widened.op_type == "DequantizeLinear":
        return _storage(widened)
    return quantize.outputs[0].dtype


def _is_alone(quantize: ir.Node, widened: ir.Node) -> bool:
    """Whether nothing else reads what a pair stores, and one node at most what it widens."""
    result = widened.outputs[0]
    return (
        quantize.op_type == "QuantizeLinear"
        and len(quantize.inputs) == len(widened.inputs) == 3
        and only_consumer(quantize.outputs[0]) is widened
        and len(result.uses()) + result.is_graph_output() <= 1
    )


def _is_matrix(value: ir.Value | None) -> bool:
    """Whether a weight is one that ORT multiplies as it is stored: scales per column or group."""
    node = dequantize_of(value)
    params = quant_params(node)
    if params is None or node is None or node.inputs[0] is None:
        return False
    if node.inputs[0].const_value is None or len(node.inputs[0].const_value.shape) != 2:
        return False
    if params.type.is_float or params.type.storage.bitwidth > 8:
        return False
    match params.type.granularity:
        case PerTensor():
            return True
        case PerAxis(axis):
            return axis % 2 == 1
        case PerGroup(axis, size):
            return axis % 2 == 0 and size >= 16 and size & (size - 1) == 0

"""Keep ONNX Runtime from dequantizing constants at every run.

1. LayerNormalization(x, DQ(g), DQ(b))   =>   LayerNormalization(x, g', b')
2. LSTM(x, DQ(w, s, z), DQ(r, t))        =>   LSTM(x, (Cast(w) - z) * s, Cast(r) * t)
3. MatMul(DQ(x16), DQ(w, s))             =>   MatMul(DQ(x16), Cast(w) * s)

Exact.  ORT folds no DequantizeLinear of a constant, because it may become part of an integer op; an
LSTM of int8 weights then takes 1.8 times as long as one of floats, a convolution of floats by int8
weights 1.4 times, ConvTranspose 1.1 times.  A Cast and a Mul it does fold, when it opens the model:
so weights stay as small in the file as they came (2), and what is small anyway becomes floats (1).
Of 3 ORT 1.32 made MatMulNBits, which rounds the activations of 16 bits to 8.  Floats keep all, and
take 0.3 times as long for 128 rows, as long for 16, twice as long for one (384x1536, AVX2). With
VNNI a whole model takes 1.1 to 1.4 times as long: where that is timed, it is left to ORT after all.
Left as they are: what becomes part of an integer op, and other matrices and tables, most of a
model's bytes, which ORT mostly reads as they are stored.  Part of `fold_qdq`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import broadcast_scale
from qcompiler.ir.decisions import add_note, decide, inherit
from qcompiler.ir.graph import (
    constant,
    dequantize_of,
    new_initializer,
    only_consumer,
    replace_nodes,
)
from qcompiler.ir.params import QuantParams, quant_params
from qcompiler.ir.types import PerGroup
from qcompiler.passes.left_to_ort import MOVES, left_to_ort, reads_16_bits

__all__ = ["dequantized_constant", "try_widen_constant"]

_MOST_OF_A_MODEL = frozenset({"MatMul", "Gather"})
_ROUNDED = frozenset({"Conv", "ConvTranspose", "Gemm"})
_WEIGHTED = _ROUNDED | {"LSTM", "GRU", "RNN", "Einsum"}
_SMALL = 1024
"""Elements up to which a constant may take four times the bytes."""
_WIDE = "16 bits, of which ORT's MatMulNBits would keep 8"
_FUSED_WITH_A_CONSTANT = frozenset({"Add", "Sub", "Mul", "Div", "BatchNormalization"})
_MOVED_OR_CLIPPED = MOVES | {"Relu", "Clip", "Pad", "Dropout", "Cast"}


def dequantized_constant(value: ir.Value | None) -> NDArray[np.float32] | None:
    """The floats of a constant, or of one behind a DQ; None if they cannot be known before a run.

    Equal to the last bit to what the DQ computes.
    """
    node = dequantize_of(value)
    params = quant_params(node)
    if node is None or params is None:
        return constant(value)
    stored, scales, zeros = constant(node.inputs[0]), params.scales, params.zeros
    if stored is None or scales is None or zeros is None:
        return None
    if params.type.expressed is not ir.DataType.FLOAT:
        return None
    granularity = params.type.granularity
    if np.any(zeros):
        if zeros.size > 1:
            zeros = broadcast_scale(zeros, stored.shape, granularity)
        stored = stored.astype(np.int64) - zeros.astype(np.int64)
    floats = stored.astype(np.float32)
    floats *= broadcast_scale(scales, stored.shape, granularity)
    return floats


def try_widen_constant(graph: ir.Graph, node: ir.Node, *, keep_16_bits: bool = True) -> bool:
    """Replace a DQ over a constant by what ORT folds, if all that read it compute in float.

    Args:
        graph: Where constants go.
        node: Any.
        keep_16_bits: Let products of activations of 16 bits compute in float, see 3 above.
    """
    if node.op_type != "DequantizeLinear":
        return False
    value, params = node.inputs[0], quant_params(node)
    if value is None or value.const_value is None or params is None:
        return False
    if isinstance(params.type.granularity, PerGroup) or node.outputs[0].is_graph_output():
        return False
    readers = list(dict.fromkeys(use.node for use in node.outputs[0].uses()))
    is_bias = value.dtype is ir.DataType.INT32
    if not (readers and all(_reads_floats(r, is_bias, keep_16_bits) for r in readers)):
        return False
    floats = dequantized_constant(node.outputs[0])
    if floats is None:
        return False
    products = [] if is_bias else [reader for reader in readers if reads_16_bits(reader)]
    weighted = all(reader.op_type in _WEIGHTED or reader in products for reader in readers)
    if floats.size > _SMALL and not is_bias and weighted:
        _store(graph, node, params)
        note = f"its weights stay {value.dtype}, of which ORT makes floats once, not at every run"
    else:
        widened = new_initializer(graph, f"{value.name}_float", floats)
        ir.convenience.replace_all_uses_with(node.outputs[0], widened)
        note = "its constants are kept as floats, or ORT dequantized them every run"
    for product in products:
        decide(product, "float", f"its activations have {_WIDE}: computes what was dequantized")
        if _is_quantized(product.outputs[0]):
            _subtract_bias(graph, product)
    for reader in [] if is_bias else readers:
        add_note(reader, note)
    return True


def _store(graph: ir.Graph, dequantize: ir.Node, params: QuantParams) -> None:
    """Write a DQ as a Cast and a Mul, between them a Sub if there are zero points."""
    stored = dequantize.inputs[0]
    assert stored is not None and stored.const_value is not None
    shape, granularity = tuple(stored.const_value.shape.numpy()), params.type.granularity
    nodes = [ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})]
    for op, stem, array in (("Sub", "zeros", params.zeros), ("Mul", "scales", params.scales)):
        if op == "Mul" or np.any(array):
            floats = np.asarray(array).astype(np.float32)
            operand = broadcast_scale(floats, shape, granularity)
            second = new_initializer(graph, f"{stored.name}_{stem}", operand)
            nodes.append(ir.node(op, [nodes[-1].outputs[0], second]))
    for node in nodes:
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), stored.shape
        decide(node, "qdq", "where integers become floats, once, when ORT opens the model")
    replace_nodes([dequantize], nodes)


def _subtract_bias(graph: ir.Graph, product: ir.Node) -> None:
    """Write x W + b as x W - (-b), the same bits: between pairs ORT rounds a Gemm's weights."""
    add = only_consumer(product.outputs[0])
    if add is None or add.op_type != "Add":
        return
    bias = dequantized_constant(next(v for v in add.inputs if v is not product.outputs[0]))
    if bias is not None:
        negative = new_initializer(graph, f"{add.name}_negative", -bias)
        new = ir.node("Sub", [product.outputs[0], negative], name=add.name)
        inherit(new, add)
        replace_nodes([add], [new])


def _reads_floats(reader: ir.Node, is_bias: bool, keep_16_bits: bool) -> bool:
    if not is_bias and reads_16_bits(reader):
        return keep_16_bits
    found = left_to_ort(reader)
    if found is None or found[0] != "float" or _ort_would_round(reader):
        return False
    return is_bias or reader.op_type not in _MOST_OF_A_MODEL


def _ort_would_round(reader: ir.Node) -> bool:
    """Whether ORT 1.31 quantizes the float weights of an op itself, per tensor: between pairs.

    It does so after it has fused the constants behind a convolution into its weights.
    """
    node = reader if reader.op_type in _ROUNDED else _source(reader.outputs[0])
    if node is None or node.op_type not in _ROUNDED or node.inputs[0] is None:
        return False
    before = _source(node.inputs[0])
    if before is None or before.op_type != "DequantizeLinear":
        return False
    return _is_quantized(node.outputs[0])


def _source(value: ir.Value) -> ir.Node | None:
    """What computes `value`, seen through the ops that ORT removes, moves or fuses."""
    node = value.producer()
    while node is not None and _is_seen_through(node):
        node = next(v for v in node.inputs if not _is_constant(v)).producer()  # type: ignore[union-attr]
    return node


def _is_quantized(value: ir.Value) -> bool:
    """Whether a reader of `value` quantizes it, behind such ops or none."""
    readers = [use.node for use in value.uses()]
    return any(
        node.op_type == "QuantizeLinear"
        or (_is_seen_through(node) and any(map(_is_quantized, node.outputs)))
        for node in readers
    )


def _is_seen_through(node: ir.Node) -> bool:
    others = [value for value in node.inputs if not _is_constant(value)]
    if node.op_type in _FUSED_WITH_A_CONSTANT:
        return len(others) == 1
    return node.op_type in _MOVED_OR_CLIPPED and len(others) > 0


def _is_constant(value: ir.Value | None) -> bool:
    node = dequantize_of(value)
    stored = value if node is None else node.inputs[0]
    return stored is None or stored.const_value is not None

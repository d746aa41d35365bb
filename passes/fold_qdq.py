"""Fold explicit Q/DQ pairs into ops of the dialect; quantization itself stays a node.

1. Per-token pair         DQ(Q(x, s), s)                    =>  q, s = Quantize(x)
2. MatMul, W8A8 or FP8    MatMul(DQ(q, s), DQ(w, ws))       =>  QMatMulW8A8(q, s, w, ws)
                          (an fp8 weight is Cast(w) * ws)
3. MatMul, W4A8           the same with w int4 in groups    =>  QMatMulW4A8(q, s, w, ws)
4. MatMul, W4A16          MatMul(x, DQ(w, ws))              =>  QMatMulW4A16(x, w, ws)
5. Conv                   see `fold_conv`

`s` is the per-token scale that `insert_qdq` computes.  The integers do not change: Quantize divides
by the same scale.  What is left as Q/DQ is what ORT fuses by itself or runs in float.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decide, decision_of, inherit
from qcompiler.ir.graph import constant, dequantize_of, replace_nodes
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.fold_conv import try_fold_conv

__all__ = ["FoldQDQ"]

_MATMUL = {
    (ir.DataType.INT8, ir.DataType.INT8): "QMatMulW8A8",
    (ir.DataType.INT8, ir.DataType.INT4): "QMatMulW4A8",
    (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FN): "QMatMulFp8",
}


_TOP = {ir.DataType.INT8: 127.0, ir.DataType.FLOAT8E4M3FN: 448.0}
"""The stored value that a token's largest magnitude is mapped to."""


class FoldQDQ(ir.passes.InPlacePass):
    """Replace the pairs around MatMul and Conv by `qcompiler` ops."""

    def __init__(self) -> None:
        super().__init__()
        self._quantized: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every pair that has an integer form, and say which planned nodes were not."""
        self._quantized = {}
        folded = 0
        for node in list(model.graph.all_nodes()):
            done = (
                self._try_fold_matmul(node)
                if node.op_type == "MatMul"
                else node.op_type == "Conv" and try_fold_conv(model.graph, node)
            )
            folded += done
            if not done and node.op_type in ("MatMul", "Conv") and _is_planned(node):
                why = "planned, but its surroundings did not let it be folded"
                decide(node, "float", why, expected=False)
        if folded:
            common.RemoveUnusedNodesPass()(model)
            FixNames()(model)
            dialect.declare(model)
        return ir.passes.PassResult(model, folded > 0)

    def _try_fold_matmul(self, node: ir.Node) -> bool:
        weight, pair = _matrix_weight(node.inputs[1]), _token_pair(node.inputs[0])
        if weight is None:
            return False
        stored, scale, block = weight
        assert stored.dtype is not None
        if pair is None:
            x = node.inputs[0]
            is_float = x is not None and x.dtype is ir.DataType.FLOAT and dequantize_of(x) is None
            if stored.dtype is not ir.DataType.INT4 or not block or not is_float:
                return False
            inputs, op = [x, stored, scale], "QMatMulW4A16"
        else:
            activation = pair.outputs[0].dtype
            assert activation is not None
            name = _MATMUL.get((activation, stored.dtype))
            if name is None or bool(block) != (name == "QMatMulW4A8"):
                return False
            inputs, op = [*self._quantize(pair), stored, scale], name
        attributes = {"block_size": block} if block else {}
        new = ir.node(op, inputs, attributes, domain=dialect.DOMAIN, version=dialect.VERSION)
        inherit(new, node)
        replace_nodes([node], [new])
        dialect.type_results(new, op)
        decide(new, "body", "folded, no kernel bound yet")
        return True

    def _quantize(self, pair: ir.Node) -> tuple[ir.Value, ir.Value]:
        """The (q, s) of a Quantize that equals the per-token `pair`, one for all its readers."""
        stored = pair.outputs[0]
        if stored not in self._quantized:
            self._quantized[stored] = _insert_quantize(pair)
        return self._quantized[stored]


def _is_planned(node: ir.Node) -> bool:
    return decision_of(node).action == "qdq"


def _token_pair(value: ir.Value | None) -> ir.Node | None:
    """The QuantizeLinear of a dynamic per-token pair that makes `value`, if one does."""
    widened = dequantize_of(value)
    stored = widened.inputs[0] if widened is not None else None
    quantize = stored.producer() if stored is not None else None
    if widened is None or quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    if len(quantize.inputs) != 2 or len(widened.inputs) != 2:
        return None
    axes = {node.attributes.get_int("axis", 1) for node in (quantize, widened)}
    blocks = {node.attributes.get_int("block_size", 0) for node in (quantize, widened)}
    if widened.inputs[1] is not quantize.inputs[1] or axes != {-1} or len(blocks) != 1:
        return None
    return quantize if _has_token_scale(quantize, blocks.pop()) else None


def _insert_quantize(pair: ir.Node) -> tuple[ir.Value, ir.Value]:
    data, scale = pair.inputs
    depth = pair.attributes.get_int("block_size")
    assert data is not None and scale is not None and pair.graph is not None
    fp8 = pair.outputs[0].dtype is ir.DataType.FLOAT8E4M3FN
    new = ir.node(
        "QuantizeFp8" if fp8 else "Quantize",
        [data],
        {"block_size": depth},
        num_outputs=2,
        domain=dialect.DOMAIN,
        version=dialect.VERSION,
        name=pair.name,
    )
    q, s = new.outputs
    q.name, q.shape = f"{data.name}_q", data.shape
    q.dtype = ir.DataType.FLOAT8E4M3FN if fp8 else ir.DataType.UINT8
    s.name, s.dtype, s.shape = f"{data.name}_s", ir.DataType.FLOAT, scale.shape
    decide(new, "body", "folded, no kernel bound yet")
    pair.graph.insert_before(pair, new)
    return q, s


def _matrix_weight(value: ir.Value | None) -> tuple[ir.Value, ir.Value, int] | None:
    """Stored values, scale and group size (0: per column) of a constant symmetric [K, N]."""
    node = value.producer() if value is not None else None
    if node is None or len(node.inputs) != 2:
        return None
    stored, scale, block, axis = node.inputs[0], node.inputs[1], 0, 1
    if node.op_type == "DequantizeLinear":
        block = node.attributes.get_int("block_size", 0)
        axis = node.attributes.get_int("axis", 1) % 2
    else:
        widen = stored.producer() if stored is not None else None
        if node.op_type != "Mul" or widen is None or widen.op_type != "Cast":
            return None
        stored = widen.inputs[0]
    if stored is None or stored.const_value is None or len(stored.const_value.shape) != 2:
        return None
    if scale is None or scale.const_value is None:
        return None
    k, n = stored.const_value.shape.numpy()
    expected = (-(-k // block), n) if block else (n,)
    fits = axis == (0 if block else 1) and scale.const_value.shape.numpy() == expected
    return (stored, scale, block) if fits else None


def _has_token_scale(quantize: ir.Node, depth: int) -> bool:
    """Whether the scale is Div(Max(Slice(ReduceMax(Abs(x))), tiny), top) over the last axis."""
    data, value = quantize.inputs
    chain = []
    for op in ("Div", "Max", "Slice", "ReduceMax", "Abs"):
        node = value.producer() if value is not None else None
        if node is None or node.op_type != op:
            return False
        chain.append(node)
        value = node.inputs[0]
    stored = quantize.outputs[0].dtype
    top = _TOP.get(stored) if stored is not None else None
    last = data.shape[-1] if data is not None and data.shape is not None else None
    division, bounded, column, reduced, _ = chain
    return (
        value is data
        and depth > 0
        and last in (depth, None)
        and top is not None
        and _holds(division.inputs[1], top)
        and _holds(bounded.inputs[1], dialect.SMALLEST_MAGNITUDE)
        and [constant(v) for v in column.inputs[1:4]] == [[0], [1], [-1]]
        and _holds(reduced.inputs[1], -1)
        and reduced.attributes.get_int("keepdims", 1) == 1
    )


def _holds(value: ir.Value | None, number: float) -> bool:
    array = constant(value)
    return (
        array is not None
        and array.size == 1
        and bool(np.float32(array.item()) == np.float32(number))
    )

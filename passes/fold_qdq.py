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

import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decide, inherit
from qcompiler.ir.graph import constant, dequantize_of, replace_nodes
from qcompiler.passes.fold_conv import try_fold_conv

__all__ = ["FoldQDQ"]

_MATMUL = {
    (ir.DataType.INT8, ir.DataType.INT8): "QMatMulW8A8",
    (ir.DataType.INT8, ir.DataType.INT4): "QMatMulW4A8",
    (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FN): "QMatMulFp8",
}


class FoldQDQ(ir.passes.InPlacePass):
    """Replace the pairs around MatMul and Conv by `qcompiler` ops."""

    def __init__(self) -> None:
        super().__init__()
        self._quantized: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every pair that has an integer form."""
        self._quantized = {}
        folded = 0
        for node in list(model.graph.all_nodes()):
            if node.op_type == "MatMul":
                folded += self._try_fold_matmul(node)
            elif node.op_type == "Conv":
                folded += try_fold_conv(model.graph, node)
        if folded:
            common.RemoveUnusedNodesPass()(model)
            dialect.declare(model)
        return ir.passes.PassResult(model, folded > 0)

    def _try_fold_matmul(self, node: ir.Node) -> bool:
        weight = _matrix_weight(node.inputs[1])
        if weight is None:
            return False
        stored, scale, block = weight
        assert stored.dtype is not None
        pair = self._try_quantize(node, node.inputs[0])
        if pair is None:
            if stored.dtype is not ir.DataType.INT4 or dequantize_of(node.inputs[0]):
                return False
            inputs, op = [node.inputs[0], stored, scale], "QMatMulW4A16"
        else:
            activation, quantized = pair
            name = _MATMUL.get((activation, stored.dtype))
            if name is None or bool(block) != (name == "QMatMulW4A8"):
                return False
            inputs, op = [*quantized, stored, scale], name
        attributes = {"block_size": block} if block else {}
        new = ir.node(op, inputs, attributes, domain=dialect.DOMAIN, version=dialect.VERSION)
        _replace(node, new)
        decide(new, "body", "folded, no kernel bound yet")
        return True

    def _try_quantize(
        self,
        reader: ir.Node,
        value: ir.Value | None,
    ) -> tuple[ir.DataType, tuple[ir.Value, ir.Value]] | None:
        """The storage and the (q, s) of a `Quantize` equal to the per-token pair behind `value`."""
        widened = dequantize_of(value)
        quantize = widened.inputs[0].producer() if widened and widened.inputs[0] else None
        if quantize is None or quantize.op_type != "QuantizeLinear" or len(quantize.inputs) != 2:
            return None
        data, scale = quantize.inputs
        assert widened is not None and data is not None and scale is not None
        depth = quantize.attributes.get_int("block_size", 0)
        if widened.inputs[1] is not scale or not _is_token_scale(scale, data, depth):
            return None
        stored = quantize.outputs[0]
        assert stored.dtype is not None
        if stored not in self._quantized:
            self._quantized[stored] = _insert_quantize(quantize, depth)
        return stored.dtype, self._quantized[stored]


def _insert_quantize(pair: ir.Node, depth: int) -> tuple[ir.Value, ir.Value]:
    data, scale = pair.inputs
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
    fits = scale is not None and scale.const_value is not None and axis == (0 if block else 1)
    return (stored, scale, block) if fits and scale is not None else None


def _is_token_scale(scale: ir.Value, data: ir.Value, depth: int) -> bool:
    """Whether `scale` is Div(Max(Slice(ReduceMax(Abs(data))), tiny), top) over the last axis."""
    chain, value = [], scale
    for op in ("Div", "Max", "Slice", "ReduceMax", "Abs"):
        node = value.producer()
        if node is None or node.op_type != op or node.inputs[0] is None:
            return False
        chain.append(node)
        value = node.inputs[0]
    axes = constant(chain[3].inputs[1])
    last = data.shape[-1] if data.shape is not None and len(data.shape) else None
    return (
        value is data
        and depth > 0
        and last in (depth, None)
        and axes is not None
        and (axes.tolist() == [-1])
    )


def _replace(old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`: same output name, type, users, decision."""
    inherit(new, old)
    replace_nodes([old], [new])

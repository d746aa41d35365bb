"""Fold explicit Q/DQ pairs into ops of the dialect; quantization itself stays a node.

1. Per-token pair         DQ(Q(x, s), s)                    =>  q, s = Quantize(x)
2. MatMul, W8A8 or FP8    MatMul(DQ(q, s), DQ(w, ws))       =>  QMatMulW8A8(q, s, w, ws)
                          (an fp8 weight is Cast(w) * ws)
3. MatMul, W4A8           the same with w int4 in groups    =>  QMatMulW4A8(q, s, w, ws)
4. MatMul, W4A16          MatMul(x, DQ(w, ws))              =>  QMatMulW4A16(x, w, ws)
                          zero points, two levels: see `matrix_weights`; offsets: `fold_offsets`
5. MatMul, Gemm           with one scale: see `fold_matmul`
6. Conv, Gather           see `fold_conv`, for GPUs `fold_image`, and `fold_gather`
7. Other constants        see `widen_constants`
8. Pairs of many scales   see `guard_scales`

`s` is the per-token scale that `insert_qdq` computes; of another a Q remains, see `token_pairs`.
The integers do not change.  What is left as Q/DQ is what ORT fuses by itself or runs in float:
`left_to_ort` says which.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decide, decision_of, inherit, plan_of
from qcompiler.ir.graph import (
    constant,
    dequantize_of,
    every_node,
    remove_unread,
    replace_nodes,
)
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.fold_conv import try_fold_conv
from qcompiler.passes.fold_gather import try_fold_gather
from qcompiler.passes.fold_image import try_fold_image
from qcompiler.passes.fold_matmul import try_fold_matmul
from qcompiler.passes.fold_offsets import add_offsets, insert_group_sums
from qcompiler.passes.guard_scales import try_guard_scales
from qcompiler.passes.left_to_ort import FUSED_BY_ORT, left_to_ort, moves_stored
from qcompiler.passes.matrix_weights import matrix_weight
from qcompiler.passes.node_plans import IMPORTED
from qcompiler.passes.token_pairs import has_token_scale, insert_quantize, token_pair
from qcompiler.passes.widen_constants import try_widen_constant

__all__ = ["FoldQDQ"]

_MATMUL: dict[tuple[ir.DataType | None, ...], str] = {
    (ir.DataType.INT8, ir.DataType.INT8): "QMatMulW8A8",
    (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FN): "QMatMulFp8",
}


_FAMILIES = {
    "MatMul": try_fold_matmul,
    "Gemm": try_fold_matmul,
    "Conv": try_fold_conv,
    "Gather": try_fold_gather,
}

_LEFT = [("qdq", f"ORT's own {FUSED_BY_ORT[op]}") for op in ("MatMul", "Gemm")]


class FoldQDQ(ir.passes.InPlacePass):
    """Replace the pairs around MatMul, Gemm, Conv and Gather by integer ops.

    Attributes:
        left: Why products that ORT makes one integer op of, with the Q of their result, or
            MatMulNBits, are left to it; None if they are not.
        images: Whether convolutions become the ops that GPUs have kernels of.
    """

    def __init__(self, left: str | None = None, images: bool = False) -> None:
        super().__init__()
        self.left, self.images = left, images
        self._quantized: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._sums: dict[tuple[object, ...], ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every pair that has an integer form, and say of the others who computes them."""
        self._quantized, self._sums = {}, {}
        changed = 0
        reasons: dict[ir.Node, str] = {}
        for node in list(every_node(model.graph)):
            if node.op_type in _FAMILIES and node.domain == "" and not moves_stored(node):
                reason = self._try_fold(model.graph, node)
                changed += reason is None
                if reason is not None:
                    reasons[node] = reason
        nodes = list(every_node(model.graph))
        for node in nodes:
            _explain(node, reasons.get(node, ""), self.images)
        changed += sum(try_guard_scales(model.graph, node) for node in nodes)
        keep = self.left is None
        changed += sum(try_widen_constant(model.graph, node, keep_16_bits=keep) for node in nodes)
        if changed:
            remove_unread(model.graph)
            FixNames()(model)
            dialect.declare(model)
        return ir.passes.PassResult(model, changed > 0)

    def _try_fold(self, graph: ir.Graph, node: ir.Node) -> str | None:
        """Fold one node; the reason, and nothing changed, if it cannot be."""
        if node.op_type == "MatMul" and self._try_fold_matmul(node):
            return None
        if self.left is not None and left_to_ort(node) in _LEFT:
            return self.left
        if node.op_type == "Conv" and self.images:
            return try_fold_image(graph, node)
        return _FAMILIES[node.op_type](graph, node)

    def _try_fold_matmul(self, node: ir.Node) -> bool:
        weight, pair = matrix_weight(node.inputs[1]), token_pair(node.inputs[0])
        if weight is None:
            return False
        x, block, few_bits = node.inputs[0], weight.block, weight.op_of_few_bits
        data: tuple[ir.Value | None, ...]
        if pair is None:
            is_float = x is not None and x.dtype is ir.DataType.FLOAT and dequantize_of(x) is None
            if few_bits is None or not is_float:
                return False
            data, op = (x,), f"{few_bits}A16"
        elif few_bits is not None:
            if pair.outputs[0].dtype is not ir.DataType.INT8 or not has_token_scale(pair):
                return False
            data, op = self._quantize(pair), f"{few_bits}A8"
        else:
            name = _MATMUL.get((pair.outputs[0].dtype, weight.stored.dtype))
            if name is None or block or len(weight.operands) > 2 or weight.offsets:
                return False
            data, op = self._quantize(pair), name
        attributes = {"block_size": block} if block else {}
        new = ir.node(
            op, [*data, *weight.operands], attributes,
            domain=dialect.DOMAIN, version=dialect.VERSION,
        )  # fmt: skip
        inherit(new, node)
        added = []
        if weight.offsets:
            added = add_offsets(new, node, self._sums_of(data, block, node), weight.offsets)
        replace_nodes([node], [new, *added])
        dialect.type_results(new, op)
        decide(new, "body", "folded, no kernel bound yet")
        return True

    def _sums_of(self, data: Sequence[ir.Value | None], block: int, node: ir.Node) -> ir.Value:
        """The sums of groups of activations, for all products in a graph that have offsets."""
        key = (data[0], block, node.graph)
        if key not in self._sums:
            self._sums[key] = insert_group_sums(data, block, node)
        return self._sums[key]

    def _quantize(self, pair: ir.Node) -> tuple[ir.Value, ir.Value]:
        """The (q, s) of the per-token `pair`, one for all its readers."""
        stored = pair.outputs[0]
        if stored not in self._quantized:
            self._quantized[stored] = insert_quantize(pair)
        return self._quantized[stored]


def _explain(node: ir.Node, reason: str, images: bool) -> None:
    """Say who computes a node that was not folded, and why."""
    if images and node.op_type == "Conv" and dequantize_of(node.inputs[0]) is not None:
        # ORT has no integers for it there.
        expected = plan_of(node) is None
        decide(node, "float", f"{reason}: computes what was dequantized", expected=expected)
        return
    found = left_to_ort(node)
    if found is None and not reason:
        return
    before, plan = decision_of(node), plan_of(node)
    if found is not None and found[0] == "qdq" and plan is not None and plan.activation is None:
        decide(node, *found)  # as planned: only weights are quantized, and not by an op of ours
    elif reason and (plan is not None or (before.action == "qdq" and found is None)):
        why = "planned, but its surroundings did not let it be folded"
        decide(node, "float", f"{why}: {reason}", expected=False)
    elif found is not None and (before.action == "float" or reason):
        action, why = found
        planned = bool(before.why) and not before.why.startswith(IMPORTED)
        kept = node.op_type in ("Conv", "MatMul") and constant(node.inputs[1]) is not None
        if reason and kept and planned and action == before.action == "float":
            return  # why it was left float says more than what it lacks now
        decide(node, action, f"{reason}: {why}" if reason else why)

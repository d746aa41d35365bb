"""Keep ONNX Runtime from making a Gemm of a product by few bits and what is added to it.

    Add(QMatMulW4A16(x, w, s), y)    =>   Sum(QMatMulW4A16(x, w, s), y)      x [M, K], y [M, N]
    Add(MatMul(x, DQ(w, s)), y)      =>   Sum(MatMul(x, DQ(w, s)), y)        w in groups

ONNX Runtime makes MatMulNBits of a MatMul and a DequantizeLinear of groups.  But where two matrices
are added it makes a Gemm of MatMul and Add before that, and dequantizes the weights of a Gemm in
every run.  It looks for Add, and not for Sum, which computes the same.  Of a vector that is added,
and of products of more than two axes, it makes no Gemm.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.decisions import add_note
from qcompiler.ir.graph import dequantize_of, every_node
from qcompiler.ir.params import quant_params
from qcompiler.ir.types import PerGroup

__all__ = ["KeepFromGemm"]

_PRODUCTS = frozenset({"QMatMulW4A16", "QMatMulW4Z4A16", "QMatMulW4S8A16"})
"""Those whose bodies are such a MatMul."""


class KeepFromGemm(ir.passes.InPlacePass):
    """Make a Sum of every Add that would become part of a Gemm."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        adds = [node for node in every_node(model.graph) if _is_add(node)]
        kept = [node for node in adds if _becomes_gemm(node)]
        for node in kept:
            node.op_type = "Sum"
            add_note(node, "a Sum: ONNX Runtime would make a Gemm, and dequantize its weights anew")
        return ir.passes.PassResult(model, bool(kept))


def _is_add(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type == "Add"


def _becomes_gemm(add: ir.Node) -> bool:
    matrices = [value for value in add.inputs if value is not None and _is_matrix(value)]
    return len(matrices) == 2 and any(map(_is_product, matrices))


def _is_matrix(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 2


def _is_product(value: ir.Value) -> bool:
    """Whether it is such a product, and nobody else reads it."""
    node = value.producer()
    if node is None or len(value.uses()) != 1 or value.is_graph_output():
        return False
    if node.domain == dialect.DOMAIN:
        return node.op_type in _PRODUCTS
    if node.domain not in ("", "ai.onnx") or node.op_type != "MatMul":
        return False
    params = quant_params(dequantize_of(node.inputs[1]))
    return params is not None and isinstance(params.type.granularity, PerGroup)

"""Bring imported Q and DQ into the one form that folding expects.

1. Weights are DQ over integers, without a zero point where it is 0       (`qdq_parameters`)
2. Gemm(x, DQ(W), b)   =>   MatMul(x, DQ(W')) + b, as `canonicalize` does for float weights
3. Pairs lie next to the ops they are about, what only moves data moves integers
                                                            (`move_pairs`, `pull_quantize`)
4. Q(DQ(q)) of one scale is q; of two it stays, and says that it requantizes
5. A ConvTranspose between pairs is a convolution and a shuffle      (`lower_transposed_pairs`)
6. A Relu or Clip that saturation does anyway is gone, and a guard against NaN where there is none
                                                             (`drop_clamps`, `drop_guards`)
7. Activations have an explicit zero point and are uint8              (`unsigned_activations`)
8. Equal Q and equal DQ of one value are one node, which all share    (`share_pairs`)

All but 2 are exact; a Gemm of floats sums in another order than MatMul and Add do, which can move a
tie between two steps.  What cannot be brought into this form stays as it is, and the node in the
way says why.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.ir.decisions import decide
from qcompiler.ir.graph import dequantize_of, every_node, replace_nodes
from qcompiler.passes.drop_clamps import try_drop_clamp
from qcompiler.passes.drop_guards import try_drop_guard
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.lower_transposed_pairs import lower_transposed_pairs
from qcompiler.passes.move_pairs import move_constant, push_dequantize, try_cancel
from qcompiler.passes.pull_quantize import pull_quantize
from qcompiler.passes.qdq_parameters import is_pair, spell_out, store_constant
from qcompiler.passes.share_pairs import share_pairs
from qcompiler.passes.unsigned_activations import make_unsigned

__all__ = ["NormalizeQDQ"]

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"


class NormalizeQDQ(ir.passes.InPlacePass):
    """Normalize the pairs of a model; without any, nothing is changed."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Normalize in place."""
        graph = model.graph
        if not any(is_pair(node, _Q) or is_pair(node, _DQ) for node in every_node(graph)):
            return ir.passes.PassResult(model, False)
        changed = _share(model)
        changed |= _expand_gemms(graph) + _move(graph) > 0
        if lower_transposed_pairs(model):
            changed = True
            _move(graph)
        for step in (_spell_out, make_unsigned, _cancel):
            changed |= step(graph) > 0
        if changed:
            common.RemoveUnusedNodesPass()(model)
            _share(model)
            FixNames()(model)
        return ir.passes.PassResult(model, changed)


def _share(model: ir.Model) -> bool:
    """One node for equal pairs; scales that are equal in different initializers count as such."""
    small = common.DeduplicateInitializersPass()(model)
    return share_pairs(model) > 0 or small.modified


def _expand_gemms(graph: ir.Graph) -> int:
    return sum(_try_expand_gemm(node) for node in list(every_node(graph)))


def _try_expand_gemm(gemm: ir.Node) -> bool:
    if gemm.op_type != "Gemm" or gemm.domain != "" or dequantize_of(gemm.inputs[1]) is None:
        return False
    attributes = gemm.attributes
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    factors = {attributes.get_float("alpha", 1.0)}
    if bias is not None:
        factors.add(attributes.get_float("beta", 1.0))
    if factors != {1.0}:
        decide(gemm, "float", "not expanded: Gemm with alpha or beta over quantized weights")
        return False
    new: list[ir.Node] = []
    operands: list[ir.Value | None] = []
    for value, flag in zip(gemm.inputs[:2], ("transA", "transB"), strict=True):
        if attributes.get_int(flag, 0):
            new.append(ir.node("Transpose", [value], {"perm": [1, 0]}, name=f"{gemm.name}_{flag}"))
            operands.append(_typed(new[-1], value, turned=True))
        else:
            operands.append(value)
    new.append(ir.node("MatMul", operands, name=gemm.name))
    if bias is not None:
        product = _typed(new[-1], gemm.outputs[0])
        new.append(ir.node("Add", [product, bias], name=f"{gemm.name}_bias"))
    replace_nodes([gemm], new)
    return True


def _typed(node: ir.Node, like: ir.Value | None, turned: bool = False) -> ir.Value:
    value = node.outputs[0]
    if like is not None:
        value.type, shape = like.type, like.shape
        value.shape = ir.Shape(reversed(shape.dims)) if turned and shape is not None else shape
    return value


def _move(graph: ir.Graph) -> int:
    """Everything of `_move_once`, until nothing moves: a Q that went up may now follow a Relu."""
    count = 0
    while moved := _move_once(graph):
        count += moved
    return count


def _move_once(graph: ir.Graph) -> int:
    count = 0
    for node in list(every_node(graph)):
        count += node.graph is not None and (
            (is_pair(node, _Q) and store_constant(graph, node))
            or move_constant(graph, node)
            or try_drop_clamp(node)
            or try_drop_guard(node)
            or push_dequantize(graph, node)
            or try_cancel(node)
        )
    waiting = [node for node in every_node(graph) if is_pair(node, _Q)]
    while waiting:
        moved = pull_quantize(waiting.pop())
        waiting += [node for node in moved if not store_constant(graph, node)]
        count += len(moved)
    return count


def _spell_out(graph: ir.Graph) -> int:
    nodes = [node for node in every_node(graph) if is_pair(node, _Q) or is_pair(node, _DQ)]
    return sum(spell_out(graph, node) for node in nodes)


def _cancel(graph: ir.Graph) -> int:
    """Pairs that became equal when both got one type."""
    return sum(try_cancel(node) for node in list(every_node(graph)))

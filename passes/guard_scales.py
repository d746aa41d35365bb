"""Keep ORT from fusing what its integer ops compute otherwise, as pairs of many scales.

    MatMul(DQ(q, s, z), DQ(w, ws[K]))   =>   MatMul(DQ(q, s, z), w')     w' = DQ(w, ws) as floats
    Conv(DQ(q, s, z), DQ(w, ws[C]))     =>   Conv(Max(DQ(q, s, z)), DQ(w, ws[C]))

Exact.  ORT 1.31 and 1.32 fuse these without a look at the scales (see `misfit`): the model then
does not open, fails in its first run, or answers with other numbers, as by weights in blocks and by
a Conv whose scales lie along its input channels.  A Max of one operand copies it, and no optimizer
of ORT takes it away; the weights of a Conv between pairs ORT would round again, if they were
floats.  Part of `fold_qdq`.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.decisions import add_note, decide
from qcompiler.ir.graph import dequantize_of, new_initializer, unique_name
from qcompiler.ir.params import quant_params
from qcompiler.passes.left_to_ort import misfit
from qcompiler.passes.widen_constants import dequantized_constant

__all__ = ["try_guard_scales"]

_WEIGHTED = frozenset({"MatMul", "Gemm", "Conv"})
_FUSED = _WEIGHTED | {"Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool"}
"""What ORT fuses whatever the scales; it does look at those of the others."""

_8_BITS = frozenset({ir.DataType.INT8, ir.DataType.UINT8})
_NOTE = "apart from its pairs, or ORT would fuse it all the same"


def try_guard_scales(graph: ir.Graph, node: ir.Node) -> bool:
    """Take one operand out of its pair, if ORT would fuse the node and cannot."""
    if node.op_type not in _FUSED or node.domain or misfit(node) is None:
        return False
    operands = node.inputs[: 2 if node.op_type in _WEIGHTED else 1]
    if not all(_is_of_8_bits(value) for value in operands):
        return False
    add_note(node, _NOTE)
    floats = dequantized_constant(node.inputs[1]) if node.op_type == "MatMul" else None
    if floats is not None:
        # Also where ORT does look: it would dequantize such weights at every run.
        stem = f"{node.name}_weight"
        node.replace_input_with(1, new_initializer(graph, stem, floats))
        return True
    assert node.graph is not None
    data = node.inputs[0]
    assert data is not None
    copy = ir.node("Max", [data], name=f"{node.name}_apart")
    result = copy.outputs[0]
    result.name = unique_name(graph, f"{data.name}_apart")
    result.type, result.shape = data.type, data.shape
    decide(copy, "qdq", "keeps ORT from fusing the op behind it with its pairs")
    node.graph.insert_before(node, copy)
    node.replace_input_with(0, result)
    return True


def _is_of_8_bits(value: ir.Value | None) -> bool:
    params = quant_params(dequantize_of(value))
    return params is not None and params.type.storage in _8_BITS

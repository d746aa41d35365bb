"""Store int8 weights as uint8 where ONNX Runtime multiplies them: its sums are exact with those.

    DequantizeLinear(W, s)    =>   DequantizeLinear(W + 128, s, 128)
    MatMulInteger(x, W, z)    =>   MatMulInteger(x, W + 128, z, 128)

The numbers are the same.  On x86 processors without VNNI, ORT multiplies uint8 by int8 with an
instruction that saturates (vpmaddubsw), also where it fuses a DequantizeLinear into an integer op.
With VNNI, which multiplies uint8 by int8 alone, such a product takes 2.4 times as long (ORT 1.32,
Zen 4): what is left here are the few that have no kernel of ours.  Products of int8 activations are
exact and stay.  Ops of ours see to it themselves (`ir/dialect_ops.py`).

A quantized LSTM is most of its model, which took 1.7 times as long as before by uint8 with VNNI: in
bundles it keeps its weights, as convolutions do, and sessions are told to make them uint8 where
that is needed (`session_options`).  ORT fails to where two nodes share one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import decide, decision_of
from qcompiler.ir.graph import constant, drop_if_unread, every_node, new_initializer
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.qdq_parameters import shifted

__all__ = ["ShiftWeights"]

_WEIGHTS: Mapping[tuple[str, str], tuple[tuple[int, int], ...]] = {
    ("", "DequantizeLinear"): ((0, 2),),
    ("", "MatMulInteger"): ((1, 3),),
    ("", "QLinearMatMul"): ((3, 5),),
    ("", "QLinearConv"): ((3, 5),),
    ("com.microsoft", "DequantizeLinear"): ((0, 2),),
    ("com.microsoft", "DynamicQuantizeLSTM"): ((1, 9), (2, 11)),
    ("com.microsoft", "DynamicQuantizeMatMul"): ((1, 3),),
    ("com.microsoft", "MatMulIntegerToFloat"): ((1, 5),),
    ("com.microsoft", "QAttention"): ((1, 7),),
    ("com.microsoft", "QGemm"): ((3, 5),),
}
"""Where ops take weights of either type, and their zero points."""

_WHY = "its weights are stored as uint8: by int8 ones ORT's sums saturate without VNNI"


class ShiftWeights(ir.passes.InPlacePass):
    """Shift every constant weight that an op of ONNX or of ORT takes as int8.

    Attributes:
        sessions_ask: Whether the model will be opened with exact sums asked for where they are not.
    """

    def __init__(self, *, sessions_ask: bool = False) -> None:
        super().__init__()
        self.sessions_ask = sessions_ask

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Shift in place; a weight that several nodes read is stored once."""
        known: dict[ir.Value, ir.Value] = {}
        changed = False
        for node in list(every_node(model.graph)):
            if self.sessions_ask and _is_left_to_sessions(node):
                continue
            for weight, zero in _WEIGHTS.get((node.domain, node.op_type), ()):
                changed |= _try_shift(model.graph, node, weight, zero, known)
        for value in known:
            drop_if_unread(value)
        if changed:
            FixNames()(model)
        return ir.passes.PassResult(model, changed)


def _is_left_to_sessions(node: ir.Node) -> bool:
    if node.op_type != "DynamicQuantizeLSTM":
        return False
    weights = [node.inputs[index] for index in (1, 2)]
    return all(value is not None and len(value.uses()) == 1 for value in weights)


def _try_shift(
    graph: ir.Graph, node: ir.Node, index: int, zero_index: int, known: dict[ir.Value, ir.Value]
) -> bool:
    operands = [*node.inputs, *[None] * (zero_index + 1)]
    weight, zero = operands[index], operands[zero_index]
    if weight is None or weight.dtype is not ir.DataType.INT8 or constant(weight) is None:
        return False
    if index > 0 and node.inputs[0] is not None and node.inputs[0].dtype is ir.DataType.INT8:
        return False
    points = _zero_points(node, zero)
    if points is None:
        return False
    if weight not in known:
        array = constant(weight)
        assert array is not None
        home = weight.graph if isinstance(weight.graph, ir.Graph) else graph
        known[weight] = new_initializer(home, f"{weight.name}_uint8", shifted(array))
    node.resize_inputs(max(len(node.inputs), zero_index + 1))
    node.replace_input_with(index, known[weight])
    stem = f"{node.name}_weight_zero_point"
    node.replace_input_with(zero_index, new_initializer(graph, stem, points))
    if zero is not None:
        drop_if_unread(zero)
    before = decision_of(node)
    if _WHY not in before.why:
        decide(node, before.action, f"{before.why}; {_WHY}", expected=before.expected)
    return True


def _zero_points(node: ir.Node, zero: ir.Value | None) -> NDArray[np.uint8] | None:
    """Those of the shifted weights; None where they are computed, or as many as nobody knows."""
    if zero is not None:
        array = constant(zero)
        return None if array is None else shifted(array)
    if node.op_type != "DequantizeLinear":
        return np.asarray(128, np.uint8)
    scale = node.inputs[1]
    if scale is None or scale.shape is None or not scale.shape.is_static():
        return None
    return np.full(scale.shape.numpy(), 128, np.uint8)

"""Keep ONNX Runtime from forms in integers that take longer than floats.

    Q(Softmax(DQ(q, s, z)), t, y)   =>   Q(Sum(Softmax(DQ(q, s, z))), t, y)

The same for AveragePool and Where.  ONNX Runtime makes one op in integers of an op between pairs,
such as QLinearSoftmax; a Sum of one operand, which is a copy, is in its way.  With ONNX Runtime
1.32 on Zen 3 QLinearSoftmax and QLinearWhere take some three times as long as the ops apart and the
copy (12 x 128 x 128), QLinearAveragePool seven times or more.  Others are faster in integers.  The
pairs stay, so that only what those ops round in between is gone.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.decisions import decide
from qcompiler.ir.graph import every_node
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.left_to_ort import FUSED_BY_ORT, left_to_ort

__all__ = ["KeepFromQLinear"]

_SLOW = frozenset({"AveragePool", "Softmax", "Where"})


class KeepFromQLinear(ir.passes.InPlacePass):
    """Put a copy behind every op whose form in integers is slow.

    Attributes:
        wanted: Whether they are slow on this target.
    """

    def __init__(self, wanted: bool = True) -> None:
        super().__init__()
        self.wanted = wanted

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place, in branches and loops too."""
        kept = [node for node in every_node(model.graph) if self.wanted and _is_slow(node)]
        for node in kept:
            _put_copy_behind(node)
        if kept:
            FixNames()(model)
        return ir.passes.PassResult(model, bool(kept))


def _is_slow(node: ir.Node) -> bool:
    if node.domain != "" or node.op_type not in _SLOW:
        return False
    return left_to_ort(node) == ("qdq", f"ORT's own {FUSED_BY_ORT[node.op_type]}")


def _put_copy_behind(node: ir.Node) -> None:
    result, form = node.outputs[0], FUSED_BY_ORT[node.op_type]
    (use,) = result.uses()
    copy = ir.node("Sum", [result], name=f"{node.name or node.op_type}_copy")
    copy.outputs[0].name, copy.outputs[0].type = f"{result.name}_copy", result.type
    copy.outputs[0].shape = result.shape.copy() if result.shape is not None else None
    use.node.replace_input_with(use.idx, copy.outputs[0])
    assert node.graph is not None
    node.graph.insert_after(node, copy)
    decide(node, "float", f"faster than ORT's own {form}", expected=True)
    decide(copy, "float", f"a copy: else ONNX Runtime would make {form} of the op before")

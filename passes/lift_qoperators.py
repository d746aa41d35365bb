"""Lift ops that are themselves quantized into float ops between explicit pairs.

    QLinearConv(x, xs, xz, w, ws, wz, ys, yz, b)   =>   Q(Conv(DQ(x), DQ(w), DQ(b)), ys, yz)

and so on for the ops of ai.onnx and com.microsoft, each family in a file of its own (`lift_*`).
The integers are the same before and after; only a tie between two steps may round to the other.
A dynamic scale stays a DynamicQuantizeLinear, whose three results a DequantizeLinear widens:

    q, s, z = DynamicQuantizeLinear(x);   y = MatMul(DQ(q, s, z), DQ(w, ws, wz))
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.ir.decisions import decide
from qcompiler.ir.graph import every_node, replace_nodes
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.passes.lift_attention import ATTENTION
from qcompiler.passes.lift_elementwise import ELEMENTWISE
from qcompiler.passes.lift_few_bits import FEW_BITS, multiplies_floats
from qcompiler.passes.lift_integer_products import INTEGER_PRODUCTS
from qcompiler.passes.lift_products import PRODUCTS
from qcompiler.passes.lifting import Form, NotLiftedError
from qcompiler.passes.share_pairs import share_pairs

__all__ = ["LiftQOperators"]

_LIFTINGS = PRODUCTS | INTEGER_PRODUCTS | ELEMENTWISE | FEW_BITS | ATTENTION

_NO_FORM = {
    "QEmbedLayerNormalization": "three embeddings and their norm are one op in it",
    "DynamicQuantizeLSTM": "it quantizes its state anew in each step",
    "MatMulBnb4": "its codebook (fp4 or nf4) is no ONNX type",
    "QMoE": "experts are chosen inside of it",
}
"""Quantized ops of com.microsoft that no pair around a float op expresses, and why."""


class LiftQOperators(ir.passes.InPlacePass):
    """Bring operator-oriented quantization into QDQ form; say why where that is not possible.

    Attributes:
        options: What else to lift.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """What else to lift.

        Attributes:
            float_products: Lift each MatMulNBits that multiplies floats, too; where nothing of ours
                computes it, ONNX Runtime then rounds its activations to 8 bits.
        """

        float_products: bool = False

    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.options = options or self.Options()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lift every op that has a form."""
        nodes, floats = list(every_node(model.graph)), self.options.float_products
        lifted = [node for node in nodes if _try_lift(model.graph, node, floats)]
        if lifted:
            share_pairs(model)
            ir.passes.Sequential(
                common.RemoveUnusedNodesPass(),
                FixNames(),
                common.RemoveUnusedOpsetsPass(),
            )(model)
        if any(node.domain for node in lifted):
            # ONNX knew nothing about what these return, nor then about what follows.
            InferShapes()(model)
        return ir.passes.PassResult(model, bool(lifted))


def _try_lift(graph: ir.Graph, node: ir.Node, float_products: bool) -> bool:
    why = _NO_FORM.get(node.op_type) if node.domain == "com.microsoft" else None
    why = why or (None if float_products else multiplies_floats(node))
    if why is not None:
        decide(node, "qdq", f"ORT's own {node.op_type}, not lifted: {why}")
        return False
    lift = _LIFTINGS.get((node.domain, node.op_type))
    if lift is None:
        return False
    form = Form(graph, node)
    try:
        form.needs_opset(13, "a scale per channel")
        lift(form)
    except NotLiftedError as reason:
        form.discard()
        decide(node, "qdq", f"ORT's own {node.op_type}, not lifted: {reason}")
        return False
    form.type_results()
    replace_nodes(form.covered, form.nodes)
    return True

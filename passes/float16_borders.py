"""Round what our ops read and make to float16 where their neighbours stay in float32.

    Quantize(x)           =>   Quantize(Cast <to = FLOAT> (half))     half = Cast <to = FLOAT16> (x)
    Exp(QMatMulW8A8(…))   =>   Exp(Cast <to = FLOAT> (half))          half = Cast(QMatMulW8A8(…))

Kernels for GPUs read and make float16 alone: without a Cast beside it, which `fuse_regions` takes
in, an op would run as its body.  What leaves the range of float16 is left as it is.  Part of
`convert_float16`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.graph import constant
from qcompiler.passes.float16_types import IN_HALF

__all__ = ["border_of", "round_borders"]

_HALF, _WIDE = ir.DataType.FLOAT16, ir.DataType.FLOAT

AsType = Callable[[ir.Value, ir.DataType], ir.Value]
"""Gives a value in another type, by a Cast."""


def border_of(node: ir.Node) -> ir.Value | None:
    """What an op of ours reads (Quantize) or makes in float32 that kernels have in float16."""
    if node.domain != dialect.DOMAIN or node.op_type not in IN_HALF:
        return None
    value = node.inputs[0] if _quantizes(node) else node.outputs[0]
    return None if value is None or constant(value) is not None else value


def round_borders(nodes: Sequence[ir.Node], beyond: Container[ir.Value], as_type: AsType) -> bool:
    """Put Casts to float16 and back there; whether one was missing.

    Args:
        nodes: Of all graphs, after all others have their types.
        beyond: Values that leave the range.
        as_type: Makes Casts, one for each value and type.
    """
    changed = False
    # What a product makes may be what is quantized: one pair of Casts is enough.
    for node in sorted(nodes, key=_quantizes):
        value = border_of(node)
        if value is None or value.dtype is not _WIDE or value in beyond:
            continue
        changed |= (_round_operand if _quantizes(node) else _round_result)(node, value, as_type)
    return changed


def _quantizes(node: ir.Node) -> bool:
    return node.op_type.startswith("Quantize")


def _round_operand(node: ir.Node, value: ir.Value, as_type: AsType) -> bool:
    maker = value.producer()
    if maker is not None and _casts(maker, _HALF, _WIDE):
        return False
    node.replace_input_with(0, as_type(as_type(value, _HALF), _WIDE))
    return True


def _round_result(node: ir.Node, value: ir.Value, as_type: AsType) -> bool:
    uses = list(value.uses())
    if not uses and not value.is_graph_output():
        return False
    if len(uses) == 1 and not value.is_graph_output() and _casts(uses[0].node, _WIDE, _HALF):
        return False
    half = as_type(value, _HALF)
    wide = as_type(half, _WIDE)
    for reader, index in uses:
        if reader is not half.producer():
            reader.replace_input_with(index, wide)
    if value.is_graph_output():
        assert node.graph is not None
        outputs = node.graph.outputs
        for index, output in enumerate(outputs):
            if output is value:
                outputs[index] = wide
        value.name, wide.name = f"{value.name}_exact", value.name
    return True


def _casts(node: ir.Node, source: ir.DataType, target: ir.DataType) -> bool:
    operand = node.inputs[0] if node.domain == "" and node.op_type == "Cast" else None
    return operand is not None and operand.dtype is source and node.outputs[0].dtype is target

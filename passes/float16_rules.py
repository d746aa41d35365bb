"""Which nodes stay in float32 where a model computes in float16, and why.

1. What ONNX Runtime has no float16 kernel of, other domains, and what was left to its integer ops.
2. Numbers that count: what is computed from integers, as positions are, until something else joins
   in; what integers are made of; angles.  Float16 is exact up to 2048, and 1000.5 is 1000.
3. Means of squares, from x up to what is divided by them: squares leave the range where x does not.
4. Constants beyond the range; below it, where all of one is, or any of a divisor, or a column of
   scales loses too much.
5. What the source itself widened from another type.
6. What lies between float32 nodes alone: casts would be all that float16 brings it.  Ops of ours
   count where no kernel takes the casts in.

Part of `convert_float16`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decision_of
from qcompiler.ir.graph import constant, every_node
from qcompiler.passes.float16_norms import norms_in_float32
from qcompiler.passes.float16_scales import unfit_scales
from qcompiler.passes.float16_types import HALF_OPS, IN_HALF, following_inputs, reads_any_type
from qcompiler.passes.widen_floats import SOURCE_BORDER

__all__ = ["BORDER", "MOVING", "Kept", "keep_between", "kept_nodes", "touches_floats"]

BORDER = "between float16 and float32"
"""Why there is a Cast that the source does not have."""

Kept = dict[ir.Node, str]
"""The nodes that stay in float32; the reason is empty where nobody would ask for one."""

_F = ir.DataType.FLOAT
_LARGEST, _SMALLEST = float(np.finfo(np.float16).max), float(np.finfo(np.float16).tiny)

_NO_BOUND = 1e38
"""Exporters write the largest float32 for a bound that there is not."""

MOVING = frozenset({
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape",
    "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Ops whose results hold nothing but elements of their operands."""

_ARITHMETIC = MOVING | {
    "Abs", "Add", "Ceil", "Clip", "CumSum", "Div", "Equal", "Exp", "Floor", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Pow",
    "Reciprocal", "Round", "Sign", "Sqrt", "Sub", "Where",
}  # fmt: skip
_ANGLES = ("Sin", "Cos")
_COUNTERS = frozenset({
    ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64,
    ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
})  # fmt: skip
"""Integers that float16 does not hold all of."""


def touches_floats(node: ir.Node) -> bool:
    """Whether a node reads or makes FLOAT, or what may be that."""
    values = [value for value in [*node.inputs, *node.outputs] if value is not None]
    return any(value.dtype in (_F, None) for value in values)


def kept_nodes(model: ir.Model) -> Kept:
    """The nodes of all graphs that stay in float32, but for what values they reach."""
    nodes = [node for node in every_node(model.graph) if touches_floats(node)]
    opset = model.graph.opset_imports[""]
    kept: Kept = {}
    for node in nodes:
        reason = _without_kernel(node)
        if reason is None and dialect.is_ours(node.domain):
            reason = unfit_scales(node)
        if reason is None and not reads_any_type(node):
            reason = _unfit_constant(node, opset)
        if reason is not None:
            kept[node] = reason
    for group in (
        _counting(nodes),
        _making_integers(nodes),
        norms_in_float32(nodes),
        _widened(nodes),
    ):
        for node, reason in group.items():
            kept.setdefault(node, reason)
    return kept


def keep_between(nodes: Iterable[ir.Node], kept: Kept) -> None:
    """Add the nodes all of whose floats come from nodes that stay, and go to such."""
    left = [node for node in nodes if node not in kept and not reads_any_type(node)]
    left = [node for node in left if not dialect.is_ours(node.domain)]
    stay = {node for node in kept if not _takes_casts(node)}
    while found := [node for node in left if _is_between(node, stay)]:
        kept.update(dict.fromkeys(found, ""))
        stay.update(found)
        left = [node for node in left if node not in stay]


def _takes_casts(node: ir.Node) -> bool:
    """Whether a kernel in float16 makes the Casts around an op a part of it."""
    return node.domain == dialect.DOMAIN and node.op_type in IN_HALF


def _is_between(node: ir.Node, kept: Container[ir.Node | None]) -> bool:
    floats = [v for v in node.inputs if v is not None and v.dtype is _F and v.const_value is None]
    if not floats or not all(value.producer() in kept for value in floats):
        return False
    results = [value for value in node.outputs if value.dtype is _F]
    return all(
        not value.is_graph_output() and all(use.node in kept for use in value.uses())
        for value in results
    )


def _without_kernel(node: ir.Node) -> str | None:
    """Case 1."""
    if dialect.is_ours(node.domain):
        op = dialect.OPS.get(node.op_type)
        return None if op is not None and op.follows else ""
    if node.domain != "":
        return f"float32: an op of {node.domain}"
    if decision_of(node).why == BORDER:
        return ""  # the pass has been here before
    if _widens_weight(node) or (node.op_type == "MatMul" and _widens_weight(_maker(node, 1))):
        return None  # ONNX Runtime makes MatMulNBits of the two
    if decision_of(node).action == "qdq" or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return ""
    values = [*node.inputs, *node.outputs]
    if any(v is not None and v.name and v.dtype is None for v in values):
        return "float32: not all types around it are known"
    if node.attributes.get_string("reduction", "none") != "none":
        return f"float32: ONNX Runtime has no float16 kernel of {node.op_type} with a reduction"
    if node.op_type in HALF_OPS:
        return None
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in
           node.attributes.values()):  # fmt: skip
        return ""  # what goes into a body and comes out of it; its nodes are looked at themselves
    return f"float32: ONNX Runtime has no float16 kernel of {node.op_type} on CUDA"


def _widens_weight(node: ir.Node | None) -> bool:
    """Whether it dequantizes a constant of few bits."""
    if node is None or node.op_type != "DequantizeLinear":
        return False
    stored = node.inputs[0]
    few = stored is not None and stored.dtype in (ir.DataType.INT4, ir.DataType.UINT4)
    return few and _is_fixed(stored)


def _maker(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index]
    return None if value is None else value.producer()


def _unfit_constant(node: ir.Node, opset: int) -> str | None:
    """Case 4."""
    for index in following_inputs(node, opset):
        value = node.inputs[index]
        array = constant(value)
        if value is None or array is None:
            continue
        high = _largest(array)
        if high > _NO_BOUND and node.op_type in ("Clip", "Max", "Min"):
            continue  # it bounds nothing, and neither does infinity
        if high > _LARGEST:
            return f"float32: its constant {value.name} holds {high:.3g}, float16 ends at 65504"
        if node.op_type == "Div" and index == 1 and array.any():
            high = float(np.abs(array[array != 0]).min())
        if 0 < high < _SMALLEST:
            return f"float32: its constant {value.name} holds {high:.3g}, float16 begins at 6.1e-05"
    return None


def _largest(array: NDArray[np.generic]) -> float:
    """The largest finite magnitude, 0 where there is none; a large array is not copied for it."""
    if not array.size:
        return 0.0
    high = max(float(array.max()), -float(array.min()))
    if not math.isfinite(high):
        high = float(np.abs(array[np.isfinite(array)]).max(initial=0))
    return high


def _counting(nodes: Sequence[ir.Node]) -> Kept:
    """Case 2, forward: what is computed from integers and constants alone."""
    kept: Kept = {}
    counted: set[ir.Value] = set()
    why = "float32: computed from integers, of which float16 holds those up to 2048"
    for node in nodes:
        if node.domain != "":
            continue
        floats = [v for v in node.inputs if v is not None and v.dtype is _F and not _is_fixed(v)]
        source = node.inputs[0] if node.inputs else None
        starts = node.op_type == "Range" or (
            node.op_type == "Cast" and source is not None and source.dtype in _COUNTERS
        )
        goes_on = bool(floats) and counted.issuperset(floats) and _is_arithmetic(node)
        if starts or goes_on:
            kept[node] = why
            counted.update(value for value in node.outputs if value.dtype is _F)
    return kept


def _making_integers(nodes: Sequence[ir.Node]) -> Kept:
    """Case 2, backward: what integers are made of, and angles."""
    kept: Kept = {}
    for node in nodes:
        if node.domain != "":
            continue
        made = node.outputs[0].dtype
        if node.op_type in _ANGLES:
            why = "float32: angles, of which float16 keeps no fraction above 1024"
        elif node.op_type == "Cast" and made is not None and made.is_integer():
            why = "float32: integers are made of it, of which float16 holds those up to 2048"
        else:
            continue
        found = [node]
        for current in found:
            kept[current] = why
            makers = [v.producer() for v in current.inputs if v is not None and v.dtype is _F]
            found += [m for m in makers if m is not None and m not in kept and _is_arithmetic(m)]
    return kept


def _is_arithmetic(node: ir.Node) -> bool:
    """Whether each result is of few operands: an outer product counts, one of matrices does not."""
    if node.domain != "":
        return False
    if node.op_type == "MatMul":
        shapes = [value.shape for value in node.inputs if value is not None]
        return any(s is not None and len(s) > 1 and 1 in tuple(s)[-2:] for s in shapes)
    return node.op_type in _ARITHMETIC or node.op_type in _ANGLES


def _is_fixed(value: ir.Value | None) -> bool:
    return constant(value) is not None


def _widened(nodes: Sequence[ir.Node]) -> Kept:
    """Case 5: from a Cast to float32 of what was computed in another float type."""
    kept: Kept = {}
    wide: set[ir.Value] = set()
    for node in nodes:
        source = node.inputs[0] if node.inputs else None
        if node.domain != "" or source is None:
            continue
        starts = (
            node.op_type == "Cast"
            and source.dtype not in (_F, None)
            and source.dtype.is_floating_point()
            and source.producer() is not None
            and decision_of(node).why not in (BORDER, SOURCE_BORDER)
        )
        if starts or any(value in wide for value in node.inputs):
            kept[node] = "float32: the source widens it from " + (
                source.dtype.name if starts and source.dtype else "another type"
            )
            wide.update(value for value in node.outputs if value.dtype is _F)
    return kept

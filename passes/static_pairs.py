"""Insert static pairs, and bring the links between them into forms with integer kernels in ORT.

    Mul(DQ(q, s, z), c)        =>   DQ(q, c s, z)                             c above 0
    Pad(DQ(q, s, z))           =>   DQ(Pad(q, z), s, z)
    Add(DQ(q, s, z), c)        =>   Add(DQ(q, s, z), DQ(c_q))                 Mul, Sub likewise
    Relu(DQ(q, s, z))          =>   LeakyRelu(DQ(q, s, z)), slope 0
    Q(HardSigmoid(DQ(q, s, z)), 1/255, 0)   =>   Q(Add(DQ(q, a s, z), DQ(b_q)), 1/255, 0)
    HardSwish(DQ(q, s, z))     =>   Mul(DQ(q, s, z), the same with a = 1/6, b = 1/2)

All but the constants' own rounding is exact: saturation cuts a HardSigmoid at 0 and 1.
Part of `insert_qdq`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import quantize, scale_and_zero_point
from qcompiler.ir.decisions import decide, operand_plan_of
from qcompiler.ir.graph import (
    clamps_after,
    constant,
    dequantize_of,
    new_initializer,
    place_after,
    replace_nodes,
)
from qcompiler.ir.types import QuantSpec, QuantType, TensorStats
from qcompiler.passes.drop_clamps import try_drop_clamp
from qcompiler.passes.move_pairs import on_integers
from qcompiler.passes.static_sites import StaticSite

__all__ = ["insert_static"]

_BORDER = "static pair at the border of integer ops"
_SIXTH = (1 / 6, 0.5)

Sites = Mapping[ir.Value, StaticSite]


def insert_static(graph: ir.Graph, sites: Sites, stats: Mapping[str, TensorStats]) -> None:
    """Insert the pairs of all sites; what lies between them computes the same numbers, rounded."""
    writer = _Writer(graph, sites, stats)
    links = {site.value.producer() for site in sites.values() if site.readers is None}
    links |= {use.node for site in sites.values() for use in site.value.uses()}
    planned = [node for node in graph if node in links and operand_plan_of(node) is not None]
    clamps = [clamp for node in planned for clamp in clamps_after(node.outputs[0])]
    for site in sites.values():
        if not _is_direct(site):
            writer.insert(site)
    for node in planned:
        _legalize(writer, node)
    for clamp in clamps:
        try_drop_clamp(clamp)


def _is_direct(site: StaticSite) -> bool:
    """Whether a tensor is dequantized from the integers that its link moved, with no Q between."""
    return site.link is not None and site.link.node.op_type in ("Pad", "Mul", "Div")


class _Writer:
    """Writes pairs of one graph."""

    def __init__(self, graph: ir.Graph, sites: Sites, stats: Mapping[str, TensorStats]) -> None:
        self.graph, self.sites, self.stats = graph, sites, stats
        self._steps: dict[ir.Value, list[ir.Value]] = {}

    def steps(self, site: StaticSite) -> list[ir.Value]:
        """Scale and zero point of a site."""
        if site.value not in self._steps:
            name = site.value.name or "value"
            if site.like is None:
                seen = site.stats or self.stats[name]
                ends = np.asarray([seen.minimum, seen.maximum])
                arrays = scale_and_zero_point(ends, site.spec.type)
                self._steps[site.value] = self.initializers(name, *arrays)
            else:
                steps = self.steps(self.sites[site.like])
                self._steps[site.value] = self.scaled(name, steps, site.factor)
        return self._steps[site.value]

    def initializers(self, name: str, scale: NDArray[Any], zero: NDArray[Any]) -> list[ir.Value]:
        """New constants."""
        parts = (("scale", scale), ("zero_point", zero))
        return [new_initializer(self.graph, f"{name}_{stem}", array) for stem, array in parts]

    def scaled(self, name: str, steps: Sequence[ir.Value], factor: float) -> list[ir.Value]:
        """The same zero point, and the scale times a factor."""
        if factor == 1.0:
            return list(steps)
        scale = np.asarray(constant(steps[0])) * np.float32(factor)
        return [new_initializer(self.graph, f"{name}_scale", scale), steps[1]]

    def insert(self, site: StaticSite) -> None:
        """The pair of a site, for its readers."""
        value, spec, steps = site.value, site.spec, self.steps(site)
        name = value.name or "value"
        quantized = ir.node("QuantizeLinear", [value, *steps], name=f"{name}_quantize")
        _type(quantized.outputs[0], f"{name}_quantized", spec.type.storage, value.shape)
        decide(quantized, "qdq", _BORDER)
        widened = self.dequantize(name, quantized.outputs[0], steps)
        uses = [
            use
            for use in value.uses()
            if use.node is not quantized and (site.readers is None or use.node in site.readers)
        ]
        place_after(value, [quantized, widened])
        for use in uses:
            use.node.replace_input_with(use.idx, widened.outputs[0])
        if value.is_graph_output() and site.readers is None:
            _hand_out(self.graph, value, widened.outputs[0])

    def dequantize(self, name: str, stored: ir.Value | None, steps: Sequence[ir.Value]) -> ir.Node:
        """A DQ that is not in the graph yet."""
        node = ir.node("DequantizeLinear", [stored, *steps], name=f"{name}_dequantize")
        shape = None if stored is None else stored.shape
        _type(node.outputs[0], f"{name}_dequantized", ir.DataType.FLOAT, shape)
        decide(node, "qdq", _BORDER)
        return node

    def constant(self, name: str, array: NDArray[Any], type: QuantType) -> ir.Node:
        """A DQ, not in the graph yet, of a constant that is rounded to a type."""
        scale, zero = scale_and_zero_point(array, type)
        stored = quantize(array.astype(np.float32), scale, type, zero)
        value = new_initializer(self.graph, f"{name}_stored", stored)
        return self.dequantize(name, value, self.initializers(name, scale, zero))


def _hand_out(graph: ir.Graph, value: ir.Value, widened: ir.Value) -> None:
    """Let the graph's output be what was rounded, under the name it had."""
    name = value.name
    graph.outputs[:] = [widened if output is value else output for output in graph.outputs]
    value.name, widened.name = f"{name}_exact", name


def _legalize(writer: _Writer, node: ir.Node) -> None:
    """Bring one link into a form with an integer kernel."""
    plan, result = operand_plan_of(node), writer.sites.get(node.outputs[0])
    assert plan is not None
    by_op: Mapping[str, Callable[[_Writer, ir.Node, QuantSpec], None]] = {
        "Relu": _relu, "HardSigmoid": _hard_sigmoid, "HardSwish": _hard_swish,
        "Add": _constants, "Mul": _constants, "Sub": _constants,
    }  # fmt: skip
    if result is not None and _is_direct(result):
        _move_directly(writer, node, result)
    elif node.op_type in by_op:
        by_op[node.op_type](writer, node, plan.operands)


def _move_directly(writer: _Writer, node: ir.Node, site: StaticSite) -> None:
    steps = writer.steps(site)
    widened = next(w for value in node.inputs if (w := dequantize_of(value)) is not None)
    stored, new = widened.inputs[0], []
    if node.op_type == "Pad":
        moved = on_integers(node, [stored], steps[1])
        stored, new = moved.outputs[0], [moved]
    last = writer.dequantize(site.value.name or "value", stored, steps)
    replace_nodes([node], [*new, last])
    decide(last, "qdq", _BORDER)


def _constants(writer: _Writer, node: ir.Node, spec: QuantSpec) -> None:
    """Round the constant operand; x - c becomes x + (-c)."""
    for index, value in enumerate(node.inputs):
        array = constant(value)
        if array is None or node.graph is None:
            continue
        if node.op_type == "Sub":
            new = ir.node("Add", list(node.inputs), name=node.name)
            _take_place(node, new)
            node, array = new, -array
        widened = writer.constant(f"{node.name}_operand", array, spec.type)
        node.graph.insert_before(node, widened)  # type: ignore[union-attr]
        node.replace_input_with(index, widened.outputs[0])


def _relu(writer: _Writer, node: ir.Node, spec: QuantSpec) -> None:
    _take_place(node, ir.node("LeakyRelu", list(node.inputs), {"alpha": 0.0}, name=node.name))


def _hard_sigmoid(writer: _Writer, node: ir.Node, spec: QuantSpec) -> None:
    alpha = node.attributes.get_float("alpha", 0.2)
    slope = alpha, node.attributes.get_float("beta", 0.5)
    *before, total = _gate(writer, node, slope, spec)
    assert node.graph is not None
    node.graph.insert_before(node, before)
    _take_place(node, total)


def _hard_swish(writer: _Writer, node: ir.Node, spec: QuantSpec) -> None:
    name, graph = node.name or "gate", node.graph
    assert graph is not None
    nodes = _gate(writer, node, _SIXTH, spec)
    total, shape = nodes[-1].outputs[0], node.outputs[0].shape
    _type(total, f"{name}_gate", ir.DataType.FLOAT, shape)
    ends = scale_and_zero_point(np.asarray([0.0, 1.0]), spec.type)
    steps = writer.initializers(f"{name}_gate", *ends)
    quantized = ir.node("QuantizeLinear", [total, *steps], name=f"{name}_gate_quantize")
    _type(quantized.outputs[0], f"{name}_gate_quantized", spec.type.storage, shape)
    decide(quantized, "qdq", _BORDER)
    widened = writer.dequantize(f"{name}_gate", quantized.outputs[0], steps)
    graph.insert_before(node, [*nodes, quantized, widened])
    _take_place(node, ir.node("Mul", [node.inputs[0], widened.outputs[0]], name=node.name))


def _gate(
    writer: _Writer, node: ir.Node, slope: tuple[float, float], spec: QuantSpec
) -> list[ir.Node]:
    """Slope x + offset of what `node` reads, the last of these nodes; none is in the graph yet."""
    data = dequantize_of(node.inputs[0])
    assert data is not None and data.inputs[1] is not None and data.inputs[2] is not None
    name = node.name or "gate"
    steps = writer.scaled(f"{name}_slope", [data.inputs[1], data.inputs[2]], slope[0])
    scaled = writer.dequantize(f"{name}_slope", data.inputs[0], steps)
    offset = writer.constant(f"{name}_offset", np.asarray(slope[1], np.float32), spec.type)
    total = ir.node("Add", [scaled.outputs[0], offset.outputs[0]], name=f"{name}_gate")
    decide(total, "qdq", "between integer ops: ORT's own QLinearAdd")
    return [scaled, offset, total]


def _take_place(old: ir.Node, new: ir.Node) -> None:
    new.metadata_props.update(old.metadata_props)
    replace_nodes([old], [new])


def _type(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.name, value.dtype, value.shape = name, dtype, shape

"""Outline each anchor op with the elementwise ops after it as one function.

    y = Gelu(Add(QMatMulW8A8(q, s, w, ws), b))
        =>   y = QMatMulW8A8_K384_N1536_AddC_Gelu(q, s, w, ws, b)

A region grows by all nodes up to the one where the ways from its result join, as in x * Sigmoid(x),
so that it always has one exit and no way leads back into it; if these are elementwise, their other
operands are one value per channel or provably have the result's shape, and a kernel for the larger
region exists.  The function's body is the region in standard ops, so the numbers do not change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.analysis import GraphView
from qcompiler.ir.decisions import decide, left_to_ort
from qcompiler.ir.graph import constant, new_initializer, replace_nodes, same_shape
from qcompiler.ir.region import ExtraKind, Region, Step
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.outlining import RegionPass, outline

__all__ = ["FuseRegions"]

_DEFAULTS = frozenset({("Gelu", "approximate", "none")})
"""Attributes written out with their default value name no other kernel."""

_MOST_STEPS = 4
"""Nodes to look at before the ways join: HardSwish may come as Mul(x, Clip(Add(x, 3)) / 6)."""

_ANCHORS = frozenset({
    "Quantize", "QMatMulW8A8", "QMatMulU8S8", "QMatMulU8U8", "QMatMulW4A8", "QMatMulFp8",
})  # fmt: skip


@dataclasses.dataclass
class _Growth:
    """A region while it grows, with the graph objects it stands for."""

    region: Region
    extras: list[ir.Value]
    covered: list[ir.Node]

    @property
    def values(self) -> list[ir.Value]:
        """The anchor's result and that of each step."""
        return [node.outputs[0] for node in self.covered]


class FuseRegions(RegionPass):
    """Outline the regions that have a kernel; leave the others to their op's body."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Outline every supported region, in branches and loops too."""
        outlined = 0
        views: dict[ir.Graph | ir.Function, GraphView] = {}
        for node in list(model.graph.all_nodes()):
            if node.domain != dialect.DOMAIN or node.op_type not in dialect.OPS:
                continue
            if node.op_type not in _ANCHORS:
                if node.op_type != "QConv":
                    decide(node, "body", f"no kernel for {node.op_type} yet")
                continue
            if (reason := left_to_ort(node)) is not None:
                decide(node, "body", reason, expected=True)
                continue
            start = Region(node.op_type, _sizes(node))
            if (reason := self.supports(start)) is not None:
                decide(node, "body", reason)
                continue
            assert node.graph is not None
            if node.graph not in views:
                views[node.graph] = GraphView(node.graph)
            self._outline(model, _Growth(start, [], [node]), views[node.graph])
            outlined += 1
        if outlined:
            FixNames()(model)
            dialect.declare(model)
        return ir.passes.PassResult(model, outlined > 0)

    def _grow(self, growth: _Growth, view: GraphView) -> _Growth:
        while growth.region.anchor != "Quantize":
            grown: _Growth | None = growth
            for reader in view.joined(growth.values[-1], _MOST_STEPS):
                grown = _try_extend(grown, reader) if grown is not None else None
            if grown is None or grown is growth or self.supports(grown.region) is not None:
                break
            growth = grown
        return growth

    def _outline(self, model: ir.Model, growth: _Growth, view: GraphView) -> None:
        growth = self._grow(growth, view)
        anchor = growth.covered[0]
        extras = [
            value if kind == "tensor" else _per_channel(model.graph, value, growth.region)
            for value, kind in zip(growth.extras, growth.region.extras, strict=True)
        ]
        new = outline(model, growth.region, [*anchor.inputs, *extras], like=anchor)
        steps = " + ".join(step.op for step in growth.region.steps)
        decide(new, "body", f"fused with {steps}" if steps else "outlined")
        replace_nodes(growth.covered, [new])
        view.replaced(growth.covered, new)


def _sizes(node: ir.Node) -> tuple[tuple[str, int], ...]:
    if "block_size" in node.attributes and node.op_type.startswith("Quantize"):
        return (("K", node.attributes.get_int("block_size")),)
    weight = node.inputs[dialect.OPS[node.op_type].inputs.index("w")]
    assert weight is not None and weight.const_value is not None
    depth, width = weight.const_value.shape.numpy()
    return (("K", depth), ("N", width))


def _try_extend(growth: _Growth, reader: ir.Node) -> _Growth | None:
    """The growth with `reader` as its next step, or None if it or its operands do not fit."""
    values, region = growth.values, growth.region
    result = values[-1]
    if reader.domain != "" or reader.graph is not growth.covered[0].graph:
        return None
    if len(reader.outputs) != 1 or not same_shape(reader.outputs[0], result):
        return None
    args: list[int] = []
    extras, kinds = list(growth.extras), list(region.extras)
    operands, bounds = _bounds(reader)
    if operands is None:
        return None
    for operand in operands:
        if operand in values:
            args.append(values.index(operand))
            continue
        kind = _extra_kind(operand, result, region.size("N"))
        if kind is None or operand is None:
            return None
        extras.append(operand)
        kinds.append(kind)
        args.append(-len(extras))
    if reader.op_type in ("Add", "Mul"):
        args.sort(reverse=True)
    attributes = tuple(
        (key, attribute.value)
        for key, attribute in sorted(reader.attributes.items())
        if (reader.op_type, key, attribute.value) not in _DEFAULTS
    )
    step = Step(reader.op_type, tuple(args), attributes + bounds)
    grown = dataclasses.replace(region, extras=tuple(kinds), steps=(*region.steps, step))
    return _Growth(grown, extras, [*growth.covered, reader])


def _bounds(
    reader: ir.Node,
) -> tuple[Sequence[ir.Value | None] | None, tuple[tuple[str, float], ...]]:
    """The operands of a step, and the constant bounds of a Clip as attributes.

    ONNX has them as inputs since opset 11; None for operands if they are not constant.
    """
    if reader.op_type != "Clip":
        return reader.inputs, ()
    found = []
    for name, value in zip(("min", "max"), reader.inputs[1:], strict=False):
        if value is not None:
            array = constant(value)
            if array is None or array.size != 1:
                return None, ()
            found.append((name, float(array.item())))
    return reader.inputs[:1], tuple(found)


def _extra_kind(operand: ir.Value | None, result: ir.Value, width: int) -> ExtraKind | None:
    array = constant(operand)
    if array is not None:
        fits = array.size == 1 or array.shape == (width,)
        return "channel" if fits and array.ndim <= 1 and array.dtype == np.float32 else None
    if operand is not None and operand.dtype is ir.DataType.FLOAT and same_shape(operand, result):
        return "tensor"
    return None


def _per_channel(graph: ir.Graph, operand: ir.Value, region: Region) -> ir.Value:
    """A constant as one value per channel; a scalar is repeated."""
    width, array = region.size("N"), constant(operand)
    assert array is not None
    if array.shape == (width,):
        return operand
    return new_initializer(graph, f"{operand.name}_per_channel", np.full(width, array, np.float32))

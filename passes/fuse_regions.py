"""Outline each anchor op with the elementwise ops after it as one function.

    y = Gelu(Add(QMatMulW8A8(q, s, w, ws), b))
        =>   y = QMatMulW8A8_K384_N1536_AddC_Gelu(q, s, w, ws, b)

A region grows by all nodes up to the one where the ways from its result join, as in x * Sigmoid(x),
so that it always has one exit and no way leads back into it; if these are elementwise, their other
operands are one value per channel or provably have the result's shape, and a kernel for the larger
region exists.  The function's body is the region in standard ops, so the numbers do not change.

Where the float part is in float16, a region is too, if a kernel exists, and takes in the Cast that
stands between (see `convert_float16`):

    q, s = Quantize(Cast(x))            =>   q, s = Quantize_K384_f16(x)
    y = Add(Cast(QMatMulW8A8(…)), b)    =>   y = QMatMulW8A8_K384_N1536_f16_AddC(…, b)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.analysis import GraphView
from qcompiler.ir.decisions import decide, left_to_ort
from qcompiler.ir.graph import (
    constant,
    new_initializer,
    only_consumer,
    replace_nodes,
    same_shape,
)
from qcompiler.ir.region import HALF, ExtraKind, Region, Step
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.outlining import RegionPass, outline

__all__ = ["FuseRegions"]

_DEFAULTS = frozenset({("Gelu", "approximate", "none")})
"""Attributes written out with their default value name no other kernel."""

_MOST_STEPS = 4
"""Nodes to look at before the ways join: HardSwish may come as Mul(x, Clip(Add(x, 3)) / 6)."""

_QUANTIZES = ("Quantize", "QuantizeFp8")

_ANCHORS = frozenset({
    *_QUANTIZES, "QMatMulW8A8", "QMatMulU8S8", "QMatMulU8U8", "QMatMulW4A8", "QMatMulW4A16",
    "QMatMulW4Z4A16", "QMatMulFp8",
})  # fmt: skip


@dataclasses.dataclass
class _Growth:
    """A region while it grows, with the graph objects it stands for."""

    region: Region
    inputs: list[ir.Value | None]
    extras: list[ir.Value]
    covered: list[ir.Node]

    @property
    def values(self) -> list[ir.Value]:
        """The anchor's result and that of each step."""
        results = [node.outputs[0] for node in self.covered]
        return results[len(results) - len(self.region.steps) - 1 :]


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
            start = self._start(node)
            if isinstance(start, str):
                decide(node, "body", start)
                continue
            assert node.graph is not None
            if node.graph not in views:
                views[node.graph] = GraphView(node.graph)
            self._outline(model, start, views[node.graph])
            outlined += 1
        if outlined:
            FixNames()(model)
            dialect.declare(model)
        return ir.passes.PassResult(model, outlined > 0)

    def _start(self, node: ir.Node) -> _Growth | str:
        """The region of an anchor alone, in float16 if it can be; why there is no kernel if not."""
        exact = _Growth(Region(node.op_type, _sizes(node)), list(node.inputs), [], [node])
        half = _in_half(node, exact)
        reason = None if half is None else self.supports(half.region)
        if half is not None and reason is None:
            return half
        if dialect.OPS[node.op_type].follows and half is not None:
            return reason or ""  # it has no other form
        return self.supports(exact.region) or exact

    def _grow(self, growth: _Growth, view: GraphView) -> _Growth:
        while growth.region.anchor not in _QUANTIZES:
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
        new = outline(model, growth.region, [*growth.inputs, *extras], like=anchor)
        steps = " + ".join(step.op for step in growth.region.steps)
        decide(new, "body", f"fused with {steps}" if steps else "outlined")
        widened = anchor.inputs[0]
        replace_nodes(growth.covered, [new])
        view.replaced(growth.covered, new)
        _drop_if_unread(widened)


def _in_half(node: ir.Node, exact: _Growth) -> _Growth | None:
    """The region of an anchor in float16, with the Cast beside it; None where it is not in that."""
    region = dataclasses.replace(exact.region, flags=(HALF,))
    if node.op_type in _QUANTIZES:
        value = node.inputs[0]
        cast = value.producer() if value is not None else None
        source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
        if source is None or source.dtype is not ir.DataType.FLOAT16:
            return None
        return _Growth(region, [source], [], [node])
    if dialect.OPS[node.op_type].follows:
        half = node.outputs[0].dtype is ir.DataType.FLOAT16
        return _Growth(region, exact.inputs, [], [node]) if half else None
    reader = only_consumer(node.outputs[0])
    if reader is None or reader.op_type != "Cast" or reader.graph is not node.graph:
        return None
    if reader.outputs[0].dtype is not ir.DataType.FLOAT16:
        return None
    return _Growth(region, exact.inputs, [], [node, reader])


def _sizes(node: ir.Node) -> tuple[tuple[str, int], ...]:
    block = node.attributes.get_int("block_size", 0)
    if node.op_type in _QUANTIZES:
        return (("K", block),)
    weight = node.inputs[dialect.OPS[node.op_type].inputs.index("w")]
    assert weight is not None and weight.const_value is not None
    depth, width = weight.const_value.shape.numpy()
    return (("K", depth), ("N", width), *((("G", block),) if block else ()))


def _drop_if_unread(value: ir.Value | None) -> None:
    """Remove the Cast that makes `value`, which a region has taken in, if nothing else reads it."""
    cast = value.producer() if value is not None else None
    if cast is None or cast.op_type != "Cast" or cast.graph is None or value is None:
        return
    if not value.uses() and not value.is_graph_output():
        cast.graph.remove(cast, safe=True)


def _try_extend(growth: _Growth, reader: ir.Node) -> _Growth | None:
    """The growth with `reader` as its next step, or None if it or its operands do not fit."""
    values, region = growth.values, growth.region
    result = values[-1]
    if reader.domain != "" or reader.graph is not growth.covered[0].graph:
        return None
    if len(reader.outputs) != 1 or not same_shape(reader.outputs[0], result):
        return None
    if reader.op_type == "Cast":
        return None  # between two types a region ends
    args: list[int] = []
    extras, kinds = list(growth.extras), list(region.extras)
    operands, bounds = _bounds(reader)
    if operands is None:
        return None
    for operand in operands:
        if operand in values:
            args.append(values.index(operand))
            continue
        kind = _extra_kind(operand, result, region)
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
    return _Growth(grown, growth.inputs, extras, [*growth.covered, reader])


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


def _extra_kind(operand: ir.Value | None, result: ir.Value, region: Region) -> ExtraKind | None:
    dtype = ir.DataType.FLOAT16 if HALF in region.flags else ir.DataType.FLOAT
    if operand is None or operand.dtype is not dtype:
        return None
    array = constant(operand)
    if array is not None:
        fits = array.size == 1 or array.shape == (region.size("N"),)
        return "channel" if fits and array.ndim <= 1 else None
    return "tensor" if same_shape(operand, result) else None


def _per_channel(graph: ir.Graph, operand: ir.Value, region: Region) -> ir.Value:
    """A constant as one value per channel; a scalar is repeated."""
    width, array = region.size("N"), constant(operand)
    assert array is not None
    if array.shape == (width,):
        return operand
    return new_initializer(graph, f"{operand.name}_per_channel", np.full(width, array, array.dtype))

"""Outline each anchor op with the elementwise ops after it as one function.

    y = Gelu(Add(QMatMulW8A8(q, s, w, ws), b))
        =>   y = QMatMulW8A8_K384_N1536_AddC_Gelu(q, s, w, ws, b)

A region grows by all nodes up to the one where the ways from its result join, as in x * Sigmoid(x),
so that it always has one exit and no way leads back into it; if these are elementwise, their other
operands are one value per channel or provably have the result's shape, or that of its last
dimensions (position embeddings), and a kernel for the larger region exists.  The function's body is
the region in standard ops, so the numbers do not change.

Quantizing by constants is such a step, where a result is uint8 or was for a while; a region does
not end in dequantizing:

    q' = Q(DQ(Q(QMatMulU8S8(q, s, z, w, ws))) + b)
        =>   q' = QMatMulU8S8_K384_N384_QuantizeLinearCC_DequantizeLinearCC_AddC_QuantizeLinearCC(…)

Where the float part is in float16, a region is too, if a kernel exists, and takes in the Cast that
stands between (see `convert_float16`):

    q, s = Quantize(Cast(x))            =>   q, s = Quantize_K384_f16(x)
    y = Add(Cast(QMatMulW8A8(…)), b)    =>   y = QMatMulW8A8_K384_N1536_f16_AddC(…, b)
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decide, left_to_ort
from qcompiler.ir.graph import drop_if_unread, every_node, only_consumer
from qcompiler.ir.region import HALF, Region
from qcompiler.passes.outlining import RegionPass, outline
from qcompiler.passes.region_growth import Growth, per_channel, try_extend

__all__ = ["FuseRegions"]

_MOST_STEPS = 4
"""Nodes to look at before the ways join: HardSwish may come as Mul(x, Clip(Add(x, 3)) / 6)."""

_QUANTIZES = ("Quantize", "QuantizeFp8", "QuantizeImage")

_LEFT_TO_ORT = ("QConv", "GroupSumsA8", "GroupSumsA16")

_ANCHORS = frozenset({
    *_QUANTIZES, "QMatMulW8A8", "QMatMulU8S8", "QMatMulU8U8", "QMatMulW4A8", "QMatMulW4S8A8",
    "GroupSumsA8", "QMatMulW4A16", "QMatMulW4Z4A16", "QMatMulFp8", "QConvW8A8",
})  # fmt: skip


class FuseRegions(RegionPass):
    """Outline the regions that have a kernel; leave the others to their op's body."""

    def outline_all(self, model: ir.Model) -> bool:
        """Outline every supported region, in branches and loops too."""
        outlined = 0
        for node in list(every_node(model.graph)):
            if node.domain != dialect.DOMAIN or node.op_type not in dialect.OPS:
                continue
            if node.op_type not in _ANCHORS:
                if node.op_type not in _LEFT_TO_ORT:
                    decide(node, "body", f"no kernel for {node.op_type} yet")
                continue
            if (reason := left_to_ort(node)) is not None:
                decide(node, "body", reason, expected=True)
                continue
            start = self._start(node)
            if isinstance(start, str):
                if node.op_type not in _LEFT_TO_ORT:
                    decide(node, "body", start)
                continue
            self._outline(model, start)
            outlined += 1
        if outlined:
            dialect.declare(model)
        return outlined > 0

    def _start(self, node: ir.Node) -> Growth | str:
        """The region of an anchor alone, in float16 if it can be; why there is no kernel if not."""
        if (sizes := _sizes(node)) is None:
            return "the number of its channels is not known"
        region = Region(node.op_type, sizes, attributes=_attributes(node))
        exact = Growth(region, list(node.inputs), [], [node])
        half = _in_half(node, exact)
        reason = None if half is None else self.supports(half.region)
        if half is not None and reason is None:
            return half
        if dialect.OPS[node.op_type].follows and half is not None:
            return reason or ""  # it has no other form
        return self.supports(exact.region) or exact

    def _grow(self, growth: Growth) -> Growth:
        best, view = growth, self.view_of(growth.covered[0])
        while growth.region.anchor not in (*_QUANTIZES, *_LEFT_TO_ORT):
            grown: Growth | None = growth
            for reader in view.joined(growth.values[-1], _MOST_STEPS):
                grown = try_extend(grown, reader) if grown is not None else None
            if grown is None or grown is growth or self.refusal(grown.region, grown.covered):
                break
            growth = grown
            # A result of 8 bits is less to store and to read, and may be what ORT's ops take.
            best = best if growth.was_dequantized else growth
        return best

    def _outline(self, model: ir.Model, growth: Growth) -> None:
        growth = self._grow(growth)
        anchor = growth.covered[0]
        # Each once: the scale of a Q is often that of the DQ behind it.
        extras = {
            value: per_channel(model.graph, value, growth.region) if kind == "channel" else value
            for value, kind in dict(zip(growth.extras, growth.region.extras, strict=True)).items()
        }
        operands = [*growth.inputs, *(extras[value] for value in growth.extras)]
        new = outline(model, growth.region, operands, like=anchor)
        steps = " + ".join(step.op for step in growth.region.steps)
        decide(new, "body", f"fused with {steps}" if steps else "outlined")
        # The bounds of a Clip have become attributes.
        taken_in = (value for node in growth.covered[1:] for value in node.inputs)
        read = dict.fromkeys([anchor.inputs[0], *growth.extras, *taken_in])
        self.put(new, growth.covered, growth.covered[-1].outputs)
        for value in read:
            _drop_if_unread(value)


def _in_half(node: ir.Node, exact: Growth) -> Growth | None:
    """The region of an anchor in float16, with the Cast beside it; None where it is not in that."""
    region = dataclasses.replace(exact.region, flags=(HALF,))
    if node.op_type in _QUANTIZES:
        value = node.inputs[0]
        cast = value.producer() if value is not None else None
        source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
        if source is None or source.dtype is not ir.DataType.FLOAT16:
            return None
        return Growth(region, [source, *exact.inputs[1:]], [], [node])
    if dialect.OPS[node.op_type].follows:
        half = node.outputs[0].dtype is ir.DataType.FLOAT16
        return Growth(region, exact.inputs, [], [node]) if half else None
    reader = only_consumer(node.outputs[0])
    if reader is None or reader.op_type != "Cast" or reader.graph is not node.graph:
        return None
    if reader.outputs[0].dtype is not ir.DataType.FLOAT16:
        return None
    return Growth(region, exact.inputs, [], [node, reader])


def _attributes(node: ir.Node) -> tuple[tuple[str, int | tuple[int, ...]], ...]:
    """Those of an op: strides, pads; the size of groups where that is all it has."""
    if node.op_type in _LEFT_TO_ORT:
        return (("block_size", node.attributes.get_int("block_size")),)
    lists = [a for a in node.attributes.values() if a.type is ir.AttributeType.INTS]
    found: dict[str, int | tuple[int, ...]] = {a.name: tuple(a.as_ints()) for a in lists}
    if "group" in node.attributes:
        found["group"] = node.attributes.get_int("group", 1)
    return tuple(sorted(found.items()))


def _sizes(node: ir.Node) -> tuple[tuple[str, int], ...] | None:
    block = node.attributes.get_int("block_size", 0)
    if node.op_type == "QuantizeImage":
        x = node.inputs[0]
        channels = x.shape[1] if x is not None and x.shape is not None else None
        return (("K", channels),) if isinstance(channels, int) else None
    if node.op_type in _QUANTIZES:
        return (("K", block),)
    if node.op_type in _LEFT_TO_ORT:
        return (("G", block),)
    weight = node.inputs[dialect.OPS[node.op_type].inputs.index("w")]
    assert weight is not None and weight.const_value is not None
    shape = weight.const_value.shape.numpy()
    if node.op_type == "QConvW8A8":
        columns, channels, *taps = shape
        depth = channels * node.attributes.get_int("group", 1)
        return (("K", depth), ("N", columns), *zip("RS", taps, strict=True))
    depth, width = shape
    return (("K", depth), ("N", width), *((("G", block),) if block else ()))


def _drop_if_unread(value: ir.Value | None) -> None:
    """Remove what makes `value`, which a region has taken in, if nothing else reads it."""
    if value is None or value.uses() or value.is_graph_output():
        return
    node = value.producer()
    if node is None:
        drop_if_unread(value)
    elif node.op_type in ("Cast", "DequantizeLinear") and node.graph is not None:
        sources = list(node.inputs)
        node.graph.remove(node, safe=True)
        for source in sources:
            _drop_if_unread(source)

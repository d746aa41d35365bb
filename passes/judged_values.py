"""The float tensors by which a model is judged beside a copy whose tensors hold other numbers.

    y                                         =>   y
    ArgMax(y)                                 =>   y
    Gather(boxes, NonMaxSuppression(b, s))    =>   boxes, b, s

An output of floats is one itself.  Integers tell too little, and values whose size follows from
other values cannot be compared at all, for the copy has others; so of those what they are made of
is one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from qcompiler.ir.graph import constant, every_node

__all__ = ["judged_values"]

_FLOATS = frozenset({
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE,
})  # fmt: skip

_SELECT = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
"""Ops that make as many values as they find."""

_SIZES = {
    "CenterCropPad": 1, "ConstantOfShape": 0, "Expand": 1, "OneHot": 1, "Pad": 1, "Range": 0,
    "Reshape": 1, "Resize": 2, "Slice": 1, "Split": 1, "Tile": 1, "TopK": 1, "Upsample": 1,
}  # fmt: skip
"""From which of their operands on they are told sizes."""

_BRANCHES = frozenset({"If", "Loop", "Scan"})


def judged_values(graph: ir.Graph) -> list[ir.Value]:
    """Values of a graph whose shapes do not depend on what its floats hold, nearest to its end.

    Of what is not made by nodes there are none: inputs and constants are the same in a copy.
    """
    sized = _sized_by_values(graph)
    found: dict[ir.Value, None] = {}
    seen: set[ir.Value] = set()
    left = list(reversed(graph.outputs))
    while left:
        value = left.pop()
        maker = value.producer()
        if maker is None or value in seen or constant(value) is not None:
            continue
        seen.add(value)
        if value.dtype in _FLOATS and value not in sized:
            found[value] = None
        elif maker.op_type not in ("Shape", "Size"):
            left.extend(reversed(_read(maker)))
    return list(found)


def _sized_by_values(graph: ir.Graph) -> Collection[ir.Value]:
    """The values whose size follows from what floats hold."""
    counted: set[ir.Value] = set()  # integers that are made of floats
    sized: set[ir.Value] = set()
    for node in graph:
        read = _read(node)
        if node.op_type not in ("Shape", "Size") and any(
            value.dtype in _FLOATS or value in counted for value in read
        ):
            counted.update(value for value in node.outputs if value.dtype not in _FLOATS)
        told = node.inputs[_SIZES.get(node.op_type, len(node.inputs)) :]
        steered = node.inputs if node.op_type in _BRANCHES else told
        if (
            not sized.isdisjoint(read)
            or not counted.isdisjoint(steered)
            or any(inner.op_type in _SELECT for inner in (node, *_inside(node)))
        ):
            sized.update(value for value in node.outputs if not _fixed(value))
    return sized


def _read(node: ir.Node) -> list[ir.Value]:
    """What a node reads, and what its branches read of the graph that it is in."""
    inside = list(_inside(node))
    own = {value for inner in inside for value in inner.outputs}
    read = [*node.inputs, *(value for inner in inside for value in inner.inputs)]
    return [value for value in read if value is not None and value not in own]


def _inside(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes of a node's branches."""
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield from every_node(attribute.as_graph())


def _fixed(value: ir.Value) -> bool:
    """Whether all sizes of a value are known beforehand."""
    return value.shape is not None and all(isinstance(size, int) for size in value.shape)

"""What a network's last layers make: values of each number of which one of an output is made.

    z = y;   z = Reshape(y);   z = Softmax(Concat(y, x));   z = ArgMax(y)   =>   y

An error that is made there is the output's own: nothing that follows averages it out with others,
as a sum or an interpolation would.  Where integers are made of floats (ArgMax, TopK, what
NonMaxSuppression finds), rounding makes equal what was not, and the first of equals wins: so what
those are made of counts, too (`judged_values`), and a network to which somebody added an ArgMax is
quantized as it was without.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qcompiler.ir.graph import constant
from qcompiler.passes.judged_values import judged_values
from qcompiler.passes.move_pairs import interpolates

__all__ = ["last_values"]

_MOVE = frozenset({
    "Cast", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Resize",
    "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
_LAST = frozenset({"HardSigmoid", "LogSoftmax", "Sigmoid", "Softmax", "Tanh"})
"""Activations of outputs: they change no order, and the errors that they read are theirs."""


def last_values(graph: ir.Graph) -> frozenset[ir.Value]:
    """The values of a graph that its outputs are made of, and all in between."""
    found: set[ir.Value] = set()
    left = judged_values(graph)
    while left:
        value = left.pop()
        if value not in found:
            found.add(value)
            maker = value.producer()
            left.extend(() if maker is None else _made_of(maker))
    return frozenset(found)


def _made_of(node: ir.Node) -> Iterator[ir.Value]:
    """What a node's results are numbers of, each of one; nothing where that is not so."""
    if node.domain != "" or interpolates(node):
        return
    if node.op_type in _MOVE or node.op_type in _LAST:
        read = list(node.inputs[:1])
    else:
        read = list(node.inputs) if node.op_type == "Concat" else []
    yield from (value for value in read if value is not None and constant(value) is None)

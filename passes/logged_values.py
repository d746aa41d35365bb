"""The values whose logarithm is taken: what is small in them counts as much as what is large.

    Log(Clip(MatMul(Pow(Conv(x, D), 2), M)))   =>   the results of MatMul, Pow and Conv

Rounding errors are a part of the largest number of a row, or of a tensor.  In a spectrum that is
millions of times as much as what is heard in the pauses, of which a logarithm then tells nothing:
a model that begins with sound and computes its own mel spectrum lost all but 11 dB, where each of
its products by itself was 43 dB from its float.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.graph import constant, every_node

__all__ = ["logged_values"]

_PRODUCTS = frozenset({"Conv", "MatMul"})
_MOST_PRODUCTS = 2
"""A Fourier transform and a bank of filters. A network that ends in a Log has more layers."""

_ARITHMETIC = frozenset({
    "Abs", "Add", "Clip", "Concat", "Div", "Flatten", "Gather", "Identity", "Max", "Min", "Mul",
    "Pow", "ReduceL2", "ReduceSum", "ReduceSumSquare", "Reshape", "Slice", "Split", "Sqrt",
    "Squeeze", "Sub", "Transpose", "Unsqueeze",
})  # fmt: skip
"""What signal processing does between its products; no activation of a network is among them."""


def logged_values(graph: ir.Graph) -> frozenset[ir.Value]:
    """The values of a graph and its branches of which a Log is computed, nothing learnt between."""
    found: dict[ir.Value, int] = {}
    left = [(value, 0) for node in every_node(graph) if node.op_type == "Log"
            for value in node.inputs if value is not None]  # fmt: skip
    while left:
        value, products = left.pop()
        if constant(value) is not None or found.get(value, _MOST_PRODUCTS + 1) <= products:
            continue
        found[value] = products
        maker = value.producer()
        if maker is None or maker.domain != "":
            continue
        if maker.op_type in _ARITHMETIC:
            left.extend((read, products) for read in maker.inputs if read is not None)
        elif maker.op_type in _PRODUCTS and products + 1 < _MOST_PRODUCTS:
            read = maker.inputs[0]
            left.extend([] if read is None else [(read, products + 1)])
    return frozenset(found)

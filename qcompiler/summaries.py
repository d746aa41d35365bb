"""Compute inside the graph what calibration wants to know of a tensor, so that it need not leave.

    x   =>   ReduceMin(x), ReduceMax(x), ReduceSum(x),
             Gather(Reshape(x, [-1, b]), (i + u) n / k)    i < k

A tensor that leaves the graph has memory of its own: 64 MB for what is inside ResNet50, which are
written and read again where the next op would have found them in the cache.  There is no ReduceMin
of what cannot be below 0, such as the result of a Relu: ranges hold 0 anyway.

Of its n rows of b neighbours k are counted: rows, because to gather one value takes as long as to
gather four; and a prime number of them, so that the steps from one to the next do not repeat with
the rows of an image.  u is another number from 0 to 1 for each sample, so that what always lies at
one place is counted in some.  It is made of the sum of what goes into the model: ONNX Runtime draws
no random numbers from opset 22 on, and so a sample is counted alike wherever it comes in a folder.

Maxima pass over NaN in ONNX Runtime, sums do not.  So there is a ReduceSum too, but not of what
hands on its NaN to another tensor that is summed: a convolution of stride 1 or a Relu do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.graph import new_initializer, same_dimension
from qcompiler.samples import Sample

__all__ = ["Summary", "summarized"]

_COUNTED = 128 * 2039
"""Rows of one tensor that all samples together give: more take longer than the model does."""

_PRIMES = (2039, 4093, 8191, 16381)
"""How many one sample gives: the first of these that is enough."""

_NEIGHBOURS = 4
"""The most values in a row."""

_NEVER_NEGATIVE = frozenset({"Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Sqrt"})
_KEEP_SIGNS = frozenset({
    "AveragePool", "Concat", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool",
    "Reshape", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Ops whose results are not below 0 if no float that they read is."""

_HAND_ON = frozenset({
    "Add", "Concat", "Conv", "Flatten", "GlobalAveragePool", "Identity", "MatMul", "Mul", "Relu",
    "Reshape", "Squeeze", "Sub", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Ops some of whose results are NaN if any value of a float operand is."""

_NUMBERS = frozenset({
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.INT32,
    ir.DataType.INT64, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.BOOL,
})  # fmt: skip
"""Types of inputs that are cast to float for their sum."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """The names of what is computed of one tensor.

    Attributes:
        low: Least values of its parts; None of a tensor that is not below 0.
        high: Greatest ones.
        total: Their sums; None where NaN is noticed elsewhere.
        some: Values evenly spaced; None where nobody counts them.
    """

    low: str | None
    high: str
    total: str | None
    some: str | None

    @property
    def names(self) -> list[str]:
        """All of them."""
        every = (self.low, self.high, self.total, self.some)
        return [name for name in every if name is not None]

    def ends(self, tensors: Sample) -> tuple[float, float]:
        """The least value, or 0, and the greatest; the wrong way round of an empty tensor.

        Raises:
            ValueError: NaN or infinity among the values.
        """
        if not tensors[self.high].size:
            return math.inf, -math.inf
        low = 0.0 if self.low is None else float(tensors[self.low].min())
        high = float(tensors[self.high].max())
        # A sum that overflows is infinite, but no NaN.
        lost = self.total is not None and np.isnan(tensors[self.total]).any()
        # Of nothing the least is infinite, and the greatest minus infinity.
        if lost or low == -math.inf or high == math.inf or math.isnan(low) or math.isnan(high):
            raise ValueError("NaN or Inf among the values")
        return low, high

    def values(self, tensors: Sample) -> NDArray[np.float32]:
        """Some of the values."""
        none = np.zeros(0, np.float32)
        return none if self.some is None else tensors[self.some].reshape(-1)


def summarized(
    model: ir.Model, names: Sequence[str], counted: Collection[str], samples: int
) -> tuple[ir.Model, Mapping[str, Summary]]:
    """A model that also computes the summaries of tensors.

    Args:
        model: It is not changed.
        names: Float tensors of its main graph, inputs among them.
        counted: Those of which some values are wanted.
        samples: How many it will be run on: of many each gives less.
    """
    writer = _Writer(model.clone(), frozenset(names), samples)
    # ONNX Runtime begins with what was added last: so each tensor is read soon after it was made,
    # and forgotten, where the other way round all of them are kept to the end.
    made = {name: writer.summary(name, name in counted) for name in reversed(names)}
    return writer.model, {name: made[name] for name in names}


class _Writer:
    def __init__(self, model: ir.Model, names: Collection[str], samples: int) -> None:
        self.model = model
        self._summed = _summed(model.graph, names)
        self._values = {value.name: value for value in model.graph.inputs}
        self._values |= {value.name: value for node in model.graph for value in node.outputs}
        share = _COUNTED // max(samples, 1)
        self._most = self._constant(next((p for p in _PRIMES if p >= share), _PRIMES[-1]))
        self._first, self._step = self._constant(0), self._constant(1)
        self._never_negative = _never_negative(model.graph)
        self._turn = self._fraction()
        self._positions: dict[object, ir.Value] = {}

    def summary(self, name: str, counted: bool) -> Summary:
        value = self._values[name]
        # By rows of tokens or channels, which ONNX Runtime shares among threads.
        rank = 0 if value.shape is None else len(value.shape)
        axes = [self._constant(list(range(2, rank)))] if rank > 2 else []

        def reduced(op: str) -> str:
            return self._named(f"{name}@{op}", op, [value, *axes], {"keepdims": 0})

        low = None if value in self._never_negative else reduced("ReduceMin")
        high = reduced("ReduceMax")
        total = reduced("ReduceSum") if name in self._summed else None
        if not counted:
            return Summary(low, high, total, None)
        row = _neighbours(value)
        flat = self._append("Reshape", [value, self._constant([-1, row] if row > 1 else [-1])])
        some = self._named(f"{name}@some", "Gather", [flat, self._positions_in(value, row)], {})
        return Summary(low, high, total, some)

    def _fraction(self) -> ir.Value:
        """A number from 0 to 1 that differs from sample to sample: sin(12.99 sum) 43758.5453."""
        inputs = [value for value in self.model.graph.inputs if value.dtype in _NUMBERS]
        hashed = self._number(0.5)
        for value in inputs:
            real = self._append("Cast", [value], {"to": ir.DataType.FLOAT})
            total = self._append("ReduceSum", [real], {"keepdims": 0})
            spread = self._append("Sin", [self._append("Mul", [total, self._number(12.9898)])])
            hashed = self._append(
                "Add", [hashed, self._append("Mul", [spread, self._number(43758.5453)])]
            )
        turn = self._append("Sub", [hashed, self._append("Floor", [hashed])])
        # A sum may overflow, and an infinite one has no sine.
        return self._append("Where", [self._append("IsNaN", [turn]), self._number(0.5), turn])

    def _positions_in(self, value: ir.Value, row: int) -> ir.Value:
        """Which rows of a tensor count; computed once for each shape."""
        shape = value.shape
        # Some exporters call every size that they do not know "?".
        known = shape is not None and all(same_dimension(size, size) for size in shape)
        key = str(shape) if known else value
        if key not in self._positions:
            size = self._append("Div", [self._append("Size", [value]), self._constant(row)])
            count = self._append("Min", [size, self._most])
            steps = self._append("Range", [self._first, count, self._step])
            ends = self._append("Add", [self._append("Mul", [steps, size]), self._shift(size)])
            # ONNX Runtime refuses to divide by 0 where there is nothing to divide, too.
            above = self._append("Max", [count, self._step])
            self._positions[key] = self._append("Div", [ends, above])
        return self._positions[key]

    def _shift(self, size: ir.Value) -> ir.Value:
        """A whole number from 0 to below `size`."""
        width = self._append("Cast", [size], {"to": ir.DataType.FLOAT})
        real = self._append("Mul", [self._turn, width])
        shift = self._append("Cast", [real], {"to": ir.DataType.INT64})
        # Floats are rounded: it may have become the size.
        return self._append("Min", [shift, self._append("Sub", [size, self._step])])

    def _named(
        self, name: str, op: str, inputs: Sequence[ir.Value], attributes: Mapping[str, int]
    ) -> str:
        value = self._append(op, inputs, attributes)
        value.name, value.dtype = name, ir.DataType.FLOAT
        return name

    def _append(
        self, op: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        node.outputs[0].name = f"summary_{len(self.model.graph)}@"
        self.model.graph.append(node)
        return node.outputs[0]

    def _constant(self, number: int | list[int]) -> ir.Value:
        return new_initializer(self.model.graph, "number", np.asarray(number, np.int64))

    def _number(self, number: float) -> ir.Value:
        return new_initializer(self.model.graph, "number", np.asarray(number, np.float32))


def _never_negative(graph: ir.Graph) -> Collection[ir.Value]:
    """The results in a graph of which nothing is below 0, as far as their makers tell."""
    found: set[ir.Value] = set()
    for node in graph:
        data = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        kept = node.op_type in _KEEP_SIGNS and found.issuperset(data)
        if node.domain == "" and (kept or node.op_type in _NEVER_NEGATIVE):
            found.update(node.outputs)
    return found


def _summed(graph: ir.Graph, names: Collection[str]) -> Collection[str]:
    """Those of the named tensors whose NaN reaches no other; inputs are checked before they run."""
    found: set[str] = set()
    heard: set[ir.Value] = set()
    for node in reversed(graph):
        for value in node.outputs:
            if value.name in names and value not in heard:
                found.add(value.name or "")
                heard.add(value)
        if _hands_on(node) and node.outputs[0] in heard:
            data = node.inputs[:1] if node.op_type in ("Conv", "Reshape") else node.inputs
            heard.update(value for value in data if value is not None)
    return found


def _hands_on(node: ir.Node) -> bool:
    """Whether one NaN in what it reads makes one in what it makes."""
    if node.op_type == "Conv":  # by larger steps it passes over some values
        steps = [
            *node.attributes.get_ints("strides", ()),
            *node.attributes.get_ints("dilations", ()),
        ]
        return node.domain == "" and all(step == 1 for step in steps)
    return node.domain == "" and node.op_type in _HAND_ON


def _neighbours(value: ir.Value) -> int:
    """By which power of two, up to `_NEIGHBOURS`, the size of a tensor is surely divisible."""
    known = [size for size in value.shape or () if isinstance(size, int)]
    return math.gcd(math.prod(known) or 1, _NEIGHBOURS)

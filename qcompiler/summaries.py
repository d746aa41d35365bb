"""Compute inside the graph what calibration wants to know of a tensor, so that it need not leave.

    x   =>   ReduceMin(x), ReduceMax(x), ReduceSum(x),
             Gather(Reshape(x, [-1]), (i + u) n / k)    i < k

A tensor that leaves the graph has memory of its own: 64 MB for what is inside ResNet50, which are
written and read again where the next op would have found them in the cache.  n is the number of
its values and k that of those that are counted: a prime, so that the steps from one to the next do
not repeat with the rows of an image.  u is another number from 0 to 1 in each run, so that what
always lies at one place is counted in some samples; every calibration draws the same numbers.  From
opset 22 on, where ONNX Runtime draws none, it is 1/2.

Maxima pass over NaN in ONNX Runtime, sums do not.
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

_COUNTED = 128 * 4093
"""Values of one tensor that all samples together give: more take longer than the model does."""

_PRIMES = (4093, 8191, 16381, 32749)
"""How many one sample gives: the first of these that is enough."""


_SCALAR = ir.AttrInt64s("shape", [])
_NO_RANDOM_NUMBERS = 22
"""The opset from which on ONNX Runtime 1.32 has no RandomUniform."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """The names of what is computed of one tensor.

    Attributes:
        low: Least values of its parts.
        high: Greatest ones.
        total: Their sums.
        some: Values evenly spaced; None where nobody counts them.
    """

    low: str
    high: str
    total: str
    some: str | None

    @property
    def names(self) -> list[str]:
        """All of them."""
        every = (self.low, self.high, self.total, self.some)
        return [name for name in every if name is not None]

    def ends(self, tensors: Sample) -> tuple[float, float]:
        """The least and the greatest value; infinite, the wrong way round, of an empty tensor.

        Raises:
            ValueError: NaN or infinity among the values.
        """
        if not tensors[self.low].size:
            return math.inf, -math.inf
        low, high = float(tensors[self.low].min()), float(tensors[self.high].max())
        # A sum that overflows is infinite, but no NaN.
        broken = np.isnan(tensors[self.total]).any() or low == -math.inf or high == math.inf
        if broken or math.isnan(low) or math.isnan(high):
            raise ValueError("NaN or Inf among the values")
        return low, high

    def values(self, tensors: Sample) -> NDArray[np.float32]:
        """Some of the values."""
        none = np.zeros(0, np.float32)
        return none if self.some is None else tensors[self.some]


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
    writer = _Writer(model.clone(), samples)
    return writer.model, {name: writer.summary(name, name in counted) for name in names}


class _Writer:
    def __init__(self, model: ir.Model, samples: int) -> None:
        self.model = model
        self._values = {value.name: value for value in model.graph.inputs}
        self._values |= {value.name: value for node in model.graph for value in node.outputs}
        share = _COUNTED // max(samples, 1)
        self._most = self._constant(next((p for p in _PRIMES if p >= share), _PRIMES[-1]))
        self._first, self._step = self._constant(0), self._constant(1)
        self._flat = self._constant([-1])
        self._turn = (
            self._append("RandomUniform", [], {"shape": _SCALAR, "seed": 0.0})
            if self.model.opset_imports.get("", 1) < _NO_RANDOM_NUMBERS
            else new_initializer(self.model.graph, "half", np.asarray(0.5, np.float32))
        )
        self._positions: dict[object, ir.Value] = {}

    def summary(self, name: str, counted: bool) -> Summary:
        value = self._values[name]
        # By rows of tokens or channels, which ONNX Runtime shares among threads.
        rank = 0 if value.shape is None else len(value.shape)
        axes = [self._constant(list(range(2, rank)))] if rank > 2 else []
        low, high, total = (
            self._named(f"{name}@{op}", op, [value, *axes], {"keepdims": 0})
            for op in ("ReduceMin", "ReduceMax", "ReduceSum")
        )
        if not counted:
            return Summary(low, high, total, None)
        row = self._append("Reshape", [value, self._flat])
        some = self._named(f"{name}@some", "Gather", [row, self._positions_in(value)], {})
        return Summary(low, high, total, some)

    def _positions_in(self, value: ir.Value) -> ir.Value:
        """Where in the row of a tensor the values are that count; computed once for each shape."""
        shape = value.shape
        # Some exporters call every size that they do not know "?".
        known = shape is not None and all(same_dimension(size, size) for size in shape)
        key = str(shape) if known else value
        if key not in self._positions:
            size = self._append("Size", [value])
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

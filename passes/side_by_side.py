"""Put a quantized copy beside a model, and measure inside the graph what it does wrong.

    y = f(x)                     =>   y = f(x);  y' = f'(x);  noise = Mean((y' - y)^2)

The means are all that leaves the graph, so that memory does not grow with what is compared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import bias_shift, plan_of, set_plan
from qcompiler.ir.graph import constant, every_node, new_initializer, rectified
from qcompiler.passes.insert_qdq import InsertQDQ, Observer
from qcompiler.passes.judged_values import judged_values
from qcompiler.passes.round_to_nearest import RoundToNearest

__all__ = [
    "Comparison",
    "Rows",
    "Runner",
    "channel_maxima",
    "output_errors",
    "own_errors",
    "quantized_copy",
]

Runner = Callable[[ir.Model, Sequence[str]], Mapping[str, NDArray[np.float32]]]
"""Runs a model as it is written, nothing fused, on some samples and returns the named tensors, of
two axes each, one sample's rows after the other's; nothing where it could not be run."""

Rows = Mapping[str, NDArray[np.float32]]
"""What a `Runner` returns."""

_MARK = "@quantized"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The names of what is known of one tensor, each [N, C] for C channels of a batch of N.

    Attributes:
        noise: The mean squared difference.
        signal: The mean of the exact tensor's squares.
        drift: The mean difference.
    """

    noise: str
    signal: str
    drift: str

    @property
    def names(self) -> tuple[str, str, str]:
        """All of them."""
        return self.noise, self.signal, self.drift

    def by_channel(self, rows: Rows) -> float:
        """SQNR in dB of the average channel, one that is lost counting 1; infinite if all are 0.

        NaN where no sample holds it, or its squares are infinite.
        """
        if not len(rows[self.noise]):
            return math.nan
        noise, signal = (rows[name].mean(axis=0, dtype=np.float64) for name in self.names[:2])
        alive = signal > 0
        with np.errstate(invalid="ignore"):  # squares that left the range of float32: nobody knows
            shares = np.minimum(noise[alive] / signal[alive], 1.0)
        return _decibels(float(shares.mean())) if alive.any() else math.inf

    def overall(self, rows: Rows) -> float:
        """SQNR in dB of the whole tensor; infinite if it is 0."""
        noise, signal = (float(rows[name].sum(dtype=np.float64)) for name in self.names[:2])
        return _decibels(noise / signal) if signal > 0 else math.inf


def quantized_copy(model: ir.Model, observe: Observer | None) -> ir.Model:
    """The model as the plans of its nodes will have it, rounded to nearest.

    Raises:
        CalibrationError: A static plan, and nothing to calibrate it with.
    """
    copy = model.clone()
    for node in every_node(copy.graph):
        if (plan := plan_of(node)) is not None:
            set_plan(node, dataclasses.replace(plan, rounding="nearest"))
    InsertQDQ(observe)(copy)
    RoundToNearest()(copy)
    return copy


def channel_maxima(model: ir.Model, values: Sequence[ir.Value]) -> tuple[ir.Model, list[str]]:
    """A model that computes the largest magnitude of each channel of images.

    Args:
        model: It is not changed.
        values: What convolutions of its main graph read.

    Returns:
        The model to run, and the names of the maxima, [N, C] each for a batch of N.
    """
    joined = _Joined(model, None, exact=True)
    maxima = []
    for value in values:
        reader = next(use.node for use in value.uses() if use.node.op_type == "Conv")
        magnitude = joined.append("Abs", [joined.left[value.name or ""]])
        maxima.append(joined.reduced("ReduceMax", magnitude, _channels(reader)))
    return joined.model, maxima


def output_errors(model: ir.Model, quantized: ir.Model) -> tuple[ir.Model, list[Comparison]]:
    """Both models with the same inputs, and what differs at each output of the first.

    Nothing is compared where one of the two is not finite: the logarithm of 0, or what is masked.

    Args:
        model: It is not changed.
        quantized: The same with some nodes quantized; it is taken apart.

    Returns:
        The model to run, and what to compare: outputs of floats, and of others what they are made
        of, see `judged_values`.
    """
    names = [value.name or "" for value in judged_values(model.graph)]
    joined = _Joined(model, quantized, exact=False)
    pairs = [(joined.left[name], joined.right[name]) for name in names if name in joined.right]
    return joined.model, [joined.compare(*joined.finite(*pair), None) for pair in pairs]


def own_errors(
    model: ir.Model, quantized: ir.Model, names: Sequence[str], *, stored: bool = True
) -> tuple[ir.Model, dict[str, Comparison]]:
    """What each node does wrong when all that it reads is exact.

    Args:
        model: It is not changed.
        quantized: The same with some nodes quantized; it is taken apart.
        names: Of nodes of the main graph, which both have.
        stored: Look at results behind the Relu and the pair that are part of the nodes.

    Returns:
        The model to run, and by name what to compare.
    """
    joined = _Joined(model, quantized, exact=True)
    nodes = {node.name: node for node in model.graph}
    found = {}
    for name in names:
        found[name] = joined.compare(*joined.results(nodes[name], stored), _channels(nodes[name]))
    return joined.model, found


class _Joined:
    """The nodes of a model and, after them, those of its quantized copy."""

    def __init__(self, model: ir.Model, quantized: ir.Model | None, *, exact: bool) -> None:
        self.model = model.clone()
        copy = ir.Graph([], [], nodes=[]) if quantized is None else quantized.graph
        graph = self.model.graph
        inputs = {value.name or "": value for value in graph.inputs}
        self.left = inputs | _results(graph)
        self.right = inputs | _results(copy)
        self.pairs = {
            node.inputs[0].name: node
            for node in copy
            if node.op_type == "QuantizeLinear" and node.inputs[0] is not None
        }
        shared = self.left if exact else inputs
        for node in every_node(copy):
            for index, value in enumerate(node.inputs):
                if value is not None and value.const_value is None and value.name in shared:
                    node.replace_input_with(index, shared[value.name])
        _move(copy, graph)
        graph.outputs.clear()

    def results(self, node: ir.Node, stored: bool) -> tuple[ir.Value, ir.Value]:
        """What a node of the model makes, and what it makes in the copy, its bias corrected."""
        value = node.outputs[0]
        exact, other = self.left[value.name or ""], self.right[value.name or ""]
        plan, shift = plan_of(node), bias_shift(node)
        if shift is not None and node.op_type == "MatMul":  # a Conv's is in its bias
            taken = new_initializer(self.model.graph, "shift", shift)
            other = self.append("Sub", [other, taken])
        if plan is None or plan.output is None or not stored:
            return exact, other
        after = rectified(value)
        if after is not value:
            exact, other = self.left[after.name or ""], self.append("Relu", [other])
        pair = self.pairs.get(after.name)
        if pair is not None:
            steps = list(pair.inputs[1:])
            other = self.append("QuantizeLinear", [other, *steps])
            other = self.append("DequantizeLinear", [other, *steps])
        return exact, other

    def finite(self, exact: ir.Value, other: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Both in float32, and 0 where their difference is no finite number."""
        exact, other = (
            value
            if value.dtype is ir.DataType.FLOAT
            else self.append("Cast", [value], {"to": ir.DataType.FLOAT})
            for value in (exact, other)
        )
        difference = self.append("Sub", [exact, other])
        nothing = new_initializer(self.model.graph, "nothing", np.asarray(0, np.float32))
        # What is infinite or NaN differs from itself by NaN, which equals nothing.
        same = self.append("Equal", [self.append("Sub", [difference, difference]), nothing])
        left, right = (self.append("Where", [same, value, nothing]) for value in (exact, other))
        return left, right

    def compare(
        self, exact: ir.Value, other: ir.Value, channels: tuple[int, int] | None
    ) -> Comparison:
        """Means over a tensor and what differs, for each of its channels or of all."""
        difference = self.append("Sub", [other, exact])
        squares = [self.append("Mul", [value, value]) for value in (difference, exact)]
        return Comparison(
            *(self.reduced("ReduceMean", value, channels) for value in (*squares, difference))
        )

    def reduced(self, op: str, value: ir.Value, channels: tuple[int, int] | None) -> str:
        """The name of a tensor reduced to one row, or for (axis, rank) to one for each picture."""
        if channels is None:
            total = self.append(op, [value, self._integers([])])
            return self.append("Reshape", [total, self._integers([1, 1])]).name or ""
        axis, rank = channels
        axes = [index for index in range(rank) if index not in (0, axis)] if rank > 2 else [0]
        keep = {"keepdims": int(rank == 2)}
        return self.append(op, [value, self._integers(axes)], keep).name or ""

    def _integers(self, numbers: Sequence[int]) -> ir.Value:
        return new_initializer(self.model.graph, "numbers", np.asarray(numbers, np.int64))

    def append(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        node.outputs[0].name = f"{op}_{len(self.model.graph)}{_MARK}"
        self.model.graph.append(node)
        return node.outputs[0]


def _decibels(noise_to_signal: float) -> float:
    return math.inf if noise_to_signal == 0 else -10 * math.log10(noise_to_signal)


def _results(graph: ir.Graph) -> dict[str, ir.Value]:
    return {value.name or "": value for node in graph for value in node.outputs}


def _move(source: ir.Graph, goal: ir.Graph) -> None:
    """Move nodes and initializers under new names."""
    source.outputs.clear()
    constants = [value for value in source.initializers.values() if not value.is_graph_input()]
    source.initializers.clear()
    for value in constants:
        value.name = f"{value.name}{_MARK}"
        goal.register_initializer(value)
    nodes = list(source)
    source.remove(nodes)
    for node in nodes:
        node.name = f"{node.name}{_MARK}"
        for value in node.outputs:
            value.name = f"{value.name}{_MARK}" if value.name else None
    goal.extend(nodes)


def _channels(node: ir.Node) -> tuple[int, int] | None:
    """The axis of the channels of a node's result and its rank, None where that is not known."""
    weight = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type in ("Conv", "ConvTranspose") and weight is not None:
        return 1, weight.ndim
    shape = node.outputs[0].shape
    if shape is None or len(shape) < 2:
        return None
    return len(shape) - 1 if node.op_type in ("MatMul", "Gemm") else 1, len(shape)

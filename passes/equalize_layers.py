"""Give the channels between two layers like ranges, where one scale serves them all.

    y = f(Conv(x, W, b));  z = Conv(y, V)   =>   y = f(Conv(x, W / t, b / t));  z = Conv(y, t V)

with t per channel of y, and f nothing, Relu, LeakyRelu, PRelu or pooling, which all let a positive
factor through.  With m the largest magnitude of each channel of y on some samples, and r that of
the weights that read it,

    t = 2 ^ round(log2(sqrt(m r) / r))      times a number for all, so that max t = max m

which leaves m / t and t r equal (Nagel et al., Data-free quantization through weight equalization
and bias correction, 2019).  There the first range is that of W; here a row of W has a scale of its
own and loses nothing, and y is what is rounded with one.  For the same reason a depthwise V takes
all of it, t = m.  Powers of two keep the float model's results to the bit.

A pair is changed where the rounded second layer then has less error on those samples.  A Clip at a
bound above 0 (Relu6) does not let factors through: such a pair stays as it is, with a note.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import add_note, bias_shift, note_of, plan_of
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import (
    constant,
    drop_if_unread,
    new_initializer,
    only_consumer,
    unique_name,
)
from qcompiler.passes.measuring_pass import MeasuringPass
from qcompiler.passes.side_by_side import channel_maxima, own_errors, quantized_copy

__all__ = ["EqualizeLayers"]

_HOMOGENEOUS = frozenset({
    "Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool",
})  # fmt: skip
"""f(y / t) = f(y) / t for t > 0, channel by channel."""

_BOUNDED = frozenset({"Clip", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh"})

_MOST = 30
"""The largest power of two, so that no weight overflows or becomes denormal."""

Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two layers and the tensor that the second one reads."""

    first: ir.Node
    second: ir.Node

    @property
    def value(self) -> ir.Value:
        value = self.second.inputs[0]
        assert value is not None
        return value

    @property
    def name(self) -> str:
        return self.second.name or ""


class EqualizeLayers(MeasuringPass):
    """Move ranges of channels from a layer's result into the weights of the next.

    Attributes:
        run: Runs the model on samples; without it nothing changes.
        observe: Where static ranges come from.
        options: Where it pays.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Where it pays.

        Attributes:
            gain: By how many dB the error of the second layer must fall, the average of its
                channels.
        """

        gain: float = 1.0

        def __post_init__(self) -> None:
            """Check the value.

            Raises:
                OptionError: It is below 0.
            """
            if not self.gain >= 0:
                raise OptionError(f"gain must be 0 dB or more, not {self.gain:g}")

    options: Options

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Equalize every pair of layers of the main graph where that pays.

        Raises:
            CalibrationError: A static plan, and nothing to calibrate it with.
            OptionError: The pass runs after bias-correction.
        """
        pairs = [pair for node in model.graph if (pair := _pair(node)) is not None]
        if not pairs or self.run is None:
            return ir.passes.PassResult(model, False)
        for pair in pairs:
            for node in (pair.first, pair.second):
                if bias_shift(node) is not None:
                    raise OptionError(
                        "equalize-layers must run before bias-correction, whose shift of "
                        f"{node.name!r} is that of the weights as they were"
                    )
        measured, names = channel_maxima(model, [pair.value for pair in pairs])
        rows = self.run(measured, names)
        factors = {
            pair.name: _factors(np.max(rows[name], axis=0, initial=0), pair)
            for pair, name in zip(pairs, names, strict=True)
        }
        changed = model.clone()
        for pair in filter(None, map(_pair, list(changed.graph))):
            _equalize(changed.graph, pair, factors[pair.name])
        before = self._errors(model, list(factors))
        self.carry(model, changed)
        after = self._errors(changed, list(factors))
        count = 0
        for pair in pairs:
            gain = after[pair.name] - before[pair.name]
            if gain >= self.options.gain and gain > 0:
                _equalize(model.graph, pair, factors[pair.name])
                add_note(
                    pair.second, f"input equalized with {pair.first.name}: {gain:.1f} dB better"
                )
                count += 1
        self.carry(changed, model)
        return ir.passes.PassResult(model, count > 0)

    def _errors(self, model: ir.Model, names: Sequence[str]) -> dict[str, float]:
        """SQNR in dB of nodes on exact inputs, before what they store is rounded."""
        assert self.run is not None
        copy = quantized_copy(model, self.observe)
        joined, found = own_errors(model, copy, names, stored=False)
        rows = self.run(joined, [name for means in found.values() for name in means.names])
        return {name: means.by_channel(rows) for name, means in found.items()}


def _pair(node: ir.Node) -> _Pair | None:
    """The pair whose second layer `node` is, if it was not looked at before."""
    if node.op_type != "Conv" or plan_of(node) is None or constant(node.inputs[1]) is None:
        return None
    value = node.inputs[0]
    while value is not None and (maker := value.producer()) is not None:
        if only_consumer(value) is None or maker.domain:
            return None
        if maker.op_type == "Conv":
            return _Pair(maker, node) if _takes_factors(maker, node) else None
        if maker.op_type in _BOUNDED:
            behind = maker.inputs[0].producer() if maker.inputs[0] is not None else None
            if behind is not None and behind.op_type == "Conv":
                add_note(node, f"not equalized: {maker.op_type} bounds all channels alike")
            return None
        if maker.op_type not in _HOMOGENEOUS:
            return None
        value = maker.inputs[0]
    return None


def _takes_factors(first: ir.Node, second: ir.Node) -> bool:
    given = [value for value in first.inputs[1:] if value is not None]
    done = (note_of(second) or "").count("equalized")
    return not done and all(constant(value) is not None for value in given)


def _factors(largest: Floats, pair: _Pair) -> Floats:
    """T: how much smaller each channel becomes, [C]."""
    groups = np.abs(_by_input(_weight(pair.second), pair.second))
    reading = groups.max(axis=(1, *range(3, groups.ndim))).reshape(-1)
    live = (largest > 0) & (reading > 0)
    if not live.any() or not np.isfinite(largest).all():  # calibration will name the sample
        return np.ones_like(largest)
    smallest = np.finfo(np.float32).tiny
    results, weights = (np.log2(np.maximum(array, smallest)) for array in (largest, reading))
    depthwise = groups.shape[2] == 1
    steps = results.copy() if depthwise else (results - weights) / 2
    # What is 0 on one side becomes an average channel on the other.
    still, unread = largest == 0, reading == 0
    middle = np.median(steps[live])
    steps[still] = middle if depthwise else np.median((steps + weights)[live]) - weights[still]
    steps[unread] = results[unread] - np.median((results - steps)[live])
    steps[still & unread] = middle
    steps = np.rint(steps - steps[live].max())
    return np.asarray(np.exp2(np.clip(steps, -_MOST, _MOST)), np.float32)


def _by_input(weight: Floats, conv: ir.Node) -> Floats:
    """[groups, outputs, inputs, ...] of a group each."""
    groups = conv.attributes.get_int("group", 1) or 1
    return weight.reshape(groups, -1, *weight.shape[1:])


def _equalize(graph: ir.Graph, pair: _Pair, factors: Floats) -> None:
    weight = _weight(pair.second)
    groups = _by_input(weight, pair.second)
    ones = [1] * (weight.ndim - 2)
    widened = groups * factors.reshape(groups.shape[0], 1, -1, *ones)
    _replace(graph, pair.second, 1, widened.reshape(weight.shape))
    _replace(graph, pair.first, 1, _weight(pair.first) / factors.reshape(-1, 1, *ones))
    if len(pair.first.inputs) > 2 and (bias := constant(pair.first.inputs[2])) is not None:
        _replace(graph, pair.first, 2, np.asarray(bias, np.float32) / factors)
    value: ir.Value | None = pair.value
    while value is not None:
        # It holds other numbers than before, and so may not keep its name.
        value.name = unique_name(graph, f"{value.name}_equalized")
        maker = value.producer()
        value = None if maker is None or maker is pair.first else maker.inputs[0]


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: Floats) -> None:
    old = node.inputs[index]
    assert old is not None
    new = new_initializer(graph, f"{old.name}_equalized", np.asarray(array, np.float32))
    node.replace_input_with(index, new)
    drop_if_unread(old)


def _weight(node: ir.Node) -> Floats:
    return np.asarray(constant(node.inputs[1]), np.float32)

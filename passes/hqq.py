"""Round weights by half-quadratic splitting, without data.

    y = MatMul(x, W)   =>   y = MatMul(x, DQ(W_q, s) + o)

Badri and Shaji, Half-Quadratic Quantization (2023): the few elements whose error is large should
not decide on the steps of all others.  So errors are split into outliers E, which are taken out,
and the rest, which is fitted by least squares, in turn:

    E = shrink(W - W')      W_q = round(W / s + z)      z = argmin |W - E - s (W_q - z)|^2

As in the paper the scale is that of the whole range and stays, and the zero point starts at a whole
number and becomes a float: the offset o = -s z.  What is an outlier is a matter of the size of an
error as a weight, from 0.17 on, as in the paper's code, so that most weights have none.  In steps,
ordinary errors or those of the ends of a range would be some, and zero points move until 0, to
which most weights are close, lies between two steps, or the largest weights are cut off: SmolLM2 in
groups of 64 has a perplexity of 26.1 with those from 0.17 of a step on, 24.6 from half a step, and
24.45 so.

Types without offsets leave nothing to fit, as an integer zero point does not move by half a step,
and are rounded to nearest: to fit their scales instead clips what is large, and took 5 dB from
Whisper's decoder.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import broadcast_scale, reduce_slices
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import every_node
from qcompiler.ir.two_level import on_two_levels
from qcompiler.ir.types import PerGroup, QuantType
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.rounded_layer import decibels, rounded_or_kept
from qcompiler.passes.rounded_weight import RoundedWeight, by_data, layers_of
from qcompiler.passes.second_moments import LayerRuns
from qcompiler.passes.weight_grid import Grid, rounded_on, weight_grid

__all__ = ["HQQ", "hqq"]

Floats = NDArray[np.float32]

_STRENGTH = 10.0
"""Of the shrinking, the paper's beta."""

_PIECE = 1 << 18
"""Elements looked at together: they stay in the cache, and need no memory for copies of all."""

_NOTHING_TO_FIT = 'rounded to nearest: hqq fits zero points that are floats (zero_points = "float")'


class HQQ(ir.passes.InPlacePass):
    """Round the matrices of planned MatMuls; what is not one is left to round-to-nearest.

    Attributes:
        runs: Where layers are rounded side by side, and who hears of each.
        options: How to round.
    """

    rounds = True

    @dataclasses.dataclass(frozen=True)
    class Options:
        """How to round.

        Attributes:
            norm: The exponent p of an outlier's error; 2 would be least squares.
            steps: The most steps to take.
            range: Where to start: "max" from the whole range of each slice, as in the paper, "mse"
                from the part of it with the least squared error.
        """

        norm: float = 0.7
        steps: int = 20
        range: str = "max"

        def __post_init__(self) -> None:
            """Check the values.

            Raises:
                OptionError: An exponent outside 0 to 2, fewer than one step, or another range.
            """
            if not 0 < self.norm <= 2:
                raise OptionError(f"norm must be above 0 and at most 2, not {self.norm:g}")
            if self.steps < 1:
                raise OptionError(f"steps must be 1 or more, not {self.steps}")
            if self.range not in ("max", "mse"):
                raise OptionError(f"range must be max or mse, not {self.range!r}")

    def __init__(self, runs: LayerRuns | None = None, options: Options | None = None) -> None:
        super().__init__()
        self.runs, self.options = runs or LayerRuns(), options or self.Options()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Round every planned matrix.

        Raises:
            ModelError: A weight holds NaN or Inf.
        """
        layers = layers_of(every_node(model.graph), "hqq")
        tell = self.runs.progress(len(layers))
        work, done = partial(_round_one, options=self.options), itertools.count(1)
        for group in by_data(layers).values():
            for layer in rounded_or_kept(group, self.runs, ("hqq", repr(self.options)), work):
                layer.place(model.graph, tell, next(done))
        FixNames()(model)
        return ir.passes.PassResult(model, bool(layers))


def _round_one(weight: Floats, type: QuantType, options: HQQ.Options) -> tuple[RoundedWeight, str]:
    """The rounded weight, and the error of its elements."""
    rounded = hqq(weight, type, options)
    if not type.offset:
        return rounded, _NOTHING_TO_FIT
    nearest = rounded_on(weight, type, weight_grid(weight, type, "max"))
    signal, error, before = (
        float(np.square(array).sum())
        for array in (weight, weight - rounded.floats(type), weight - nearest.floats(type))
    )
    said = f"{decibels(signal, error)} (to nearest {decibels(signal, before)})"
    return rounded, f"rounded by hqq, its weights to {said}"


def hqq(weight: Floats, type: QuantType, options: HQQ.Options) -> RoundedWeight:
    """Round one matrix, [K, N].

    A group that is shorter is fitted as if zeros filled it up, as ONNX Runtime does: they hold its
    zero point near a whole number.  It has more error then, and a model less perplexity.
    """
    if not type.offset:
        return rounded_on(weight, type, weight_grid(weight, type, "max"))
    filled = _filled(weight, type)
    grid = weight_grid(filled, type, options.range)
    assert grid.offset is not None
    zeros = np.asarray(-grid.offset / grid.scale, np.float32)
    best, least = zeros, np.full(zeros.shape, np.inf, np.float32)
    if options.range == "max":
        zeros = np.rint(zeros)
    for _ in range(options.steps + 1):
        loss, moves = _looked_at(filled, grid.scale, zeros, type, options.norm)
        better = loss < least
        if not better.any():
            break
        least, best = np.where(better, loss, least), np.where(better, zeros, best)
        zeros = zeros - moves
    return rounded_on(weight, type, _grid(grid.scale, best, type))


def _filled(weight: Floats, type: QuantType) -> Floats:
    """A matrix with zeros at the end of its last group."""
    groups = type.granularity
    if not isinstance(groups, PerGroup) or groups.axis != 0 or groups.group_size >= len(weight):
        return weight
    missing = -len(weight) % groups.group_size
    return np.pad(weight, ((0, missing), (0, 0))) if missing else weight


def _looked_at(
    weight: Floats, scale: Floats, zeros: Floats, type: QuantType, norm: float
) -> tuple[Floats, Floats]:
    """The error of each slice in steps, outliers apart, and by how much its zero point is off."""
    count = min(-(-weight.size // _PIECE), weight.shape[1])
    parts = (np.array_split(array, count, axis=1) for array in (weight, scale, zeros))
    found = [_look(w, s, z, type, norm) for w, s, z in zip(*parts, strict=True)]
    loss, moves = (np.hstack(each) for each in zip(*found, strict=True))
    return loss, moves


def _look(
    weight: Floats, scale: Floats, zeros: Floats, type: QuantType, norm: float
) -> tuple[Floats, Floats]:
    """What `_looked_at` returns, of some columns."""
    total = partial(reduce_slices, np.add, granularity=type.granularity)
    spread = partial(broadcast_scale, shape=weight.shape, granularity=type.granularity)
    steps = spread(scale)
    inside = weight / steps + spread(zeros)
    inside -= np.clip(np.rint(inside), *type.range)
    inside -= _outliers(inside * steps, norm) / steps
    return total(np.square(inside)), np.asarray(total(inside) / total(np.ones_like(inside)))


def _grid(scale: Floats, zeros: Floats, type: QuantType) -> Grid:
    offset = -scale * zeros
    if type.two_level:
        scale, offset = on_two_levels(scale), on_two_levels(offset, zero=True)
    return Grid(scale, None, offset)


def _outliers(error: Floats, norm: float) -> Floats:
    """What of each error is an outlier: the generalised soft threshold of |e|^p."""
    size = np.abs(error)
    with np.errstate(divide="ignore"):
        excess = size - size ** (norm - 1) / _STRENGTH
    return np.asarray(np.sign(error) * np.maximum(excess, 0), np.float32)

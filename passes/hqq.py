"""Round weights by half-quadratic splitting, without data.

    y = MatMul(x, W)   =>   y = MatMul(x, DQ(W_q, s))       or DQ(W_q, s, z), DQ(W_q, s) + o

Badri and Shaji, Half-Quadratic Quantization (2023): of a heavy-tailed weight the few large elements
should not decide on the steps of all others.  So the error that is made small is the sum of
|e|^p with p below 1, split into outliers E, which are taken out, and the rest, which is fitted by
least squares, in turn:

    E = shrink(W - W')      W_q = round(W / s + z)      s, z = argmin |W - E - s (W_q - z)|^2

The paper fits a zero point that is a float, by types with offsets o = -s z; ONNX has integer ones.
So the scale is fitted too, and a slice keeps the best it was at.  What is compared is again the sum
of |e|^p.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import as_scale, broadcast_scale, reduce_slices
from qcompiler.ir.decisions import add_note
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import every_node
from qcompiler.ir.two_level import on_two_levels
from qcompiler.ir.types import QuantType
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.rounded_weight import RoundedWeight, finite_weight, layers_of
from qcompiler.passes.second_moments import LayerRuns
from qcompiler.passes.weight_grid import Grid, rounded_on, weight_grid

__all__ = ["HQQ", "hqq"]

Floats = NDArray[np.float32]


class HQQ(ir.passes.InPlacePass):
    """Round the matrices of planned MatMuls; what is not one is left to round-to-nearest.

    Attributes:
        runs: Who hears of each layer.
        options: How to round.
    """

    rounds = True

    @dataclasses.dataclass(frozen=True)
    class Options:
        """How to round.

        Attributes:
            norm: The exponent p of the error; 2 would be least squares.
            steps: The most steps to take.
            range: Where to start: "max" from the whole range of each slice, "mse" from the part of
                it with the least squared error.
        """

        norm: float = 0.7
        steps: int = 20
        range: str = "mse"

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
        layers, tell = layers_of(every_node(model.graph), "hqq"), self.runs.progress()
        for done, layer in enumerate(layers, 1):
            weight = finite_weight(layer.nodes[0], layer.weight)
            layer.replace(model.graph, hqq(weight, layer.type, self.options))
            for node in layer.nodes:
                add_note(node, "rounded by hqq")
            tell(layer.name, done / len(layers))
        FixNames()(model)
        return ir.passes.PassResult(model, bool(layers))


def hqq(weight: Floats, type: QuantType, options: HQQ.Options) -> RoundedWeight:
    """Round one matrix, [K, N]."""
    grid = weight_grid(weight, type, options.range)
    spread = partial(broadcast_scale, shape=weight.shape, granularity=type.granularity)
    # A negative scale is the scale of what the slice would be with its signs turned round.
    signs, scale = np.sign(grid.scale), np.abs(grid.scale)
    original, weight = weight, weight * spread(signs)
    total = partial(reduce_slices, np.add, granularity=type.granularity)
    count = total(np.ones_like(weight))
    zeros = _zeros(grid, type)
    best, least, stiffness = (scale, zeros), np.full(scale.shape, np.inf, np.float32), 10.0
    for _ in range(options.steps + 1):
        step = spread(scale)
        stored = _stored(weight / step, spread(zeros), type)
        # In steps: then the strength of the shrinking means the same for all slices.
        error = weight / step - (stored - spread(zeros))
        loss = total(np.abs(error) ** options.norm) * scale**options.norm
        better = loss < least
        if not better.any():
            break
        least = np.where(better, loss, least)
        best = np.where(better, scale, best[0]), np.where(better, zeros, best[1])
        target = np.asarray(weight - step * _shrink(error, stiffness, options.norm), np.float32)
        scale, zeros = _fit(target, stored, scale, zeros, type, total, count)
        stiffness *= 1.01
    return rounded_on(original, type, _grid(best[0], best[1], signs, type))


def _zeros(grid: Grid, type: QuantType) -> Floats:
    """The zero points to start from, which of types with offsets are no integers."""
    if grid.offset is not None:
        return np.asarray(-grid.offset / grid.scale, np.float32)
    if grid.zero_point is None:
        return np.full(grid.scale.shape, type.middle, np.float32)
    return np.asarray(grid.zero_point.astype(np.float32))


def _stored(steps: Floats, zeros: Floats, type: QuantType) -> Floats:
    rounded = np.rint(steps + zeros) if type.offset else np.rint(steps) + zeros
    return np.asarray(np.clip(rounded, *type.range))


def _grid(scale: Floats, zeros: Floats, signs: Floats, type: QuantType) -> Grid:
    offset = -scale * zeros
    if type.two_level:
        scale, offset = on_two_levels(scale), on_two_levels(offset, zero=True)
    if type.offset:
        return Grid(scale, None, offset)
    return Grid(scale * signs, None if type.symmetric else zeros.astype(type.storage.numpy()))


def _shrink(error: Floats, stiffness: float, norm: float) -> Floats:
    """What of each error is an outlier: the generalised soft threshold of |e|^p."""
    size = np.abs(error)
    with np.errstate(divide="ignore"):
        excess = size - size ** (norm - 1) / stiffness
    return np.asarray(np.sign(error) * np.maximum(excess, 0), np.float32)


def _fit(target: Floats, stored: Floats, scale: Floats, zeros: Floats, type: QuantType,
         total: Callable[[Floats], Floats], count: Floats) -> tuple[Floats, Floats]:  # fmt: skip
    """Scale and zero point of each slice by least squares, the zero point then an integer."""
    if type.offset or not type.symmetric:
        mean_stored, mean = total(stored) / count, total(target) / count
        slope = total(target * stored) / count - mean * mean_stored
        spread = np.maximum(total(np.square(stored)) / count - np.square(mean_stored), 1e-12)
        slope = np.where(slope > 0, slope / spread, scale)
        zeros = np.asarray(mean_stored - mean / slope, np.float32)
        if type.offset:
            return as_scale(np.asarray(slope, np.float32), type), zeros
        zeros = np.clip(np.rint(zeros), *type.range)
    levels = stored - broadcast_scale(zeros, stored.shape, type.granularity)
    square = total(np.square(levels))
    fitted = total(levels * target) / np.maximum(square, 1e-12)
    steps = np.where((square > 0) & (fitted > 0), fitted, scale)
    return as_scale(np.asarray(steps, np.float32), type), np.asarray(zeros, np.float32)

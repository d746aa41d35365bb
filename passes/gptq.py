"""Round weights one input at a time, each error made up for by the inputs still to come.

    y = MatMul(x, W)   =>   y = MatMul(x, DQ(W_q, s))

Frantar et al., GPTQ (2022).  With H the second moments of x (`second_moments`), damped, and R the
upper Cholesky factor of its inverse, row k of W [K, N] is rounded and the rows below it become

    W[j] -= R[k, j] / R[k, k] (W[k] - W'[k])        for j > k

in blocks, so that most of that is one matrix product.  Inputs go in order of falling H[k, k]: the
largest errors are then made up for by the most.  Weights keep their order in the graph, so the
scales of groups are found first, from the weights as they came.

What inputs have in common on some samples they need not have elsewhere: first, numbers of H off its
diagonal are shrunk by the share of them that is chance, as the samples differ (`Moments.chance`).

H is of the model with all layers before this one rounded already, as in the paper, so that later
layers make up for earlier ones too.  An input that is always 0 is rounded to nearest, and so is a
layer that no sample reaches (an expert to which no token is sent).  Rounded layers are kept in the
cache by the hash of model, samples and options: a compilation that was killed goes on after the
last one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.ir.types import PerGroup, QuantType
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.layer_cache import LayerCache
from qcompiler.passes.rounded_layer import RoundedLayer, decibels
from qcompiler.passes.rounded_weight import (
    Layer,
    RoundedWeight,
    by_data,
    finite_weight,
    layers_of,
)
from qcompiler.passes.second_moments import LayerRuns, Moments, Rows, Walk
from qcompiler.passes.weight_grid import RANGES, Grid, rounded_on, weight_grid

__all__ = ["GPTQ", "gptq", "round_one"]

_MOST_DAMPING = 1.0
"""Of the mean of H's diagonal: a matrix that is singular with so much on its diagonal holds
nonsense."""

_BLOCK = 256
"""Rows of a matrix that are taken apart at once, as large as makes the rest fast."""


class GPTQ(ir.passes.InPlacePass):
    """Round the matrices of planned MatMuls; what is not one is left to round-to-nearest.

    Attributes:
        runs: How the model is run, and where layers are rounded side by side.
        options: How to round.
    """

    rounds = True

    @dataclasses.dataclass(frozen=True)
    class Options:
        """How to round.

        Attributes:
            damping: Added to the diagonal of the Hessian, as a part of its mean; ten times as much
                is tried where it is singular all the same.
            shrinkage: How much less is believed of what inputs have in common: times the share of
                it that is chance, as the samples differ from each other; 0 believes them.
            act_order: Round the inputs of the largest activations first.
            block: Inputs between two updates of all the rest.
            range: "max" lets the scales cover all of each slice, "mse" the part of it with the
                least squared error of the product, each input by itself.
        """

        damping: float = 0.01
        shrinkage: float = 1.0
        act_order: bool = True
        block: int = 128
        range: str = "mse"

        def __post_init__(self) -> None:
            """Check the values.

            Raises:
                OptionError: Damping outside 0 to 1, shrinkage below 0, or a block below 1.
            """
            if not 0 < self.damping <= _MOST_DAMPING:
                raise OptionError(f"damping must be above 0 and at most 1, not {self.damping:g}")
            if not 0 <= self.shrinkage < math.inf:
                raise OptionError(f"shrinkage must be 0 or more, not {self.shrinkage:g}")
            if self.block < 1:
                raise OptionError(f"block must be 1 or more, not {self.block}")
            if self.range not in RANGES:
                raise OptionError(f"range must be one of {', '.join(RANGES)}, not {self.range!r}")

    def __init__(self, runs: LayerRuns | None = None, options: Options | None = None) -> None:
        super().__init__()
        self.runs, self.options = runs or LayerRuns(), options or self.Options()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Round every planned matrix.

        Raises:
            CalibrationError: There are no samples, or one is not finite somewhere inside.
            ModelError: A weight holds NaN or Inf.
        """
        layers = layers_of(model.graph, "gptq", "awq_gptq")
        if not layers:
            return ir.passes.PassResult(model, False)
        groups, tell = by_data(layers), self.runs.progress(len(layers))
        with self.runs.walker_for(layers, "gptq rounds")(model, list(groups)) as walk:
            cache = LayerCache("gptq", walk.digest, repr(self.options), layers)
            tell(f"layers: {cache.found([layer.name for layer in layers])}", 0)
            for done, layer in enumerate(self._rounded(groups, walk, cache), 1):
                layer.place(model.graph, tell, done)
        FixNames()(model)
        return ir.passes.PassResult(model, True)

    def _rounded(
        self, groups: Mapping[ir.Value, Sequence[Layer]], walk: Walk, cache: LayerCache
    ) -> Iterator[RoundedLayer]:
        """Each layer; the model must be changed between them."""
        for data, layers in groups.items():
            kept = [cache.get(layer.name) for layer in layers]
            if all(arrays is not None for arrays in kept):
                for layer, arrays in zip(layers, kept, strict=True):
                    assert arrays is not None
                    yield RoundedLayer.kept_as(layer, arrays)
                continue
            depth = finite_weight(layers[0].nodes[0], layers[0].weight).shape[0]
            moments = Moments.of(walk.rows(data), depth, data.name or "")
            for layer, found in zip(layers, self._round(layers, moments), strict=True):
                yield RoundedLayer.kept_in(cache, layer, *found)

    def _round(self, layers: Sequence[Layer], moments: Moments) -> list[tuple[RoundedWeight, str]]:
        """Round the layers that read the same activations."""
        weights = [finite_weight(layer.nodes[0], layer.weight) for layer in layers]
        work = partial(round_one, moments=moments, options=self.options)
        return self.runs.map(work, weights, [layer.type for layer in layers])


def round_one(
    weight: Rows, type: QuantType, moments: Moments, options: GPTQ.Options
) -> tuple[RoundedWeight, str]:
    """The better of both roundings, and how good they are."""
    if not moments.count:
        nearest = rounded_on(weight, type, weight_grid(weight, type, "max"))
        return nearest, "rounded to nearest: no sample reaches it"
    chance = min(options.shrinkage * moments.chance(), 1.0) if options.shrinkage else 0.0
    rounded, damping = gptq(weight, moments.second, type, options, chance)
    nearest = rounded_on(weight, type, weight_grid(weight, type, "max"))
    signal = moments.error(weight)
    error, before = (moments.error(weight - r.floats(type)) for r in (rounded, nearest))
    note = f"rounded by gptq to {decibels(signal, error)} (to nearest {decibels(signal, before)})"
    if before <= error:
        return nearest, f"rounded to nearest, which is no worse than gptq here: {note}"
    return rounded, note if damping == options.damping else f"{note} with damping {damping:g}"


def gptq(
    weight: Rows, hessian: Rows, type: QuantType, options: GPTQ.Options, chance: float = 0.0
) -> tuple[RoundedWeight, float]:
    """Round one matrix.

    Args:
        weight: [K, N].
        hessian: E[x xT], [K, K].
        type: Of integers.
        options: How.
        chance: The share of the Hessian off its diagonal that is not believed, from 0 to 1.

    Returns:
        The rounded weight, and the damping that it took.

    Raises:
        CalibrationError: The Hessian is singular with any damping.
    """
    order = np.arange(len(weight))
    if options.act_order:
        order = np.argsort(-np.diag(hessian), kind="stable")
    factor, damping = _inverse_factor(hessian, order, options.damping, chance)
    # Errors count for the mean square of their input.  To count less what inputs to come make up
    # for, 1 / R[k, k]^2, gains 0.3 dB in a layer and loses in the model: SmolLM2 has a perplexity
    # of 22.4 in place of 22.1 in groups of 64, 22.9 in place of 22.4 in groups of 128.
    grid = weight_grid(weight, type, options.range, np.diag(hessian))
    storage = _integers(weight, order, factor, grid, type, options.block)
    return RoundedWeight(storage, grid.scale, grid.zero_point, grid.offset), damping


def _integers(
    weight: Rows, order: NDArray[np.intp], factor: Rows, grid: Grid, type: QuantType, block: int
) -> NDArray[Any]:
    """What is stored, [K, N]: inputs in order, errors passed on by `block` of them at a time."""
    size = type.granularity.group_size if isinstance(type.granularity, PerGroup) else len(weight)
    scales, zeros, offsets = _by_group(grid, type)
    stored = np.empty(weight.shape, np.float32)
    rest, (lowest, highest) = weight[order], type.range
    for start in range(0, len(order), block):
        end = min(start + block, len(order))
        errors = np.empty((end - start, weight.shape[1]), np.float32)
        for row in range(start, end):
            at = order[row] // size
            integers = np.rint((rest[row] - offsets[at]) / scales[at]) + zeros[at]
            np.clip(integers, lowest, highest, out=integers)
            stored[order[row]] = integers
            error = rest[row] - ((integers - zeros[at]) * scales[at] + offsets[at])
            error /= factor[row, row]
            errors[row - start] = error
            rest[row + 1 : end] -= factor[row, row + 1 : end, None] * error
        rest[end:] -= factor[start:end, end:].T @ errors
    return stored.astype(type.storage.numpy())


def _by_group(grid: Grid, type: QuantType) -> list[Rows]:
    """Scales, zero points and offsets, [G, N], where there is one of a column [1, N]."""
    zeros = np.full(grid.scale.shape, type.middle) if grid.zero_point is None else grid.zero_point
    offsets = np.zeros(grid.scale.shape) if grid.offset is None else grid.offset
    return [np.atleast_2d(part.astype(np.float32)) for part in (grid.scale, zeros, offsets)]


def _inverse_factor(
    hessian: Rows, order: NDArray[np.intp], damping: float, chance: float
) -> tuple[Rows, float]:
    """R, upper triangular, with RT R the inverse of the Hessian in order, shrunk and damped.

    And the damping that it took.
    """
    diagonal = np.diag(hessian)[order]
    mean = float(diagonal.mean()) or 1.0
    # Backwards, because H = U UT has the inverse (U^-1)T U^-1, and U^-1 is upper as well.
    backwards = order[::-1]
    while damping <= _MOST_DAMPING:
        damped = hessian[np.ix_(backwards, backwards)]
        damped *= np.float32(1 - chance)
        added = np.where(diagonal <= 0, mean, damping * mean)
        damped[np.diag_indices_from(damped)] = (diagonal + added)[::-1]
        # Twice as large as H: with H, and what follows, four of those are in memory at most.
        lower = damped.astype(np.float64)
        del damped
        try:
            _to_lower_factor(lower)
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        upper = np.ascontiguousarray(lower[::-1, ::-1], np.float32)
        del lower
        return _inverse_of_upper(upper), damping
    raise CalibrationError(
        "the second moments of what goes into a product are no positive matrix: the samples hold "
        "numbers too large to square"
    )


def _to_lower_factor(matrix: NDArray[np.float64]) -> None:
    """Make L of a matrix L LT in its place, of which only the lower half is read.

    numpy's own takes three times the room of the matrix beside it.

    Raises:
        LinAlgError: The matrix is not positive.
    """
    for start in range(0, len(matrix), _BLOCK):
        end = start + _BLOCK
        corner = matrix[start:end, start:end] = np.linalg.cholesky(matrix[start:end, start:end])
        matrix[start:end, end:] = 0
        matrix[end:, start:end] = matrix[end:, start:end] @ np.linalg.inv(corner).T
        for left in range(end, len(matrix), _BLOCK):
            columns = matrix[left : left + _BLOCK, start:end]
            matrix[left:, left : left + _BLOCK] -= matrix[left:, start:end] @ columns.T


def _inverse_of_upper(upper: Rows) -> Rows:
    """Halves at a time, so that nearly all of it is matrix products."""
    size = len(upper)
    if size <= 64:
        return np.triu(np.linalg.inv(upper))
    half, inverse = size // 2, np.zeros_like(upper)
    inverse[:half, :half] = _inverse_of_upper(upper[:half, :half])
    inverse[half:, half:] = _inverse_of_upper(upper[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ upper[:half, half:] @ inverse[half:, half:]
    return inverse

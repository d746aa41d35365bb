"""The grid of the least error of a product, among those that cut the range of each slice off.

    argmin  e_gT H_gg e_g  for each slice g        e = W - W',  H_gg = E[x_g x_gT]

The largest weights of a slice decide how wide its steps are; cut off a little, they make an error
of one sign, which adds up over inputs that go together.  So each part of the range is judged by the
second moments of the inputs of a slice, and not of each input alone (the clip search of Lin et al.,
AWQ, 2023, which runs the product on samples).  Of slices longer than a block H is its diagonal
blocks.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import reduce_slices
from qcompiler.ir.two_level import on_two_levels
from qcompiler.ir.types import PerGroup, QuantType
from qcompiler.passes.weight_grid import Grid, rounded_on, weight_grid

__all__ = ["BLOCK", "diagonal_blocks", "error_in_blocks", "searched_grid"]

BLOCK = 128
"""Inputs whose moments are kept against each other: K x 128 numbers instead of K x K."""

_PARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)

Floats = NDArray[np.float32]


def diagonal_blocks(second: Floats) -> Floats:
    """The blocks along the diagonal of second moments [K, K]: [K / 128, 128, 128], 0 behind K."""
    blocks = np.zeros((-(-len(second) // BLOCK), BLOCK, BLOCK), np.float32)
    for number, block in enumerate(blocks):
        part = second[number * BLOCK :, number * BLOCK :][:BLOCK, :BLOCK]
        block[: len(part), : len(part)] = part
    return blocks


def searched_grid(weight: Floats, type: QuantType, blocks: Floats) -> Grid:
    """The best grid of each slice.

    Args:
        weight: [K, N], finite.
        type: Of integers.
        blocks: Of E[x xT], see `diagonal_blocks`.
    """
    power = np.diagonal(blocks, axis1=1, axis2=2).reshape(-1)[: len(weight)]
    best = first = weight_grid(weight, type, "mse", power)
    least = start = _errors(weight, type, first, blocks)
    whole = weight_grid(weight, type, "max")
    for part in _PARTS:
        grid = _part_of(whole, type, part)
        error = _errors(weight, type, grid, blocks)
        better = error < least
        least, best = np.where(better, error, least), _chosen(better, grid, best)
    if not type.two_level:
        return best
    # The largest scale of a column decides on the steps of all others.
    offset = None if best.offset is None else on_two_levels(best.offset, zero=True)
    best = dataclasses.replace(best, scale=on_two_levels(best.scale), offset=offset)
    return _chosen(start.sum(0) < _errors(weight, type, best, blocks).sum(0), first, best)


def error_in_blocks(difference: Floats, blocks: Floats) -> float:
    """The mean square error of a product for W - W', [K, N], as far as the blocks tell."""
    parts = [difference[start : start + BLOCK] for start in range(0, len(difference), BLOCK)]
    return sum(
        float(np.vdot(part, block[: len(part), : len(part)] @ part))
        for part, block in zip(parts, blocks, strict=True)
    )


def _part_of(grid: Grid, type: QuantType, part: float) -> Grid:
    """The grid of a part of each range, about the same middle."""
    scale = np.asarray(grid.scale * np.float32(part))
    if grid.offset is None:
        return dataclasses.replace(grid, scale=scale)
    middle = np.float32(sum(type.range) / 2)
    return Grid(scale, None, grid.offset + (grid.scale - scale) * middle)


def _chosen(better: NDArray[np.bool_], grid: Grid, best: Grid) -> Grid:
    """One of two grids of the same kind for each slice."""
    scale = np.where(better, grid.scale, best.scale)
    if grid.offset is not None and best.offset is not None:
        return Grid(scale, None, np.where(better, grid.offset, best.offset))
    if grid.zero_point is not None and best.zero_point is not None:
        return Grid(scale, np.where(better, grid.zero_point, best.zero_point))
    return Grid(scale)


def _errors(weight: Floats, type: QuantType, grid: Grid, blocks: Floats) -> Floats:
    """The error of each slice, in the shape of a scale."""
    difference = rounded_on(weight, type, grid).floats(type) - weight
    product = np.empty_like(difference)
    size = type.granularity.group_size if isinstance(type.granularity, PerGroup) else BLOCK
    for number, block in enumerate(blocks):
        rows = slice(number * BLOCK, min((number + 1) * BLOCK, len(difference)))
        groups = np.arange(rows.start, rows.stop) // size
        together = block[: len(groups), : len(groups)] * (groups[:, None] == groups)
        product[rows] = together @ difference[rows]
    return reduce_slices(np.add, difference * product, type.granularity)

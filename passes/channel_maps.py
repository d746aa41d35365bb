"""Which channel each element of a tensor belongs to, as ops move and broadcast them.

    [1, 1, 96]   before a Reshape of [b, s, 6, 16] to [b, s, 96]   =>   [1, 1, 6, 16]

Part of `absorb_factors`.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.graph import same_dimension

__all__ = ["Channels", "regrouped", "trimmed"]

Channels: TypeAlias = NDArray[np.intp]
"""Which factor each element of a value is divided by: broadcasts against it; -1 stands for 1."""

_Size: TypeAlias = "int | ir.SymbolicDim"


def trimmed(channels: Channels) -> Channels:
    """Without leading axes of size 1, so that a constant keeps its rank."""
    while channels.ndim > 1 and channels.shape[0] == 1:
        channels = channels[0]
    return channels


def regrouped(channels: Channels, before: list[_Size], after: list[_Size]) -> Channels | None:
    """The channels before a Reshape; None where the sizes of what they lie along are not known."""
    inner, outer, assumed = list[int](), list[int](), False
    while any(size > 1 for size in channels.shape[: len(after)]) or (assumed and (before or after)):
        counts = _last_group(before, after)
        if counts is None:
            known = [isinstance(size, int) for size in (*before[-1:], *after[-1:])]
            if assumed or len(known) < 2 or any(known):
                return None
            # Two unknown sizes are equal if all others are: the numbers of elements are.
            counts, assumed = (1, 1), True
        first, second = len(before) - counts[0], len(after) - counts[1]
        along = any(size > 1 for size in channels.shape[second : len(after)])
        if along and not all(isinstance(size, int) for size in (*before[first:], *after[second:])):
            return None
        inner = [size if along and isinstance(size, int) else 1 for size in before[first:]] + inner
        outer = [size if along and isinstance(size, int) else 1 for size in after[second:]] + outer
        before, after = before[:first], after[:second]
    ones = [1] * len(after)
    return np.broadcast_to(channels, ones + outer).reshape([1] * len(before) + inner)


def _last_group(before: list[_Size], after: list[_Size]) -> tuple[int, int] | None:
    """How many dimensions at the end of two shapes hold equally many elements."""
    if before and after and same_dimension(before[-1], after[-1]):
        return 1, 1
    counts, products = [0, 0], [1, 1]
    while not all(counts) or products[0] != products[1]:
        side = int(products[0] > products[1] or (counts[0] > 0 and not counts[1]))
        shape = (before, after)[side]
        if counts[side] == len(shape) or not isinstance(size := shape[-1 - counts[side]], int):
            return None
        counts[side] += 1
        products[side] *= size
    return counts[0], counts[1]

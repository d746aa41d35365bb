"""Scales and offsets of groups in 8 bits: of each group an int8, of each column one float.

    s[g, n] = s8[g, n] * c[n]              DQ(w, DQ(s8, c))

Sums of products of integers then stay integers over all groups of a column: a group's sum is
multiplied by its int8, and only the last sum by a float.  c has so few bits that no product is
rounded.  A negative scale has a negative int8; none is 0, which could not be divided by.  Offsets
are stored in the same way, and may be 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["on_two_levels", "split_scale"]

_TOP = 127
_NEVER_0 = 2.0**-100
_BITS = 16
"""Of c: with the 7 of a group they fit in a float32."""


def split_scale(
    scale: NDArray[np.float32], *, zero: bool = False
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The int8 of each group, [G, N], and the float of each column, [N], nearest to scales [G, N].

    Of what `on_two_levels` gave, the same scales exactly.  With `zero` an int8 may be 0.
    """
    largest = np.maximum(np.abs(scale).max(axis=0).astype(np.float64), _NEVER_0)
    mantissa, exponent = np.frexp(largest / _TOP)
    column = np.ldexp(np.ceil(mantissa * 2**_BITS) / 2**_BITS, exponent).astype(np.float32)
    groups = np.rint(scale / column)
    if not zero:
        groups = np.where(groups == 0, np.where(scale < 0, -1, 1), groups)
    return groups.astype(np.int8), column


def on_two_levels(scale: NDArray[np.float32], *, zero: bool = False) -> NDArray[np.float32]:
    """The scales that are stored for these."""
    groups, column = split_scale(scale, zero=zero)
    return groups * column

"""Loads from rows of activations whose length is no multiple of 16 bytes.

Such rows begin anywhere, so that a word of 4 bytes is one load, or two, or four, as its address is
sure to be a multiple of 4, 2 or 1.  Beyond a row's end there are zeros.
"""

from __future__ import annotations

import math

from qcompiler.targets.cuda.device import (
    Expr,
    cast,
    constant,
    emit,
    registers,
    store,
    when,
    wide,
)

__all__ = ["is_aligned", "load_word"]


def is_aligned(row_bytes: int, size: int) -> bool:
    """Whether all parts of `size` bytes of all rows can be loaded at once."""
    return row_bytes % size == 0


def load_word(
    words: Expr, index: Expr, array: Expr, row: Expr, offset: Expr, row_bytes: int
) -> None:
    """`words[index]` becomes 4 bytes of a row, from byte `offset` on.

    Args:
        words: Registers.
        index: Which of them.
        array: Bytes of all rows.
        row: Which of them.
        offset: A multiple of 4.
        row_bytes: From one row to the next.
    """
    unit = math.gcd(4, row_bytes)
    start = wide(row) * row_bytes + wide(offset)
    store(words, constant(0, "uint32"), index)
    if unit == 4:
        with when(offset < row_bytes):
            emit("ld.global.nc.u32", words[index], array.ptr_to([start]))
        return
    piece = registers("uint16", 1)
    for first in range(0, 4, unit):
        with when(offset + first < row_bytes):
            emit(f"ld.global.nc.u{8 * unit}", piece[0], array.ptr_to([start + first]))
            mask = ((1 << 8 * unit) - 1) << 8 * first
            others = words[index] & constant(0xFFFFFFFF ^ mask, "uint32")
            placed = cast("uint32", piece[0]) << constant(8 * first, "uint32")
            store(words, others | placed, index)

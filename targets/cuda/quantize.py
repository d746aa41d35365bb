"""The kernel of Quantize: float16 rows to 8 bits with a scale of each row's own.

A block has one row, or several after each other where a grid could not hold as many blocks.  It
reads a row twice, the second time out of a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qcompiler.ir.region import Region
from qcompiler.targets.cuda.block_row import (
    NO_NUMBER,
    BlockRow,
    load_row,
    scale_of,
    store_quantized,
    vector_of,
)
from qcompiler.targets.cuda.device import (
    Expr,
    Place,
    ceildiv,
    extern,
    kernel,
    let,
    loop,
    maximum,
    real,
    registers,
    store,
    when,
    wide,
)

__all__ = ["quantize_kernel", "rows_kernel"]


def quantize_kernel(region: Region, threads: int, block_rows: int) -> Any:
    """The kernel of Quantize or QuantizeFp8."""
    pointers = {"x": "float16", "q": "uint8", "s": "float32"}
    return rows_kernel(
        pointers, threads, block_rows, lambda arrays, place: _Row(region, threads, arrays, place)
    )


def rows_kernel(pointers: Mapping[str, str], threads: int, block_rows: int, make: Any) -> Any:
    """A kernel whose blocks have `block_rows` rows each, one after the other.

    `make(arrays, place)` gives what computes row i when it is called with i.
    """

    def body(arrays: Mapping[str, Expr], rows: Expr, place: Place) -> None:
        compute = make(arrays, place)
        if block_rows == 1:
            compute(place.y)
            return
        with loop(0, block_rows) as turn:
            row = let(place.y * block_rows + turn)
            # All threads of the block agree, so that none misses a barrier.
            with when(row < rows):
                compute(row)

    return kernel(pointers, lambda rows: (1, ceildiv(rows, block_rows), 1), threads, body)


class _Row:
    """What a block does with a row."""

    def __init__(
        self, region: Region, threads: int, arrays: Mapping[str, Expr], place: Place
    ) -> None:
        self._k, self._is_fp8 = region.size("K"), region.anchor == "QuantizeFp8"
        self._threads, self._arrays, self._place = threads, arrays, place
        self._block, self._vector = BlockRow(threads, place), vector_of(self._k)

    def __call__(self, row: Expr) -> None:
        x, start = self._arrays["x"], let(wide(row) * self._k)
        largest = registers("float32", 1)
        store(largest, real(NO_NUMBER), 0)
        with self._vectors() as offset:
            for value in load_row(x, start + wide(offset), self._vector):
                store(largest, maximum(largest[0], extern("float32", "fabsf", value)), 0)
        scale = scale_of(self._block.largest(largest), self._is_fp8)
        with when(self._place.thread == 0):
            store(self._arrays["s"], scale, row)
        with self._vectors() as offset:
            at = let(start + wide(offset))
            values = load_row(x, at, self._vector)
            store_quantized(values, scale, self._is_fp8, self._arrays["q"], at)

    @contextmanager
    def _vectors(self) -> Iterator[Expr]:
        """Where the thread's vectors of a row begin, one after the other."""
        with loop(0, -(-self._k // (self._vector * self._threads))) as turn:
            offset = let((turn * self._threads + self._place.thread) * self._vector)
            with when(offset < self._k):
                yield offset

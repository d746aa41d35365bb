"""The kernel of a norm with the residual before it and the Quantize after it, in float16.

    x = a + b
    y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) gamma + beta
    y = x / sqrt(mean(x^2) + epsilon) gamma                                  (RMSNorm)
    q, s = Quantize(y), or Quantize(y extra0) with one factor per channel

x and y are rounded to float16 even where they do not leave the kernel, as the function's body does;
all else is float32.  A block has one row, read once, and kept in registers from the first sum to
the last store.
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
    rounded,
    scale_of,
    store_quantized,
    vector_of,
)
from qcompiler.targets.cuda.device import (
    Expr,
    Place,
    extern,
    let,
    maximum,
    real,
    registers,
    store,
    when,
    wide,
)
from qcompiler.targets.cuda.norm_plan import norm_pointers, quantizes_to_fp8
from qcompiler.targets.cuda.quantize import rows_kernel

__all__ = ["norm_kernel"]


def norm_kernel(region: Region, threads: int, block_rows: int) -> Any:
    """The kernel of a norm."""
    return rows_kernel(
        norm_pointers(region), threads, block_rows,
        lambda arrays, place: _Row(region, threads, arrays, place),
    )  # fmt: skip


class _Row:
    """What a block does with a row."""

    def __init__(
        self, region: Region, threads: int, arrays: Mapping[str, Expr], place: Place
    ) -> None:
        self._k, self._is_fp8 = region.size("K"), quantizes_to_fp8(region)
        self._centres = "LayerNorm" in region.anchor
        self._epsilon = region.number("epsilon")
        self._made = {name: arrays[name] for name in region.outputs}
        self._threads, self._arrays, self._place = threads, arrays, place
        self._block = BlockRow(threads, place)
        self._width = vector_of(self._k)
        self._count = -(-self._k // (self._width * threads))
        self._values = registers("float32", self._count * self._width)
        self._sum = registers("float32", 1)

    def __call__(self, row: Expr) -> None:
        start = let(wide(row) * self._k)
        self._take(start)
        if self._centres:
            self._centre(let(self._block.total(self._sum) * real(1 / self._k)))
        spread = let(self._block.total(self._sum) * real(1 / self._k) + real(self._epsilon))
        inverse = let(real(1.0) / extern("float32", "sqrtf", spread))
        self._scale(start, inverse)
        step = scale_of(self._block.largest(self._sum), self._is_fp8)
        with when(self._place.thread == 0):
            store(self._made["s"], step, row)
        for i in range(self._count):
            with self._vector(i) as offset:
                at = start + wide(offset)
                store_quantized(self._part(i), step, self._is_fp8, self._made["q"], at)

    def _take(self, start: Expr) -> None:
        """Load x, or make it; sum it, or its squares."""
        store(self._sum, real(0.0), 0)
        for i in range(self._count):
            with self._vector(i) as offset:
                at = let(start + wide(offset))
                for j, value in enumerate(self._operand(at)):
                    store(self._values, value, i * self._width + j)
                    self._add(value if self._centres else value * value)

    def _operand(self, at: Expr) -> list[Expr]:
        if "a" not in self._arrays:
            return self._load("x", at)
        a, b = self._load("a", at), self._load("b", at)
        added = [first + second for first, second in zip(a, b, strict=True)]
        return rounded(added, self._made.get("x"), at)

    def _centre(self, mean: Expr) -> None:
        """Subtract the mean; sum the squares."""
        store(self._sum, real(0.0), 0)
        for i in range(self._count):
            with self._vector(i):
                for j, value in enumerate(self._part(i)):
                    centred = let(value - mean)
                    store(self._values, centred, i * self._width + j)
                    self._add(centred * centred)

    def _scale(self, start: Expr, inverse: Expr) -> None:
        """Make y, and what of it is quantized; the largest magnitude of that."""
        store(self._sum, real(NO_NUMBER), 0)
        for i in range(self._count):
            with self._vector(i) as offset:
                gamma = self._load("gamma", wide(offset))
                y = [let(v * inverse * g) for v, g in zip(self._part(i), gamma, strict=True)]
                if self._centres:
                    beta = self._load("beta", wide(offset))
                    y = [let(v + shift) for v, shift in zip(y, beta, strict=True)]
                y = rounded(y, self._made.get("y"), start + wide(offset))
                if "extra0" in self._arrays:
                    factors = self._load("extra0", wide(offset))
                    y = [let(v * factor) for v, factor in zip(y, factors, strict=True)]
                for j, value in enumerate(y):
                    store(self._values, value, i * self._width + j)
                    store(self._sum, maximum(self._sum[0], extern("float32", "fabsf", value)), 0)

    def _load(self, name: str, at: Expr) -> list[Expr]:
        return load_row(self._arrays[name], at, self._width)

    def _part(self, i: int) -> list[Expr]:
        return [self._values[i * self._width + j] for j in range(self._width)]

    def _add(self, value: Expr) -> None:
        store(self._sum, self._sum[0] + value, 0)

    @contextmanager
    def _vector(self, i: int) -> Iterator[Expr]:
        """Where the thread's i-th vector of a row begins, if there is one."""
        offset = let((i * self._threads + self._place.thread) * self._width)
        if self._k % (self._width * self._threads) == 0:
            yield offset
            return
        with when(offset < self._k):
            yield offset

"""A block of threads with a row of float16: loads, reductions, and its 8-bit form.

A thread has *vectors* of a row: as many elements, 8 at most, as any row begins at a multiple of.

    s = max(|x|, 1e-20) / 127;   q = round(x / s) + 128          (Fp8: / 448, to e4m3)

A NaN is passed over by the largest magnitude, and becomes the lowest integer, as in ONNX Runtime;
where there is nothing else the scale is NaN, and so is all that is computed with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from qcompiler.ir.dialect import SMALLEST_MAGNITUDE
from qcompiler.targets.cuda.device import (
    Expr,
    Place,
    barrier,
    cast,
    constant,
    emit,
    extern,
    half_of,
    let,
    maximum,
    real,
    registers,
    reinterpret,
    select,
    shared,
    shuffle_xor,
    store,
    view,
    when,
)

__all__ = [
    "NO_NUMBER",
    "WARP",
    "BlockRow",
    "load_row",
    "rounded",
    "scale_of",
    "store_quantized",
    "vector_of",
]

NO_NUMBER = -1.0
"""What the largest magnitude of a row is before any was met."""
WARP = 32
_MOST = 8
"""Elements of float16 in 16 bytes."""


def vector_of(k: int) -> int:
    """How many elements of rows of length `k` are loaded at a time."""
    return math.gcd(k, _MOST)


class BlockRow:
    """Reductions over the threads of a block; every thread must take part in each."""

    def __init__(self, threads: int, place: Place) -> None:
        self._warps, self._place = threads // WARP, place
        self._parts = view(shared(self._warps * 4), "float32", self._warps)

    def largest(self, value: Expr) -> Expr:
        """The largest of all threads' `value`, a register."""
        return self._reduce(value, maximum)

    def total(self, value: Expr) -> Expr:
        """Their sum; the same, to the last bit, in all threads."""
        return self._reduce(value, lambda a, b: a + b)

    def _reduce(self, value: Expr, join: Callable[[Expr, Expr], Expr]) -> Expr:
        for distance in (16, 8, 4, 2, 1):
            store(value, join(value[0], shuffle_xor(value[0], distance)), 0)
        if self._warps == 1:
            return value[0]
        # What was reduced before may still be read.
        barrier()
        with when(self._place.lane == 0):
            store(self._parts, value[0], self._place.warp)
        barrier()
        store(value, self._parts[0], 0)
        for warp in range(1, self._warps):
            store(value, join(value[0], self._parts[warp]), 0)
        return value[0]


def load_row(array: Expr, index: Expr, count: int) -> list[Expr]:
    """A vector of `count` elements from `index` on, as float32."""
    if count == 1:
        return [let(cast("float32", array[index]))]
    words = registers("uint32", count // 2)
    parts = (words[i] for i in range(count // 2))
    emit(f"ld.global{_width(count)}.u32", *parts, array.ptr_to([index]))
    return [half_of(words[i // 2], i % 2) for i in range(count)]


def rounded(values: Sequence[Expr], array: Expr | None, index: Expr) -> list[Expr]:
    """A vector rounded to float16, stored in `array` if there is one, as float32."""
    count = len(values)
    if count == 1:
        value = let(cast("float16", values[0]))
        if array is not None:
            store(array, value, index)
        return [let(cast("float32", value))]
    words = registers("uint32", count // 2)
    for i, (low, high) in enumerate(zip(values[::2], values[1::2], strict=True)):
        emit("cvt.rn.f16x2.f32", words[i], let(high), let(low))
    if array is not None:
        parts = (words[i] for i in range(count // 2))
        emit(f"st.global{_width(count)}.u32", array.ptr_to([index]), *parts)
    return [half_of(words[i // 2], i % 2) for i in range(count)]


def _width(count: int) -> str:
    """How instructions call so many float16."""
    return f".v{count // 2}" if count > 2 else ""


def scale_of(largest: Expr, is_fp8: bool) -> Expr:
    """The scale of a row whose largest magnitude this is; NaN if it has none, see `NO_NUMBER`."""
    bounded = maximum(largest, real(SMALLEST_MAGNITUDE))
    nan = reinterpret("float32", constant(0x7FC00000, "uint32"))
    return let(select(largest < real(0.0), nan, bounded / real(448.0 if is_fp8 else 127.0)))


def store_quantized(
    values: Sequence[Expr], scale: Expr, is_fp8: bool, array: Expr, index: Expr
) -> None:
    """Store a vector in 8 bits each."""
    scaled = [let(value / scale) for value in values]
    numbers = _in_fp8(scaled) if is_fp8 else _in_int8(scaled)
    if len(values) < 4:
        for i, number in enumerate(numbers):
            store(array, cast("uint8", number), index + i)
        return
    words = [let(_packed(numbers[i : i + 4])) for i in range(0, len(values), 4)]
    emit(f"st.global{'.v2' if len(words) == 2 else ''}.u32", array.ptr_to([index]), *words)


def _in_int8(values: list[Expr]) -> list[Expr]:
    """Rounded half to even, with zero point 128."""
    bounded = [extern("float32", "fmaxf", value, real(-128.0)) for value in values]
    integers = [extern("int32", "__float2int_rn", value) + 128 for value in bounded]
    return [cast("uint32", number) for number in integers]


def _in_fp8(values: list[Expr]) -> list[Expr]:
    """In e4m3, whose instruction takes two."""
    pairs = [registers("uint16", 1) for _ in values[::2]]
    for pair, low, high in zip(pairs, values[::2], values[1::2] or values, strict=True):
        emit("cvt.rn.satfinite.e4m3x2.f32", pair[0], high, low)
    words = [let(cast("uint32", pair[0])) for pair in pairs]
    byte = constant(255, "uint32")
    return [words[i // 2] >> constant(8 * (i % 2), "uint32") & byte for i in range(len(values))]


def _packed(numbers: list[Expr]) -> Expr:
    """Four bytes as a word, the first in its lowest bits."""
    word = numbers[0]
    for i, number in enumerate(numbers[1:], 1):
        word = word | (number << constant(8 * i, "uint32"))
    return word

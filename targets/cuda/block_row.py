"""A block of threads with a row of float16: loads, reductions, and its 8-bit form.

    s = max(|x|, 1e-20) / 127;   q = round(x / s) + 128          (Fp8: / 448, to e4m3)

A NaN is passed over by the largest magnitude, and becomes the lowest integer, as in ONNX Runtime.
"""

from __future__ import annotations

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
    shared,
    shuffle_xor,
    store,
    view,
    when,
)

__all__ = ["VECTOR", "WARP", "BlockRow", "load_row", "quantized", "rounded", "scale_of"]

VECTOR = 8
"""Elements of float16 in 16 bytes."""
WARP = 32


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


def load_row(array: Expr, index: Expr) -> list[Expr]:
    """Eight elements from `index` on, as float32."""
    words = registers("uint32", 4)
    emit("ld.global.v4.u32", *(words[i] for i in range(4)), array.ptr_to([index]))
    return [half_of(words[i // 2], i % 2) for i in range(VECTOR)]


def rounded(values: Sequence[Expr], array: Expr | None, index: Expr) -> list[Expr]:
    """Eight numbers rounded to float16, stored in `array` if there is one, as float32."""
    words = registers("uint32", 4)
    for i, (low, high) in enumerate(zip(values[::2], values[1::2], strict=True)):
        emit("cvt.rn.f16x2.f32", words[i], let(high), let(low))
    if array is not None:
        emit("st.global.v4.u32", array.ptr_to([index]), *(words[i] for i in range(4)))
    return [half_of(words[i // 2], i % 2) for i in range(VECTOR)]


def scale_of(largest: Expr, is_fp8: bool) -> Expr:
    """The scale of a row whose largest magnitude this is."""
    bounded = maximum(largest, real(SMALLEST_MAGNITUDE))
    return let(bounded / real(448.0 if is_fp8 else 127.0))


def quantized(values: Sequence[Expr], scale: Expr, is_fp8: bool) -> list[Expr]:
    """Eight numbers in 8 bits each, as two words."""
    scaled = [let(value / scale) for value in values]
    return _fp8_words(scaled) if is_fp8 else _int8_words(scaled)


def _int8_words(values: list[Expr]) -> list[Expr]:
    """Rounded half to even, with zero point 128."""
    bounded = [extern("float32", "fmaxf", value, real(-128.0)) for value in values]
    integers = [extern("int32", "__float2int_rn", value) + 128 for value in bounded]
    return [_packed([cast("uint32", n) for n in integers[i : i + 4]], 8) for i in (0, 4)]


def _fp8_words(values: list[Expr]) -> list[Expr]:
    """In e4m3."""
    pairs = [registers("uint16", 1) for _ in range(4)]
    for pair, low, high in zip(pairs, values[::2], values[1::2], strict=True):
        emit("cvt.rn.satfinite.e4m3x2.f32", pair[0], high, low)
    wide_pairs = [cast("uint32", pair[0]) for pair in pairs]
    return [_packed(wide_pairs[i : i + 2], 16) for i in (0, 2)]


def _packed(parts: list[Expr], bits: int) -> Expr:
    """Parts of a word, the first in its lowest bits."""
    word = parts[0]
    for i, part in enumerate(parts[1:], 1):
        word = word | (part << constant(bits * i, "uint32"))
    return word

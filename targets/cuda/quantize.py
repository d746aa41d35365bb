"""The kernel of Quantize: float16 rows to 8 bits with a scale of each row's own.

    s = max(|x|, 1e-20) / 127;   q = round(x / s) + 128          (Fp8: / 448, to e4m3)

A block has one row, or several after each other where a grid could not hold as many blocks.  It
reads a row twice, the second time out of a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qcompiler.ir.dialect import SMALLEST_MAGNITUDE
from qcompiler.ir.region import Region
from qcompiler.targets.cuda.device import (
    Expr,
    Place,
    barrier,
    cast,
    ceildiv,
    constant,
    emit,
    extern,
    half_of,
    kernel,
    let,
    loop,
    maximum,
    real,
    registers,
    shared,
    shuffle_xor,
    store,
    view,
    when,
    wide,
)

__all__ = ["quantize_kernel"]

_VECTOR = 8
"""Elements of float16 in 16 bytes."""
_WARP = 32


def quantize_kernel(region: Region, threads: int, block_rows: int) -> Any:
    """The kernel of Quantize or QuantizeFp8."""

    def body(arrays: Mapping[str, Expr], rows: Expr, place: Place) -> None:
        one_row = _Row(region, threads, arrays, place)
        if block_rows == 1:
            one_row.quantize(place.y)
            return
        with loop(0, block_rows) as turn:
            row = let(place.y * block_rows + turn)
            # All threads of the block agree, so that none misses a barrier.
            with when(row < rows):
                one_row.quantize(row)

    pointers = {"x": "float16", "q": "uint8", "s": "float32"}
    return kernel(pointers, lambda rows: (1, ceildiv(rows, block_rows), 1), threads, body)


class _Row:
    """What a block does with a row."""

    def __init__(
        self, region: Region, threads: int, arrays: Mapping[str, Expr], place: Place
    ) -> None:
        self._k, self._is_fp8 = region.size("K"), region.anchor == "QuantizeFp8"
        self._threads, self._arrays, self._place = threads, arrays, place
        self._maxima = view(shared(threads // _WARP * 4), "float32", threads // _WARP)

    def quantize(self, row: Expr) -> None:
        start = let(wide(row) * self._k)
        largest = registers("float32", 1)
        store(largest, real(0.0), 0)
        with self._vectors() as offset:
            for value in self._load(start + wide(offset)):
                store(largest, maximum(largest[0], extern("float32", "fabsf", value)), 0)
        bounded = maximum(self._of_block(largest), real(SMALLEST_MAGNITUDE))
        scale = let(bounded / real(448.0 if self._is_fp8 else 127.0))
        with when(self._place.thread == 0):
            store(self._arrays["s"], scale, row)
        with self._vectors() as offset:
            at = let(start + wide(offset))
            values = [let(value / scale) for value in self._load(at)]
            words = _fp8_words(values) if self._is_fp8 else _int8_words(values)
            emit("st.global.v2.u32", self._arrays["q"].ptr_to([at]), *words)

    @contextmanager
    def _vectors(self) -> Iterator[Expr]:
        """Where the thread's vectors of a row begin, one after the other."""
        with loop(0, -(-self._k // (_VECTOR * self._threads))) as turn:
            offset = let((turn * self._threads + self._place.thread) * _VECTOR)
            with when(offset < self._k):
                yield offset

    def _load(self, index: Expr) -> list[Expr]:
        """Eight elements as float32."""
        words = registers("uint32", 4)
        source = self._arrays["x"].ptr_to([index])
        emit("ld.global.v4.u32", *(words[i] for i in range(4)), source)
        return [half_of(words[i // 2], i % 2) for i in range(_VECTOR)]

    def _of_block(self, largest: Expr) -> Expr:
        """The largest of all threads' values."""
        for distance in (16, 8, 4, 2, 1):
            store(largest, maximum(largest[0], shuffle_xor(largest[0], distance)), 0)
        warps = self._threads // _WARP
        if warps == 1:
            return largest[0]
        # The row before may still be read.
        barrier()
        with when(self._place.lane == 0):
            store(self._maxima, largest[0], self._place.warp)
        barrier()
        for warp in range(warps):
            store(largest, maximum(largest[0], self._maxima[warp]), 0)
        return largest[0]


def _int8_words(values: list[Expr]) -> list[Expr]:
    """Eight numbers rounded half to even, with zero point 128, as two words."""
    rounded = [extern("int32", "__float2int_rn", value) + 128 for value in values]
    return [_packed([cast("uint32", r) for r in rounded[i : i + 4]], 8) for i in (0, 4)]


def _fp8_words(values: list[Expr]) -> list[Expr]:
    """The same in e4m3."""
    pairs = [registers("uint16", 1) for _ in range(4)]
    for pair, low, high in zip(pairs, values[::2], values[1::2], strict=True):
        emit("cvt.rn.satfinite.e4m3x2.f32", pair[0], high, low)
    wide_pairs = [cast("uint32", pair[0]) for pair in pairs]
    return [_packed(wide_pairs[i : i + 2], 16) for i in (0, 2)]


def _packed(parts: list[Expr], bits: int) -> Expr:
    """Parts of a word, the first in its lowest bits."""
    word = parts[0]
    for i, part in enumerate(parts[1:], 1):
        word = word | (part << _word(bits * i))
    return word


def _word(value: int) -> Expr:
    return constant(value, "uint32")

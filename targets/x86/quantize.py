"""Per-token quantization to int8, stored as uint8 with zero point 128.

    amax = max(max |x|, 1e-30);  s = amax / 127;  q = uint8(rint(x * (127 / amax)) + 128)

The clip to [-127, 127] in the op's definition needs no instruction: |x| <= amax, and a float32
product that rounds past 127 still rounds to the integer 127.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Parameter, Register
from qcompiler.targets.x86.vector import (
    absolute,
    all_lanes_max,
    load_lanes,
    round_to_int32,
    store_lanes,
)

__all__ = ["quantize_function"]

_SMALLEST_AMAX = 1e-30
_CHAINS = 4
"""Running maxima kept apart, because one vmaxps takes 2 to 4 cycles and two can start in each."""

_PARAMETERS = (
    Parameter("x", "float32"),
    Parameter("q", "uint8"),
    Parameter("s", "float32"),
    Parameter("rows", "int32", is_pointer=False),
)


def quantize_function(k: int) -> Any:
    """The TIR of `void f(const float *x, uint8_t *q, float *s, int32_t rows)`, rows of `k`."""

    def body(x: Expr, q: Expr, s: Expr, rows: Expr) -> None:
        with tir.loop(0, rows) as row:
            start = row * k
            amax = Register("float32", _row_amax(x, start, k))
            tir.store(s, amax.lane(0) / tir.constant(127.0, "float32"), row)
            inverse = Register("float32", tir.broadcast(127.0) / amax.value)

            def quantize(offset: Expr, count: int, chain: int) -> None:
                value = load_lanes(x, start + offset, count) * inverse.value
                integer = round_to_int32(value) + tir.broadcast(128)
                store_lanes(q, tir.cast("uint8x16", integer), start + offset, count, "uint8")

            _for_each_vector(k, quantize)

    return tir.function(_PARAMETERS, body)


def _row_amax(x: Expr, start: Expr, k: int) -> Expr:
    """The largest magnitude of the row, at least 1e-30, in all lanes."""
    maxima = [Register("float32", tir.broadcast(_SMALLEST_AMAX)) for _ in range(_CHAINS)]

    def update(offset: Expr, count: int, chain: int) -> None:
        value = absolute(load_lanes(x, start + offset, count))
        maxima[chain].set(tir.maximum(maxima[chain].value, value))

    _for_each_vector(k, update)
    first, second, third, fourth = (chain.value for chain in maxima)
    return all_lanes_max(tir.maximum(tir.maximum(first, second), tir.maximum(third, fourth)))


def _for_each_vector(k: int, emit: Callable[[Expr, int, int], None]) -> None:
    """`emit(offset, lanes, chain)` along a row: a loop of `_CHAINS` vectors, then the rest."""
    chunk = _CHAINS * LANES
    with tir.loop(0, k // chunk) as index:
        for chain in range(_CHAINS):
            emit(index * chunk + chain * LANES, LANES, chain)
    for chain, offset in enumerate(range(k - k % chunk, k, LANES)):
        emit(offset, min(LANES, k - offset), chain)

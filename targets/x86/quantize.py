"""Per-token quantization to int8, stored as uint8 with zero point 128.

    amax = max(max |x|, 1e-20);  s = amax / 127;  q = uint8(rint(x / s) + 128)

The quotient is the correctly rounded one, as QuantizeLinear computes it, so that no integer differs
from the op's body; but vdivps takes 7 to 10 cycles for 16 lanes.  With r = 1 / s rounded to nearest
and t = x r, the sum t + (x - t s) r with both steps fused is x / s correctly rounded (Markstein,
IBM J. Res. Dev. 34, 1990): three instructions at two per cycle.

Saturation needs no instruction either: |x| <= amax, so that the quotient rounds to at most 127.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qcompiler.ir.dialect import SMALLEST_MAGNITUDE
from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Parameter, Register
from qcompiler.targets.x86.vector import (
    absolute,
    all_lanes_max,
    fma,
    load_lanes,
    round_to_int32,
    store_lanes,
)

__all__ = ["quantize_function"]

_SMALLEST_AMAX = SMALLEST_MAGNITUDE
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
            scale = Register("float32", amax.value / tir.broadcast(127.0))
            tir.store(s, scale.lane(0), row)
            inverse = Register("float32", tir.broadcast(1.0) / scale.value)
            minus_scale = Register("float32", tir.broadcast(0.0) - scale.value)

            def quantize(offset: Expr, count: int, chain: int) -> None:
                value = Register("float32", load_lanes(x, start + offset, count))
                near = Register("float32", value.value * inverse.value)
                error = fma(near.value, minus_scale.value, value.value)
                quotient = fma(error, inverse.value, near.value)
                integer = round_to_int32(quotient) + tir.broadcast(128)
                store_lanes(q, tir.cast("uint8x16", integer), start + offset, count, "uint8")

            _for_each_vector(k, quantize)

    return tir.function(_PARAMETERS, body)


def _row_amax(x: Expr, start: Expr, k: int) -> Expr:
    """The largest magnitude of the row, at least 1e-20, in all lanes."""
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

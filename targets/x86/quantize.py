"""Per-token quantization to int8, stored as uint8 with zero point 128.

    amax = max(max |x|, 1e-20);  s = amax / 127;  q = uint8(rint(x / s) + 128)

The quotient is the correctly rounded one, as QuantizeLinear computes it, so that no integer differs
from the op's body; but vdivps takes 7 to 10 cycles for 16 lanes.  With r = 1 / s rounded to nearest
and t = x r, the sum t + (x - t s) r with both steps fused is x / s correctly rounded (Markstein,
IBM J. Res. Dev. 34, 1990): three instructions at two per cycle.

Saturation needs no instruction either: |x| <= amax, so that the quotient rounds to at most 127.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompiler.ir.dialect import SMALLEST_MAGNITUDE
from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Parameter, Register
from qcompiler.targets.x86.vector import (
    absolute,
    all_lanes_max,
    fma,
    load_lanes,
    pack_uint8,
    round_to_int32,
    store_lanes,
)

__all__ = ["quantize_function"]

_SMALLEST_AMAX = SMALLEST_MAGNITUDE
_CHAINS = 4
"""Running maxima kept apart, because one vmaxps takes 2 to 4 cycles and two can start in each."""

_ROWS = 4
"""Rows at a time: the reduction and the two divisions of a row are 60 to 70 cycles of latency,
which only another row can fill."""

_LONGEST_GROUPED_ROW = 2048
"""Longer rows hide that latency by themselves, and four of them would leave the 32 KiB of an L1."""

_CHUNK = _CHAINS * LANES

_PARAMETERS = (
    Parameter("x", "float32"),
    Parameter("q", "uint8"),
    Parameter("s", "float32"),
    Parameter("rows", "int32", is_pointer=False),
)


def quantize_function(k: int) -> Any:
    """The TIR of `void f(const float *x, uint8_t *q, float *s, int32_t rows)`, rows of `k`."""

    def body(x: Expr, q: Expr, s: Expr, rows: Expr) -> None:
        grouped = tir.constant(0, "int32")
        if k <= _LONGEST_GROUPED_ROW:
            groups = Register("int32", rows // _ROWS, 1)
            with tir.loop(0, groups.value) as group:
                _rows(x, q, s, k, [group * _ROWS + i for i in range(_ROWS)])
            grouped = groups.value * _ROWS
        with tir.loop(0, rows - grouped) as row:
            _rows(x, q, s, k, [grouped + row])

    return tir.function(_PARAMETERS, body)


def _rows(x: Expr, q: Expr, s: Expr, k: int, rows: Sequence[Expr]) -> None:
    """Quantize the given rows; each step is emitted for all of them before the next."""
    starts = [row * k for row in rows]
    amax = [Register("float32", _row_amax(x, start, k)) for start in starts]
    scales = [Register("float32", top.value / tir.broadcast(127.0)) for top in amax]
    inverses = [Register("float32", tir.broadcast(1.0) / scale.value) for scale in scales]
    for row, scale in zip(rows, scales, strict=True):
        tir.store(s, scale.lane(0), row)
    for start, scale, inverse in zip(starts, scales, inverses, strict=True):
        _quantize_row(x, q, start, k, scale.value, inverse.value)


def _quantize_row(x: Expr, q: Expr, start: Expr, k: int, scale: Expr, inverse: Expr) -> None:
    minus_scale = Register("float32", tir.broadcast(0.0) - scale)

    def integers(offset: Expr, count: int) -> Expr:
        value = Register("float32", load_lanes(x, start + offset, count))
        near = Register("float32", value.value * inverse)
        error = fma(near.value, minus_scale.value, value.value)
        return round_to_int32(fma(error, inverse, near.value)) + tir.broadcast(128)

    with tir.loop(0, k // _CHUNK) as index:
        quarters = [
            Register("int32", integers(index * _CHUNK + i * LANES, LANES)) for i in range(4)
        ]
        packed = pack_uint8([quarter.value for quarter in quarters])
        tir.store(q, packed, tir.lanes(start + index * _CHUNK, _CHUNK))
    for offset, count in _rest(k):
        narrow = tir.cast("uint8x16", integers(offset, count))
        store_lanes(q, narrow, start + offset, count, "uint8")


def _row_amax(x: Expr, start: Expr, k: int) -> Expr:
    """The largest magnitude of the row, at least 1e-20, in all lanes."""
    maxima = [Register("float32", tir.broadcast(_SMALLEST_AMAX)) for _ in range(_CHAINS)]

    def update(offset: Expr, count: int, chain: int) -> None:
        value = absolute(load_lanes(x, start + offset, count))
        maxima[chain].set(tir.maximum(maxima[chain].value, value))

    with tir.loop(0, k // _CHUNK) as index:
        for chain in range(_CHAINS):
            update(index * _CHUNK + chain * LANES, LANES, chain)
    for chain, (offset, count) in enumerate(_rest(k)):
        update(offset, count, chain)
    first, second, third, fourth = (chain.value for chain in maxima)
    return all_lanes_max(tir.maximum(tir.maximum(first, second), tir.maximum(third, fourth)))


def _rest(k: int) -> list[tuple[int, int]]:
    """Offset and lanes of the vectors after the last whole chunk of a row."""
    return [(offset, min(LANES, k - offset)) for offset in range(k - k % _CHUNK, k, LANES)]

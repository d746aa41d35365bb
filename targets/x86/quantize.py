"""Per-token quantization to int8, stored as uint8 with zero point 128.

    amax = max(max |x|, 1e-20);  s = amax / 127;  q = uint8(rint(x / s) + 128)

The quotient is the correctly rounded one, as QuantizeLinear computes it, so that no integer differs
from the op's body; but vdivps takes 7 to 10 cycles for 16 lanes.  With r = 1 / s rounded to nearest
and t = x r, the sum t + (x - t s) r with both steps fused is x / s correctly rounded (Markstein,
IBM J. Res. Dev. 34, 1990): three instructions at two per cycle.

Saturation needs no instruction either: |x| <= amax, so that the quotient rounds to at most 127.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from qcompiler.ir.dialect import SMALLEST_MAGNITUDE
from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Parameter, Register
from qcompiler.targets.x86.isa import AVX512_VNNI, Isa
from qcompiler.targets.x86.units import unit_of
from qcompiler.targets.x86.vector import (
    VectorUnit,
    all_lanes,
    fma,
    load_lanes,
    maxima_of,
    offset_by_128,
    store_lanes,
)

__all__ = [
    "FastQuotient",
    "QuantizedRow",
    "Quotient",
    "Values",
    "quantize_function",
    "quantize_rows",
    "scale_rows",
    "sweep",
    "sweep_chunks",
]

Values = Callable[[Expr, int], Expr]
"""Lanes `offset` to `offset + count` of a row as a vector, zeros after them."""

_CHAINS = 4
"""Running maxima kept apart, because one vmaxps takes 2 to 4 cycles and two can start in each."""

_ROWS = 4
"""Rows at a time: the reduction and the two divisions of a row are 60 to 70 cycles of latency,
which only another row can fill."""

_LONGEST_GROUPED_ROW = 2048
"""Longer rows hide that latency by themselves, and four of them would leave the 32 KiB of an L1."""

_CHUNK = _CHAINS * LANES

_SMOOTHING = Parameter("smoothing", "float32")

_STRIDE = Parameter("x_stride", "int32", is_pointer=False)

_RESULTS = (
    Parameter("q", "uint8"),
    Parameter("s", "float32"),
    Parameter("rows", "int32", is_pointer=False),
)


def quantize_function(
    k: int, isa: Isa = AVX512_VNNI, *, is_smoothed: bool = False, is_fast: bool = False
) -> Any:
    """The TIR of `void f(const float *x, uint8_t *q, float *s, int32_t rows, int32_t x_stride)`.

    Rows of `k`, those of x so many floats apart: they may overlap.  With `is_smoothed`,
    `const float *smoothing` follows `x`: a factor for each column.  With `is_fast`, quotients are
    those of `FastQuotient`.
    """
    unit = unit_of(isa)
    quotient = FastQuotient if is_fast else Quotient

    def body(x: Expr, *rest: Expr) -> None:
        *smoothing, q, s, rows, stride = rest
        group = _ROWS if k <= _LONGEST_GROUPED_ROW else 1
        load = functools.partial(_load, x, stride, smoothing)
        for_rows(rows, group, lambda some: _rows(unit, load, q, s, k, some, quotient))

    smoothing = (_SMOOTHING,) if is_smoothed else ()
    return tir.function((Parameter("x", "float32"), *smoothing, *_RESULTS, _STRIDE), body)


def for_rows(rows: Expr, group: int, emit: Callable[[Sequence[Expr]], None]) -> None:
    """`emit` code for `group` rows at a time, and for the rows left over one by one."""
    grouped = tir.constant(0, "int32")
    if group > 1:
        groups = Register("int32", rows // group, 1)
        with tir.loop(0, groups.value) as index:
            emit([index * group + i for i in range(group)])
        grouped = groups.value * group
    with tir.loop(0, rows - grouped) as row:
        emit([grouped + row])


def sweep(k: int, unroll: int, emit: Callable[[Expr, int, int], None]) -> None:
    """`emit(offset, lanes, i)` for each vector of a row of `k`, `unroll` of them in a loop's body.

    `i` counts from 0 to `unroll - 1`; only the last vector of a row has fewer than 16 lanes.
    """
    chunk = unroll * LANES
    with tir.loop(0, k // chunk) as index:
        for i in range(unroll):
            emit(index * chunk + i * LANES, LANES, i)
    for i, offset in enumerate(range(k - k % chunk, k, LANES)):
        emit(offset, min(LANES, k - offset), i)


def _rows(
    unit: VectorUnit,
    load: Callable[[Expr, Expr, int], Expr],
    q: Expr,
    s: Expr,
    k: int,
    rows: Sequence[Expr],
    quotient: type[Quotient | FastQuotient],
) -> None:
    """Quantize the given rows; each step is emitted for all of them before the next."""
    values = [functools.partial(load, row) for row in rows]
    tops = [Register("float32", _row_top(unit, value, k)) for value in values]
    quantize_rows(scale_rows(unit, values, tops, q, s, rows, k, quotient), k)


def _load(
    x: Expr, stride: Expr, smoothing: Sequence[Expr], row: Expr, offset: Expr, count: int
) -> Expr:
    value = load_lanes(x, row * stride + offset, count)
    return value * load_lanes(smoothing[0], offset, count) if smoothing else value


class Quotient:
    """x / s, correctly rounded (see above)."""

    @staticmethod
    def inverse(amax: Expr, scale: Expr) -> Expr:
        """1 / s, correctly rounded."""
        return tir.broadcast(1.0) / scale

    def __init__(self, scale: Expr, inverse: Expr) -> None:
        self._inverse = Register("float32", inverse)
        self._minus_scale = Register("float32", tir.broadcast(0.0) - scale)

    def of(self, x: Expr) -> Expr:
        """Of a register's value."""
        near = Register("float32", x * self._inverse.value)
        error = fma(near.value, self._minus_scale.value, x)
        return fma(error, self._inverse.value, near.value)


class FastQuotient:
    """x / s to 2^-45 of itself, then rounded: x r + x e, where e is what r is short of 1 / s.

    An instruction less.  It differs from the other where x / s lies so close to the middle of two
    floats, which decides an integer once in 1e11 numbers: not for numbers that have been rounded
    otherwise than the body's before.
    """

    @staticmethod
    def inverse(amax: Expr, scale: Expr) -> Expr:
        """Nearly 1 / s, computed at the same time as s."""
        return tir.broadcast(127.0) / amax

    def __init__(self, scale: Expr, inverse: Expr) -> None:
        self._inverse = Register("float32", inverse)
        short = fma(tir.broadcast(0.0) - scale, self._inverse.value, tir.broadcast(1.0))
        self._rest = Register("float32", short * self._inverse.value)

    def of(self, x: Expr) -> Expr:
        """Of a register's value."""
        return fma(x, self._inverse.value, x * self._rest.value)


class QuantizedRow:
    """A row whose scale is known: its integers are stored some at a time."""

    def __init__(
        self,
        unit: VectorUnit,
        values: Values,
        q: Expr,
        start: Expr,
        quotient: Quotient | FastQuotient,
    ) -> None:
        self._unit, self._values, self._quotient = unit, values, quotient
        self._q, self._start = q, start

    def store(self, offset: Expr, count: int) -> None:
        """Those from `offset` on: 64, or 16 or fewer."""
        at = self._start + offset
        if count < _CHUNK:
            narrow = tir.cast("uint8x16", self._integers(offset, count) + tir.broadcast(128))
            store_lanes(self._q, narrow, at, count, "uint8")
            return
        quarters = [
            Register("int32", self._integers(offset + i * LANES, LANES)) for i in range(_CHAINS)
        ]
        packed = self._unit.pack_int8([quarter.value for quarter in quarters])
        tir.store(self._q, offset_by_128(packed), tir.lanes(at, _CHUNK))

    def _integers(self, offset: Expr, count: int) -> Expr:
        value = Register("float32", self._values(offset, count))
        return self._unit.round_to_int32(self._quotient.of(value.value))


def scale_rows(
    unit: VectorUnit,
    values: Sequence[Values],
    tops: Sequence[Register],
    q: Expr,
    s: Expr,
    rows: Sequence[Expr],
    k: int,
    quotient: type[Quotient | FastQuotient],
) -> list[QuantizedRow]:
    """Store `s` of the given rows, with their values and largest magnitudes per lane.

    The scales are computed for all rows at once, a lane for each.
    """
    amax = Register("float32", maxima_of(tops))
    scales = Register("float32", amax.value / tir.broadcast(127.0))
    inverses = Register("float32", quotient.inverse(amax.value, scales.value))
    quantized = []
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        tir.store(s, scales.lane(i), row)
        scale, inverse = (all_lanes(vector.value, i) for vector in (scales, inverses))
        quantized.append(QuantizedRow(unit, value, q, row * k, quotient(scale, inverse)))
    return quantized


def quantize_rows(rows: Sequence[QuantizedRow], k: int) -> None:
    """Store `q` of rows of `k`, one after the other."""
    for row in rows:
        sweep_chunks(k, row.store)


def sweep_chunks(k: int, emit: Callable[[Expr, int], None]) -> None:
    """`emit(offset, count)` for each 64 elements of a row of `k`, then for at most 16 each."""
    with tir.loop(0, k // _CHUNK) as index:
        emit(index * _CHUNK, _CHUNK)
    for offset in range(k - k % _CHUNK, k, LANES):
        emit(offset, min(LANES, k - offset))


def _row_top(unit: VectorUnit, values: Values, k: int) -> Expr:
    """The largest magnitude in each lane of a row, at least 1e-20."""
    maxima = [Register("float32", tir.broadcast(SMALLEST_MAGNITUDE)) for _ in range(_CHAINS)]

    def update(offset: Expr, count: int, chain: int) -> None:
        maxima[chain].set(unit.larger_magnitude(values(offset, count), maxima[chain].value))

    sweep(k, _CHAINS, update)
    first, second, third, fourth = (chain.value for chain in maxima)
    return tir.maximum(tir.maximum(first, second), tir.maximum(third, fourth))

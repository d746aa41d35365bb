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
    all_lanes_max,
    fma,
    load_lanes,
    offset_by_128,
    store_lanes,
)

__all__ = ["Values", "for_rows", "quantize_function", "quantize_rows", "sweep"]

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


def quantize_function(k: int, isa: Isa = AVX512_VNNI, *, is_smoothed: bool = False) -> Any:
    """The TIR of `void f(const float *x, uint8_t *q, float *s, int32_t rows, int32_t x_stride)`.

    Rows of `k`, those of x so many floats apart: they may overlap.  With `is_smoothed`,
    `const float *smoothing` follows `x`: a factor for each column.
    """
    unit = unit_of(isa)

    def body(x: Expr, *rest: Expr) -> None:
        *smoothing, q, s, rows, stride = rest
        group = _ROWS if k <= _LONGEST_GROUPED_ROW else 1
        load = functools.partial(_load, x, stride, smoothing)
        for_rows(rows, group, lambda some: _rows(unit, load, q, s, k, some))

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
) -> None:
    """Quantize the given rows; each step is emitted for all of them before the next."""
    values = [functools.partial(load, row) for row in rows]
    amax = [Register("float32", _row_amax(unit, value, k)) for value in values]
    quantize_rows(unit, values, amax, q, s, rows, k)


def _load(
    x: Expr, stride: Expr, smoothing: Sequence[Expr], row: Expr, offset: Expr, count: int
) -> Expr:
    value = load_lanes(x, row * stride + offset, count)
    return value * load_lanes(smoothing[0], offset, count) if smoothing else value


def quantize_rows(
    unit: VectorUnit,
    values: Sequence[Values],
    amax: Sequence[Register],
    q: Expr,
    s: Expr,
    rows: Sequence[Expr],
    k: int,
) -> None:
    """Store `q` and `s` of the given rows, with their values and largest magnitudes."""
    scales = [Register("float32", top.lane(0) / tir.constant(127.0, "float32"), 1) for top in amax]
    inverses = [
        Register("float32", tir.constant(1.0, "float32") / scale.value, 1) for scale in scales
    ]
    for row, scale in zip(rows, scales, strict=True):
        tir.store(s, scale.value, row)
    for row, value, scale, inverse in zip(rows, values, scales, inverses, strict=True):
        multiples = [Register("float32", tir.broadcast(one.value)) for one in (scale, inverse)]
        _quantize_row(unit, value, q, row * k, k, *(several.value for several in multiples))


def _quantize_row(
    unit: VectorUnit,
    values: Values,
    q: Expr,
    start: Expr,
    k: int,
    scale: Expr,
    inverse: Expr,
) -> None:
    minus_scale = Register("float32", tir.broadcast(0.0) - scale)

    def integers(offset: Expr, count: int) -> Expr:
        value = Register("float32", values(offset, count))
        near = Register("float32", value.value * inverse)
        error = fma(near.value, minus_scale.value, value.value)
        return unit.round_to_int32(fma(error, inverse, near.value))

    with tir.loop(0, k // _CHUNK) as index:
        quarters = [
            Register("int32", integers(index * _CHUNK + i * LANES, LANES)) for i in range(4)
        ]
        packed = unit.pack_int8([quarter.value for quarter in quarters])
        tir.store(q, offset_by_128(packed), tir.lanes(start + index * _CHUNK, _CHUNK))
    for offset in range(k - k % _CHUNK, k, LANES):
        count = min(LANES, k - offset)
        narrow = tir.cast("uint8x16", integers(offset, count) + tir.broadcast(128))
        store_lanes(q, narrow, start + offset, count, "uint8")


def _row_amax(unit: VectorUnit, values: Values, k: int) -> Expr:
    """The largest magnitude of the row, at least 1e-20, in all lanes."""
    maxima = [Register("float32", tir.broadcast(SMALLEST_MAGNITUDE)) for _ in range(_CHAINS)]

    def update(offset: Expr, count: int, chain: int) -> None:
        maxima[chain].set(unit.larger_magnitude(values(offset, count), maxima[chain].value))

    sweep(k, _CHAINS, update)
    first, second, third, fourth = (chain.value for chain in maxima)
    return all_lanes_max(tir.maximum(tir.maximum(first, second), tir.maximum(third, fourth)))

"""The end of a product's kernel: scales, the region's epilogue, and the store.

    y[row, column] = steps(sum * s[row] * ws[column], extras)       or, of one split of K,
    workspace[split, row, column] = sum

Sums of W8A8 are those of uint8 with zero point 128: 128 times the sum of a column's weights, which
lies behind the scales, is taken from them.  They are int32 until then, in the workspace too: sums
by weights of one sign float32 would round by more than what is left of them.
float32 from there on, rounded to float16 once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qcompiler.ir.region import Region
from qcompiler.targets.cuda.device import (
    Expr,
    Place,
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
    minimum,
    real,
    registers,
    reinterpret,
    store,
    store_vector,
    vector,
    when,
    wide,
)
from qcompiler.targets.cuda.packing import (
    COLUMN_MULTIPLE,
    CONV_IMAGE,
    FOUR_BITS,
    INTEGERS,
    packing,
)
from qcompiler.targets.cuda.plan import result_pitch, results_of, scales_of
from qcompiler.targets.epilogue import apply_steps

__all__ = ["Finish", "combine_kernel", "pointers_of"]


class _Register:
    """A value that later steps may read more than once."""

    def __init__(self, dtype: str, init: Expr) -> None:
        self.value = let(cast(dtype, init))


class Scalars:
    """What `epilogue.ELEMENTWISE` is written against: here one float32, a thread's own."""

    Register = _Register
    maximum = staticmethod(maximum)
    minimum = staticmethod(minimum)

    @staticmethod
    def broadcast(value: float) -> Expr:
        """A constant."""
        return real(value)

    @staticmethod
    def absolute(value: Expr) -> Expr:
        """|value|."""
        return extern("float32", "fabsf", value)

    def sigmoid(self, value: Expr) -> Expr:
        """1 / (1 + e^-value); the fast exponential is good to 2^-21 of what float16 keeps."""
        exponential = extern("float32", "__expf", self.broadcast(0.0) - value)
        return extern(
            "float32", "__fdividef", self.broadcast(1.0), self.broadcast(1.0) + exponential
        )

    def gelu_tail(self, value: Expr, approximate: str) -> Expr:
        """max(x, 0) - GELU(x)."""
        # Infinity times the 0 of its tail would be NaN.
        x = _Register("float32", minimum(self.broadcast(1e4), self.absolute(value))).value
        if approximate == "tanh":
            scale = -2 * math.sqrt(2 / math.pi)
            cubic = x * x * self.broadcast(0.044715 * scale) + self.broadcast(scale)
            return x * self.sigmoid(x * cubic)
        tail = extern("float32", "erfcf", x * self.broadcast(math.sqrt(0.5)))
        return x * self.broadcast(0.5) * tail


def _sum_type(region: Region) -> str:
    return "int32" if region.anchor in INTEGERS else "float32"


def pointers_of(region: Region, split: bool) -> dict[str, str]:
    """Parameters of the end of a kernel, by name."""
    if split:
        return {"workspace": _sum_type(region)}
    extras = (f"extra{i}" for i in range(len(region.extras)))
    return {
        **dict.fromkeys(scales_of(region), "float32"),
        **dict.fromkeys((*extras, *results_of(region)), "float16"),
        **({"made": "uint8"} if region.anchor == CONV_IMAGE else {}),
    }


class Finish:
    """Stores results of a region, or of one split of it.

    Attributes:
        pitch: Words from one row of a block's results in shared memory to the next.
    """

    def __init__(
        self, region: Region, arrays: Mapping[str, Expr], rows: Expr, split: Expr | None = None
    ) -> None:
        self._region, self._arrays, self._rows, self._split = region, arrays, rows, split
        self._n, self._results = region.size("N"), results_of(region)
        self.pitch = result_pitch(region, 1 if split is None else 2)
        # Whether four columns from a multiple of four on are always of one result.
        self._has_quads = all(width % 4 == 0 for _, width in self._results.values())

    def tile(self, results: Expr, rows: int, place: Place, threads: int) -> None:
        """Store a block's results, which lie in shared memory, row by row."""
        values = registers(results.dtype, 4)
        with loop(0, rows * COLUMN_MULTIPLE // 4 // threads) as turn:
            quad = let(turn * threads + place.thread)
            row, column = let(quad // 32), let(quad % 32 * 4)
            loaded = vector(results, row * self.pitch + column, results.dtype, 4)
            store_vector(values, loaded, constant(0), 4)
            self.quad(place.y * rows + row, place.x * COLUMN_MULTIPLE + column, values)

    def quad(self, row: Expr, column: Expr, values: Expr) -> None:
        """Store `values`, four registers, at four columns, those of them that exist."""
        if self._has_quads:
            with when((row < self._rows) & (column < self._n)):
                self._store(row, column, [values[i] for i in range(4)])
            return
        for i in range(4):
            self.element(row, column + i, values[i])

    def element(self, row: Expr, column: Expr, value: Expr) -> None:
        """Store one value if its place exists."""
        with when((row < self._rows) & (column < self._n)):
            self._store(row, column, [value])

    def _store(self, row: Expr, column: Expr, sums: Sequence[Expr]) -> None:
        if self._split is not None:
            _write_words(self._arrays["workspace"], sums, self._place_of_sum(row, column))
            return
        place = let(self._place(row, column))
        values = self._values(row, column, sums, place)
        if len(self._results) == 1:
            _write_halves(self._arrays[next(iter(self._results))], values, place)
            return
        self._write_parts(row, column, values)

    def _values(self, row: Expr, column: Expr, sums: Sequence[Expr], place: Expr) -> list[Expr]:
        """What the region makes of sums, at a place."""
        values = self._scaled(row, column, sums)
        operands = [
            _read_halves(
                self._arrays[f"extra{i}"], wide(column) if kind == "channel" else place, len(sums)
            )
            for i, kind in enumerate(self._region.extras)
        ]
        results = [
            apply_steps(Scalars(), self._region, value, [operand[i] for operand in operands])
            for i, value in enumerate(values)
        ]
        return [let(value) for value in results]

    def _place(self, row: Expr, column: Expr) -> Expr:
        """Where a result lies, and what has its shape."""
        return wide(row) * self._n + wide(column)

    def _place_of_sum(self, row: Expr, column: Expr) -> Expr:
        """Where a split's sum lies in the workspace."""
        assert self._split is not None
        return wide(self._split) * wide(self._rows) * self._n + wide(row) * self._n + wide(column)

    def _write_parts(self, row: Expr, column: Expr, values: Sequence[Expr]) -> None:
        """Each result takes those of its own columns."""
        for name, (first, width) in self._results.items():
            here = self._arrays[name], values, wide(row) * width + wide(column - first)
            with when((column >= first) & (column < first + width)):
                _write_halves(*here)

    def _scaled(self, row: Expr, column: Expr, sums: Sequence[Expr]) -> list[Expr]:
        if self._region.anchor in FOUR_BITS:
            return list(sums)
        scales = _read_floats(self._arrays["ws"], column, len(sums))
        if self._region.anchor in INTEGERS:
            sums = self._centred(column, sums)
        values = [cast("float32", value) for value in sums]
        if "s" in self._arrays:
            by_token = let(self._arrays["s"][row])
            values = [value * by_token for value in values]
        return [value * scale for value, scale in zip(values, scales, strict=True)]

    def _centred(self, column: Expr, sums: Sequence[Expr]) -> list[Expr]:
        columns = packing(self._region).columns
        offsets = _read_floats(self._arrays["ws"], column + columns, len(sums))
        return [
            value - reinterpret("int32", offset)
            for value, offset in zip(sums, offsets, strict=True)
        ]


def _read_floats(array: Expr, index: Expr, count: int) -> list[Expr]:
    """1 or 4 float32."""
    if count == 1:
        return [array[index]]
    words = registers("uint32", count)
    emit("ld.global.nc.v4.u32", *(words[i] for i in range(count)), array.ptr_to([index]))
    return [reinterpret("float32", words[i]) for i in range(count)]


def _read_halves(array: Expr, index: Expr, count: int) -> list[Expr]:
    """1 or 4 float16, as float32."""
    if count == 1:
        return [let(cast("float32", array[index]))]
    words = registers("uint32", count // 2)
    emit("ld.global.nc.v2.u32", *(words[i] for i in range(count // 2)), array.ptr_to([index]))
    return [half_of(words[i // 2], i % 2) for i in range(count)]


def _write_words(array: Expr, values: Sequence[Expr], index: Expr) -> None:
    if len(values) == 1:
        store(array, values[0], index)
        return
    words = [reinterpret("uint32", let(value)) for value in values]
    emit("st.global.v4.u32", array.ptr_to([index]), *words)


def _write_halves(array: Expr, values: Sequence[Expr], index: Expr) -> None:
    if len(values) == 1:
        store(array, cast("float16", values[0]), index)
        return
    words = registers("uint32", len(values) // 2)
    for i, (low, high) in enumerate(zip(values[::2], values[1::2], strict=True)):
        emit("cvt.rn.f16x2.f32", words[i], let(high), let(low))
    emit("st.global.v2.u32", array.ptr_to([index]), *(words[i] for i in range(len(values) // 2)))


def combine_kernel(region: Region, splits: int, threads: int) -> object:
    """The kernel that adds the partial sums of splits and computes the epilogue."""
    n = region.size("N")
    dtype = _sum_type(region)
    pointers = {"workspace": dtype, **pointers_of(region, split=False)}

    def body(arrays: Mapping[str, Expr], rows: Expr, place: Place) -> None:
        first = let((place.x * threads + place.thread) * 4)
        finish = Finish(region, arrays, rows)
        elements = wide(rows) * n
        totals = registers(dtype, 4)
        with when(first < rows * n):
            for i in range(4):
                store(totals, constant(0, dtype), i)
            with loop(0, splits) as split:
                start = wide(split) * elements + wide(first)
                for i in range(4):
                    # Where N is odd the last four of all may be fewer: there are none to add.
                    index = start + i if n % 4 == 0 else minimum(start + i, elements * splits - 1)
                    store(totals, totals[i] + arrays["workspace"][index], i)
            if n % 4 == 0:
                finish.quad(first // n, first % n, totals)
            else:
                for i in range(4):
                    finish.element((first + i) // n, (first + i) % n, totals[i])

    return kernel(pointers, lambda rows: (ceildiv(rows * n, threads * 4), 1, 1), threads, body)

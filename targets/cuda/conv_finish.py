"""The end of a convolution's kernel: results go to planes, and to the image that others read.

    y[b, n, p, q] = steps(sums)                 made[b, p + top, q + left, n] = round(y / t) + u

Threads lie side by side along the rows of planes.  For an image the bytes pass through shared
memory once more, so that threads then lie along channels.  A pixel at the rim stores the border
beside it too, which holds u, as channels do that are padding.

What splits leave for an image lies [splits, M, channels] in the workspace, else [splits, N, M].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qcompiler.ir.region import Region
from qcompiler.targets.cuda.conv import Pixels
from qcompiler.targets.cuda.device import (
    Expr,
    Place,
    barrier,
    cast,
    ceildiv,
    constant,
    emit,
    kernel,
    let,
    loop,
    quotient,
    registers,
    reinterpret,
    remainder,
    select,
    store,
    view,
    when,
    wide,
)
from qcompiler.targets.cuda.finish import Finish, pointers_of
from qcompiler.targets.cuda.image import stored_byte
from qcompiler.targets.cuda.image_plan import border
from qcompiler.targets.cuda.packing import (
    COLUMN_MULTIPLE,
    CONV_IMAGE,
    image_columns,
    is_depthwise,
    packing,
)
from qcompiler.targets.cuda.plan import BYTE_PITCH

__all__ = ["ConvFinish", "conv_combine_kernel", "conv_finish_of", "shuffled"]


def conv_finish_of(region: Region, split: bool) -> type[Finish]:
    """What ends the kernels of a convolution."""
    if region.anchor != CONV_IMAGE:
        return ConvFinish
    return _SumsOfImage if split else _ImageFinish


def shuffled(column: Expr) -> Expr:
    """Where depthwise kernels have a column in shared memory, so that no bank is met twice."""
    return column % 4 * (COLUMN_MULTIPLE // 4) + column // 4


class _SumsOfImage(Finish):
    """Stores the sums of one split, side by side along channels."""

    def __init__(
        self, region: Region, arrays: Mapping[str, Expr], rows: Expr, split: Expr | None = None
    ) -> None:
        super().__init__(region, arrays, rows, split)
        self._n, self._has_quads = image_columns(region), True


class ConvFinish(Finish):
    """Stores results in planes, or, of one split, the sums of a channel side by side."""

    def __init__(
        self, region: Region, arrays: Mapping[str, Expr], rows: Expr, split: Expr | None = None
    ) -> None:
        super().__init__(region, arrays, rows, split)
        self._pixels = Pixels(region, arrays)
        self._plane, self._is_shuffled = self._pixels.plane, is_depthwise(region)

    def tile(self, results: Expr, rows: int, place: Place, threads: int) -> None:
        """Each thread has one pixel of the tile, and every so many channels."""
        at_once = threads // rows
        own, first = let(place.thread % rows), let(place.thread // rows)
        with loop(0, COLUMN_MULTIPLE // at_once) as turn:
            column = let(turn * at_once + first)
            there = shuffled(column) if self._is_shuffled else column
            value = let(results[own * self.pitch + there])
            self._take(own, column, place, rows, value)

    def _take(self, own: Expr, column: Expr, place: Place, rows: int, value: Expr) -> None:
        """One sum of a pixel of the tile."""
        self.element(place.y * rows + own, place.x * COLUMN_MULTIPLE + column, value)

    def _place(self, row: Expr, column: Expr) -> Expr:
        image, pixel = quotient(row, self._plane), remainder(row, self._plane)
        return wide(image * self._n + column) * wide(self._plane) + wide(pixel)

    def _place_of_sum(self, row: Expr, column: Expr) -> Expr:
        assert self._split is not None
        return wide(self._split * self._n + column) * wide(self._rows) + wide(row)


class _ImageFinish(ConvFinish):
    """Stores results as an image, and in planes if these are read too."""

    def __init__(
        self, region: Region, arrays: Mapping[str, Expr], rows: Expr, split: Expr | None = None
    ) -> None:
        super().__init__(region, arrays, rows, split)
        first, scales = 2 * packing(region).columns, arrays["ws"]
        self._scale = let(scales[first])
        self._zero = let(reinterpret("int32", scales[first + 1]))
        self._stored, (top, left, bottom, right) = image_columns(region), border(region)
        self._corner = top, left
        pixels = self._pixels
        self._height = let(pixels.result_height + (top + bottom))
        self._width = let(pixels.result_width + (left + right))
        self._has_border = any((top, left, bottom, right))

    def tile(self, results: Expr, rows: int, place: Place, threads: int) -> None:
        """Make the bytes along planes, and store them along channels."""
        size = rows * (self.pitch * 4 + BYTE_PITCH)
        self._bytes, self._first = view(results, "uint8", size), rows * self.pitch * 4
        super().tile(results, rows, place, threads)
        barrier()
        words = view(results, "uint32", size // 4)
        with loop(0, rows // (threads // 32)) as turn:
            own = let(turn * (threads // 32) + place.warp)
            row = let(place.y * rows + own)
            column = let(place.x * COLUMN_MULTIPLE + place.lane * 4)
            with when((row < self._rows) & (column < self._stored)):
                word = let(words[self._first // 4 + own * (BYTE_PITCH // 4) + place.lane])
                self._store_word(row, column, word)

    def _take(self, own: Expr, column: Expr, place: Place, rows: int, value: Expr) -> None:
        row, whole = place.y * rows + own, place.x * COLUMN_MULTIPLE + column
        byte = self._byte(let(row), let(whole), value)
        store(self._bytes, cast("uint8", byte), self._first + own * BYTE_PITCH + column)

    def quad(self, row: Expr, column: Expr, values: Expr) -> None:
        """Store four channels of a pixel."""
        word = registers("uint32", 1)
        store(word, constant(0, "uint32"), 0)
        for i in range(4):
            byte = cast("uint32", self._byte(row, let(column + i), values[i]))
            store(word, word[0] | (byte << constant(8 * i, "uint32")), 0)
        self._store_word(row, column, word[0])

    def _byte(self, row: Expr, column: Expr, total: Expr) -> Expr:
        """What is stored of a sum; the zero point of one that is none."""
        byte = registers("int32", 1)
        store(byte, self._zero, 0)
        with when((row < self._rows) & (column < self._n)):
            at = let(self._place(row, column))
            (value,) = self._values(row, column, [total], at)
            half = let(cast("float16", value))
            if "y" in self._arrays:
                store(self._arrays["y"], half, at)
            store(byte, stored_byte(cast("float32", half), self._scale, self._zero), 0)
        return byte[0]

    def _store_word(self, row: Expr, column: Expr, word: Expr) -> None:
        """Four channels of a pixel, and of the border that is the pixel's."""
        image, pixel = quotient(row, self._plane), let(remainder(row, self._plane))
        width = self._pixels.result_width
        line, across = let(quotient(pixel, width)), let(remainder(pixel, width))
        own = [let(place + more) for place, more in zip((line, across), self._corner, strict=True)]
        first_line = let(image * self._height)
        if not self._has_border:
            self._store_at((first_line, *own), column, word)
            return
        down = _span(line, own[0], self._pixels.result_height, self._height)
        sideways = _span(across, own[1], width, self._width)
        with loop(0, down[1]) as i, loop(0, sideways[1]) as j:
            there = let(down[0] + i), let(sideways[0] + j)
            border_word = cast("uint32", self._zero) * constant(0x01010101, "uint32")
            is_own = (there[0] == own[0]) & (there[1] == own[1])
            self._store_at((first_line, *there), column, select(is_own, word, border_word))

    def _store_at(self, place: Sequence[Expr], column: Expr, word: Expr) -> None:
        first_line, line, across = place
        pixel = wide(first_line + line) * wide(self._width) + wide(across)
        target = self._arrays["made"].ptr_to([pixel * self._stored + wide(column)])
        emit("st.global.u32", target, let(word))


def _span(place: Expr, own: Expr, size: Expr, whole: Expr) -> tuple[Expr, Expr]:
    """From where on, and how far, a pixel's part of the border reaches, with itself."""
    first = let(select(place == 0, constant(0), own))
    last = let(select(place == size - 1, whole, own + 1))
    return first, let(last - first)


def conv_combine_kernel(region: Region, splits: int, threads: int) -> object:
    """The kernel that adds the partial sums of splits and computes the epilogue."""
    pointers = {"workspace": "int32", **pointers_of(region, split=False)}
    columns, add = image_columns(region), _add_quads if "made" in pointers else _add_columns

    def body(arrays: Mapping[str, Expr], rows: Expr, place: Place) -> None:
        finish = conv_finish_of(region, split=False)(region, arrays, rows)
        add(finish, arrays["workspace"], place, (rows, columns, splits, threads))

    return kernel(
        pointers,
        lambda rows: (ceildiv(rows * columns, threads * 4), 1, 1),
        threads,
        body,
        sizes=("height", "width"),
    )


def _add_columns(finish: Finish, workspace: Expr, place: Place, sizes: Sequence[Expr]) -> None:
    """Each thread has four results, far apart, so that threads lie along planes."""
    rows, columns, splits, threads = sizes
    total = registers("int32", 1)
    for turn in range(4):
        index = let((place.x * 4 + turn) * threads + place.thread)
        with when(index < rows * columns):
            store(total, constant(0), 0)
            with loop(0, splits) as split:
                at = wide(split) * wide(rows * columns) + wide(index)
                store(total, total[0] + workspace[at], 0)
            finish.element(remainder(index, rows), quotient(index, rows), total[0])


def _add_quads(finish: Finish, workspace: Expr, place: Place, sizes: Sequence[Expr]) -> None:
    """Each thread has four channels of a pixel."""
    rows, columns, splits, threads = sizes
    totals, first = registers("int32", 4), let((place.x * threads + place.thread) * 4)
    with when(first < rows * columns):
        for i in range(4):
            store(totals, constant(0), i)
        with loop(0, splits) as split:
            at = wide(split) * wide(rows * columns) + wide(first)
            for i in range(4):
                store(totals, totals[i] + workspace[at + i], i)
        row = let(quotient(first, constant(columns)))
        finish.quad(row, let(remainder(first, constant(columns))), totals)

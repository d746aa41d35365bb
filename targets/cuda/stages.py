"""Brings chunks of a product's operands to shared memory, by `cp.async`.

A stage is what a chunk of K takes: the tile's rows of activations, 128 bytes each, then 128 columns
of weights as they are packed, then their scales.  The eight 16-byte parts of a row are exchanged by
the row's number: neither `cp.async` nor `ldmatrix` meets a bank twice, and it is also the layout
that `wgmma` calls a swizzle of 128 bytes, given that stages begin at multiples of 1024.

Rows of activations that are no multiple of 16 bytes pass through registers instead.
"""

from __future__ import annotations

from collections.abc import Mapping

from qcompiler.ir.region import Region
from qcompiler.targets.cuda.device import (
    Expr,
    Place,
    cast,
    constant,
    emit,
    let,
    loop,
    minimum,
    registers,
    when,
    wide,
)
from qcompiler.targets.cuda.packing import COLUMN_MULTIPLE, TILE_BYTES, depth_of, packing
from qcompiler.targets.cuda.plan import (
    CHUNK_BYTES,
    TILE_THREADS,
    activation_bytes,
    groups_of_chunk,
    stage_bytes,
)
from qcompiler.targets.cuda.products import Product
from qcompiler.targets.cuda.rows import is_aligned, load_word
from qcompiler.targets.cuda.shapes import Roles, Tile

__all__ = ["PART", "TILE_ROWS", "Stages"]

TILE_ROWS = COLUMN_MULTIPLE // 16
"""Tiles of 16 columns in a block."""
PART = 16


class Stages:
    """The stages of a block."""

    def __init__(
        self,
        region: Region,
        shape: Tile | Roles,
        product: Product,
        arrays: Mapping[str, Expr],
        rows: Expr,
        place: Place,
        memory: Expr,
    ) -> None:
        self._product, self._layout = product, packing(region)
        self._shape, self._arrays, self._rows, self._place = shape, arrays, rows, place
        self._memory, self._bytes = memory, stage_bytes(region, shape.rows)
        self._row_bytes = depth_of(region) * activation_bytes(region)
        self._groups = groups_of_chunk(region)
        # A single group may be shorter than a chunk is.
        self._group = dict(region.sizes).get("G", 1) if self._layout.groups > 1 else None

    def ask(self, chunk: Expr, stage: Expr) -> None:
        """Ask for a chunk; it is there when its group of copies is waited for."""
        start = let(stage * self._bytes)
        self._ask_activations(chunk, start)
        self._ask_weights(chunk, start + self._shape.rows * CHUNK_BYTES)
        if self._groups:
            weights = TILE_ROWS * TILE_BYTES
            self._ask_scales(chunk, start + self._shape.rows * CHUNK_BYTES + weights)

    def _ask_activations(self, chunk: Expr, start: Expr) -> None:
        array = self._arrays[self._product.activation]
        if not is_aligned(self._row_bytes, PART):
            self._bring_activations(array, chunk, start)
            return
        if isinstance(self._shape, Roles):
            self._ask_rows(array, chunk, start)
            return
        for turn in range(self._shape.rows * 8 // TILE_THREADS):
            part = turn * TILE_THREADS + self._place.thread
            # A row that does not exist is another one: its results are not stored.
            row = minimum(self._place.y * self._shape.rows + part // 8, self._rows - 1)
            offset = let(chunk * CHUNK_BYTES + part % 8 * PART)
            source = array.ptr_to([wide(row) * self._row_bytes + wide(offset)])
            target = self._own_part(start, turn)
            if self._row_bytes % CHUNK_BYTES == 0:
                emit("cp.async.cg.shared.global", target, source, PART)
                continue
            # Zeros where the row has ended.
            existing = cast("uint32", offset < self._row_bytes) * constant(PART, "uint32")
            emit("cp.async.cg.shared.global", target, source, PART, existing)

    def _ask_rows(self, array: Expr, chunk: Expr, start: Expr) -> None:
        """The same with one address instead of one per row, for threads with few registers."""
        own_row = let(self._place.y * self._shape.rows + self._place.thread // 8)
        offset = let(chunk * CHUNK_BYTES + self._place.thread % 8 * PART)
        own_start = let(wide(own_row) * self._row_bytes + wide(offset))
        for turn in range(self._shape.rows * 8 // TILE_THREADS):
            further = turn * TILE_THREADS // 8
            # Zeros where a row has ended, or is none: nothing is read there.
            exists = own_row + further < self._rows
            if self._row_bytes % CHUNK_BYTES:
                exists = exists & (offset < self._row_bytes)
            size = cast("uint32", exists) * constant(PART, "uint32")
            source = array.ptr_to([own_start + further * self._row_bytes])
            emit("cp.async.cg.shared.global", self._own_part(start, turn), source, PART, size)

    def _bring_activations(self, array: Expr, chunk: Expr, start: Expr) -> None:
        """The same, at once; a barrier follows before they are multiplied."""
        words = registers("uint32", 4)
        with loop(0, self._shape.rows * 8 // TILE_THREADS) as turn:
            part = turn * TILE_THREADS + self._place.thread
            row = let(minimum(self._place.y * self._shape.rows + part // 8, self._rows - 1))
            offset = let(chunk * CHUNK_BYTES + part % 8 * PART)
            for i in range(4):
                load_word(words, i, array, row, offset + 4 * i, self._row_bytes)
            emit("st.shared.v4.u32", self._own_part(start, turn), *(words[i] for i in range(4)))

    def _own_part(self, start: Expr, turn: Expr) -> Expr:
        """Where in shared memory one of the parts of activations is that this thread asks for."""
        part = turn * TILE_THREADS + self._place.thread
        row, index = part // 8, part % 8
        return self._memory.ptr_to([start + row * CHUNK_BYTES + (index ^ (row % 8)) * PART])

    def _ask_weights(self, chunk: Expr, start: Expr) -> None:
        per_row = self._product.tiles * TILE_BYTES
        tiles = self._layout.depth // self._layout.tile_depth
        for turn in range(TILE_ROWS * per_row // PART // TILE_THREADS):
            part = turn * TILE_THREADS + self._place.thread
            row, offset = part * PART // per_row, part * PART % per_row
            first = (self._place.x * TILE_ROWS + row) * tiles + chunk * self._product.tiles
            source = self._arrays["w"].ptr_to([first * TILE_BYTES + offset])
            target = self._memory.ptr_to([start + part * PART])
            emit("cp.async.cg.shared.global", target, source, PART)

    def _ask_scales(self, chunk: Expr, start: Expr) -> None:
        record = self._layout.record_bytes
        per_row = record * self._groups
        group = chunk * 64 // self._group if self._group is not None else 0
        with when(self._place.thread < TILE_ROWS * per_row // PART):
            part = self._place.thread
            row, offset = part * PART // per_row, part * PART % per_row
            first = (self._place.x * TILE_ROWS + row) * self._layout.groups + group
            source = self._arrays["ws"].ptr_to([first * record + offset])
            emit(
                "cp.async.cg.shared.global",
                self._memory.ptr_to([start + part * PART]),
                source,
                PART,
            )

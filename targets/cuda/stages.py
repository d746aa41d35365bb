"""Brings chunks of a product's operands to shared memory, by `cp.async`.

A stage is what a chunk of K takes: the tile's rows of activations, 128 bytes each, then 128 columns
of weights as they are packed, then their scales.  The eight 16-byte parts of a row are exchanged by
the row's number: neither `cp.async` nor `ldmatrix` meets a bank twice, and it is also the layout
that `wgmma` calls a swizzle of 128 bytes, given that stages begin at multiples of 1024.
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
    minimum,
    registers,
    store,
    when,
    wide,
)
from qcompiler.targets.cuda.packing import COLUMN_MULTIPLE, TILE_BYTES, packing
from qcompiler.targets.cuda.plan import (
    CHUNK_BYTES,
    TILE_THREADS,
    Tile,
    activation_bytes,
    stage_bytes,
)
from qcompiler.targets.cuda.products import Product

__all__ = ["PART", "TILE_ROWS", "Stages"]

TILE_ROWS = COLUMN_MULTIPLE // 16
"""Tiles of 16 columns in a block."""
PART = 16


class Stages:
    """The stages of a block."""

    def __init__(
        self,
        region: Region,
        shape: Tile,
        product: Product,
        arrays: Mapping[str, Expr],
        rows: Expr,
        place: Place,
        memory: Expr,
    ) -> None:
        self._product, self._layout = product, packing(region)
        self._shape, self._arrays, self._rows, self._place = shape, arrays, rows, place
        self._memory, self._bytes = memory, stage_bytes(region, shape.rows)
        self._row_bytes = region.size("K") * activation_bytes(region)
        self._group = dict(region.sizes).get("G")

    def ask(self, chunk: Expr, stage: Expr) -> None:
        """Ask for a chunk; it is there when its group of copies is waited for."""
        start = let(stage * self._bytes)
        self._ask_activations(chunk, start)
        self._ask_weights(chunk, start + self._shape.rows * CHUNK_BYTES)
        if self._group is not None:
            weights = COLUMN_MULTIPLE // 16 * TILE_BYTES
            self._ask_scales(chunk, start + self._shape.rows * CHUNK_BYTES + weights, self._group)

    def _ask_activations(self, chunk: Expr, start: Expr) -> None:
        array = self._arrays[self._product.activation]
        for turn in range(self._shape.rows * 8 // TILE_THREADS):
            part = turn * TILE_THREADS + self._place.thread
            row, index = part // 8, part % 8
            # A row that does not exist is another one: its results are not stored.
            source_row = minimum(self._place.y * self._shape.rows + row, self._rows - 1)
            offset = let(chunk * CHUNK_BYTES + index * PART)
            source = array.ptr_to([wide(source_row) * self._row_bytes + wide(offset)])
            target = self._own_part(start, turn)
            if self._row_bytes % CHUNK_BYTES == 0:
                emit("cp.async.cg.shared.global", target, source, PART)
                continue
            # Zeros where the row has ended.
            existing = cast("uint32", offset < self._row_bytes) * constant(PART, "uint32")
            emit("cp.async.cg.shared.global", target, source, PART, existing)

    def _own_part(self, start: Expr, turn: int) -> Expr:
        """Where in shared memory one of the parts of activations is that this thread asks for."""
        part = turn * TILE_THREADS + self._place.thread
        row, index = part // 8, part % 8
        return self._memory.ptr_to([start + row * CHUNK_BYTES + (index ^ (row % 8)) * PART])

    def flip_own_parts(self, stage: Expr, mask: int) -> None:
        """Exclusive-or each word of activations that this thread asked for, and that is there."""
        start, words = let(stage * self._bytes), registers("uint32", 4)
        of_part = [words[i] for i in range(4)]
        for turn in range(self._shape.rows * 8 // TILE_THREADS):
            emit("ld.shared.v4.u32", *of_part, self._own_part(start, turn))
            for i in range(4):
                store(words, words[i] ^ constant(mask, "uint32"), i)
            emit("st.shared.v4.u32", self._own_part(start, turn), *of_part)

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

    def _ask_scales(self, chunk: Expr, start: Expr, group: int) -> None:
        per_row = 32 * max(1, 64 // group)
        with when(self._place.thread < TILE_ROWS * per_row // PART):
            part = self._place.thread
            row, offset = part * PART // per_row, part * PART % per_row
            first = (self._place.x * TILE_ROWS + row) * self._layout.groups + chunk * 64 // group
            source = self._arrays["ws"].ptr_to([first * 32 + offset])
            emit(
                "cp.async.cg.shared.global",
                self._memory.ptr_to([start + part * PART]),
                source,
                PART,
            )

"""Products of many tokens, through shared memory: 128 columns times 16, 64 or 128 tokens a block.

A ring of stages holds chunks of 128 bytes of K: one is multiplied while `cp.async` brings others.

    wait for stage c; barrier; ask for chunk c + stages - 1; multiply chunk c

The barrier also says that all warps are done with chunk c - 1, whose place the asked chunk takes.
Each of four warps has 32 columns and all tokens: weights are made into operands once.  Results pass
through shared memory too, so that they are stored, and extra operands read, along rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from qcompiler.ir.region import Region
from qcompiler.targets.cuda.conv import ConvStages
from qcompiler.targets.cuda.conv_finish import conv_finish_of
from qcompiler.targets.cuda.device import (
    Expr,
    Place,
    barrier,
    ceildiv,
    constant,
    emit,
    kernel,
    let,
    loop,
    minimum,
    registers,
    reinterpret,
    shared,
    store,
    unrolled,
    view,
    when,
)
from qcompiler.targets.cuda.finish import Finish, pointers_of
from qcompiler.targets.cuda.packing import COLUMN_MULTIPLE, CONVS, SCALES_BYTES, TILE_BYTES, packing
from qcompiler.targets.cuda.plan import (
    CHUNK_BYTES,
    TILE_THREADS,
    chunks_of,
    groups_of_chunk,
    shared_bytes,
    stage_bytes,
)
from qcompiler.targets.cuda.products import STEPS, Product, offsets_of
from qcompiler.targets.cuda.shapes import Roles, Tile
from qcompiler.targets.cuda.stages import PART, TILE_ROWS, Stages

__all__ = ["Sums", "finish_rows", "pointers_of_tile", "tile_kernel"]


def tile_kernel(region: Region, shape: Tile, product: Product, sums_type: type[Sums]) -> Any:
    """The kernel that computes tiles of `shape.rows` tokens, or pixels."""
    is_conv = region.anchor in CONVS
    stages_type = ConvStages if is_conv else Stages
    finish_type = conv_finish_of(region, shape.splits > 1) if is_conv else Finish
    pointers = pointers_of_tile(region, product, split=shape.splits > 1)
    chunks = chunks_of(region)
    per_split = -(-chunks // shape.splits)

    def body(arrays: Mapping[str, Expr], rows: Expr, place: Place) -> None:
        memory = shared(shared_bytes(region, shape), align=1024)
        stages = stages_type(region, shape, product, arrays, rows, place, memory)
        sums = sums_type(region, shape, product, place, memory)
        begin = let(place.z * per_split)
        end = let(minimum(begin + per_split, chunks))
        for ahead in range(shape.stages - 1):
            with when(begin + ahead < end):
                stages.ask(begin + ahead, constant(ahead))
            emit("cp.async.commit_group")
        with loop(0, end - begin) as turn:
            emit("cp.async.wait_group", shape.stages - 2)
            sums.prepare()
            barrier()
            with when(begin + turn + (shape.stages - 1) < end):
                asked = begin + turn + (shape.stages - 1)
                stages.ask(asked, (turn + (shape.stages - 1)) % shape.stages)
            emit("cp.async.commit_group")
            sums.add_chunk(let(turn % shape.stages))
        barrier()
        split = place.z if shape.splits > 1 else None
        finish_rows(sums, shape.rows, place, memory, finish_type(region, arrays, rows, split))

    blocks = -(-region.size("N") // COLUMN_MULTIPLE)
    grid = (blocks, shape.rows, shape.splits)
    return kernel(
        pointers,
        lambda rows: (grid[0], ceildiv(rows, grid[1]), grid[2]),
        TILE_THREADS,
        body,
        sizes=("height", "width") if is_conv else (),
        is_tall=is_conv and shape.splits == 1,
    )


def pointers_of_tile(region: Region, product: Product, split: bool) -> dict[str, str]:
    """The arrays that a kernel gets."""
    scales = {"ws": "uint8"} if "G" in dict(region.sizes) else {}
    return {product.activation: "uint8", "w": "uint8", **scales, **pointers_of(region, split)}


@dataclasses.dataclass(frozen=True)
class _Scales:
    """Two words per side and group of a lane's two columns: their scales, in both halves of each.

    And, of weights with zero points, the two of `offsets_of`.
    """

    scales: list[Expr]
    offsets: list[Expr]


class Sums:
    """What a warp adds up: 32 columns times all tokens of the tile.

    Attributes:
        sides: Tiles of 16 columns that a warp has.
    """

    sides = 2

    def __init__(
        self, region: Region, shape: Tile | Roles, product: Product, place: Place, memory: Expr
    ) -> None:
        self._product, self._shape = product, shape
        self._place, self._memory = place, memory
        self._bytes = stage_bytes(region, shape.rows)
        self._groups, self._record = groups_of_chunk(region), packing(region).record_bytes
        self._tokens = shape.rows // 8
        count = self.sides * self._tokens * 4
        self.totals = registers(self._product.register, count)
        self._product.clear(self.totals, count)

    def prepare(self) -> None:
        """What each thread does when what it asked for is there."""

    def tile_row(self, side: int) -> Expr:
        """Which of the block's eight tiles of 16 columns a warp has on a side."""
        return self._place.warp * 2 + side

    def add_chunk(self, stage: Expr) -> None:
        """Add the products of a chunk in shared memory."""
        start = let(stage * self._bytes)
        words, scales = self._load_weights(let(start + self._shape.rows * CHUNK_BYTES))
        if self._product.is_rough:
            with unrolled(self._tokens // 2) as pair:
                self._add_rough(words, scales, start, pair)
            return
        for step in range(STEPS):
            fragments = [self._fragment(words, side, step, scales) for side in range(2)]
            with unrolled(self._tokens // 2) as pair:
                places = [4 * (side * self._tokens + pair * 2) for side in range(2)]
                self._add_pair(self.totals, places, fragments, start, step, pair)

    def _add_rough(self, words: Expr, scales: _Scales, start: Expr, pair: Expr) -> None:
        """Add the products of a chunk with 16 tokens, summed apart first."""
        sums = registers(self._product.register, 16)
        self._product.clear(sums, 16)
        for step in range(STEPS):
            fragments = [self._fragment(words, side, step, scales) for side in range(2)]
            self._add_pair(sums, [constant(0), constant(8)], fragments, start, step, pair)
        for side in range(2):
            first = 4 * (side * self._tokens + pair * 2)
            for i in range(8):
                store(self.totals, self.totals[first + i] + sums[8 * side + i], first + i)

    def _load_weights(self, weights: Expr) -> tuple[Expr, _Scales]:
        """What a lane holds of its two tiles' weights, and of their scales."""
        words = registers("uint32", self.sides * 4 * self._product.tiles)
        for side in range(self.sides):
            for tile in range(self._product.tiles):
                index = side * self._product.tiles + tile
                row = self.tile_row(side)
                tile_start = weights + (row * self._product.tiles + tile) * TILE_BYTES
                source = self._memory.ptr_to([tile_start + self._place.lane * PART])
                emit("ld.shared.v4.u32", *(words[4 * index + i] for i in range(4)), source)
        return words, self._load_scales(weights)

    def _fragment(self, words: Expr, side: int, step: int, scales: _Scales) -> list[Expr]:
        per_side = 4 * self._product.tiles
        of_side = [words[side * per_side + i] for i in range(per_side)]
        if not self._groups:
            return list(self._product.fragment(of_side, step))
        first = 2 * (side * self._groups + step * self._groups // STEPS)
        fragment = self._product.fragment(of_side, step, scales.offsets[first : first + 2])
        scaled = registers("uint32", 4)
        for i in range(4):
            emit("mul.f16x2", scaled[i], fragment[i], scales.scales[first + i % 2])
        return [scaled[i] for i in range(4)]

    def _load_scales(self, weights: Expr) -> _Scales:
        if not self._groups:
            return _Scales([], [])
        count = 2 * self.sides * self._groups
        has_offsets = self._record > SCALES_BYTES
        scales, pair = registers("uint32", count), registers("uint32", 1)
        offsets, zeros = registers("uint32", count if has_offsets else 1), registers("uint16", 1)
        for i in range(self.sides * self._groups):
            side, group = divmod(i, self._groups)
            record = (self.tile_row(side) * self._groups + group) * self._record
            start = let(weights + TILE_ROWS * TILE_BYTES + record)
            columns = self._place.lane // 4
            emit("ld.shared.u32", pair[0], self._memory.ptr_to([start + columns * 4]))
            for half, order in enumerate((0x1010, 0x3232)):
                index, selector = 2 * i + half, constant(order, "uint32")
                emit("prmt.b32", scales[index], pair[0], pair[0], selector)
            if has_offsets:
                source = self._memory.ptr_to([start + SCALES_BYTES + columns * 2])
                emit("ld.shared.u16", zeros[0], source)
                offsets_of(offsets, 2 * i, zeros[0])
        used = [offsets[i] for i in range(count)] if has_offsets else []
        return _Scales([scales[i] for i in range(count)], used)

    def _add_pair(
        self, sums: Expr, places: list[Expr], fragments: list[list[Expr]], start: Expr, step: int,
        pair: Expr,
    ) -> None:  # fmt: skip
        """Add the products with 16 tokens, of each side from its place in `sums` on."""
        lane = self._place.lane
        row = pair * 16 + lane // 16 * 8 + lane % 8
        part = (step * 2 + lane // 8 % 2) ^ (lane % 8)
        source = self._memory.ptr_to([start + row * CHUNK_BYTES + part * PART])
        tokens = registers("uint32", 4)
        instruction = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
        emit(instruction, *(tokens[i] for i in range(4)), source)
        operands = [self._product.operand([tokens[i], tokens[i + 1]]) for i in (0, 2)]
        for place, fragment in zip(places, fragments, strict=True):
            for half, operand in enumerate(operands):
                self._product.multiply(sums, place + 4 * half, fragment, operand)


def finish_rows(
    sums: Sums, rows: int, place: Place, memory: Expr, finish: Finish,
    threads: int = TILE_THREADS, wait: Callable[[], None] = barrier,
) -> None:  # fmt: skip
    """Lay the sums out in rows and store them; `wait` is for all of the `threads` that do so."""
    totals = sums.totals
    dtype = "float32" if totals.dtype == "float32" else "int32"
    results = view(memory, dtype, rows * finish.pitch)
    for side in range(sums.sides):
        with unrolled(rows // 8) as tokens:
            for i in range(4):
                column = sums.tile_row(side) * 16 + i // 2 * 8 + place.lane // 4
                token = tokens * 8 + place.lane % 4 * 2 + i % 2
                total = totals[4 * (side * (rows // 8) + tokens) + i]
                store(results, reinterpret(dtype, total), token * finish.pitch + column)
    wait()
    finish.tile(results, rows, place, threads)

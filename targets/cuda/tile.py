"""Products of many tokens, through shared memory: 128 columns times 16, 64 or 128 tokens a block.

A ring of stages holds chunks of 128 bytes of K: one is multiplied while `cp.async` brings others.

    wait for stage c; barrier; ask for chunk c + stages - 1; multiply chunk c

The barrier also says that all warps are done with chunk c - 1, whose place the asked chunk takes.
Each of four warps has 32 columns and all tokens: weights are made into operands once.  Results pass
through shared memory too, so that they are stored, and extra operands read, along rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.ir.region import Region
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
    minimum,
    registers,
    reinterpret,
    shared,
    store,
    store_vector,
    unrolled,
    vector,
    view,
    when,
)
from qcompiler.targets.cuda.finish import Finish, pointers_of
from qcompiler.targets.cuda.packing import COLUMN_MULTIPLE, TILE_BYTES
from qcompiler.targets.cuda.plan import (
    CHUNK_BYTES,
    RESULT_PITCH,
    TILE_THREADS,
    Tile,
    chunks_of,
    shared_bytes,
    stage_bytes,
)
from qcompiler.targets.cuda.products import STEPS, Product
from qcompiler.targets.cuda.stages import PART, TILE_ROWS, Stages

__all__ = ["Sums", "tile_kernel"]


def tile_kernel(region: Region, shape: Tile, product: Product, sums_type: type[Sums]) -> Any:
    """The kernel that computes tiles of `shape.rows` tokens."""
    pointers = {
        product.activation: "uint8",
        "w": "uint8",
        **({"ws": "uint8"} if "G" in dict(region.sizes) else {"s": "float32", "ws": "float32"}),
        **pointers_of(region, split=shape.splits > 1),
    }
    chunks = chunks_of(region)
    per_split = -(-chunks // shape.splits)

    def body(arrays: Mapping[str, Expr], rows: Expr, place: Place) -> None:
        memory = shared(shared_bytes(region, shape), align=1024)
        stages = Stages(region, shape, product, arrays, rows, place, memory)
        sums = sums_type(region, shape, product, place, memory)
        begin = let(place.z * per_split)
        end = let(minimum(begin + per_split, chunks))
        for ahead in range(shape.stages - 1):
            with when(begin + ahead < end):
                stages.ask(begin + ahead, constant(ahead))
            emit("cp.async.commit_group")
        with loop(0, end - begin) as turn:
            emit("cp.async.wait_group", shape.stages - 2)
            sums.prepare(stages, turn % shape.stages)
            barrier()
            with when(begin + turn + (shape.stages - 1) < end):
                asked = begin + turn + (shape.stages - 1)
                stages.ask(asked, (turn + (shape.stages - 1)) % shape.stages)
            emit("cp.async.commit_group")
            sums.add_chunk(let(turn % shape.stages))
        barrier()
        split = place.z if shape.splits > 1 else None
        _finish(sums, shape, place, memory, Finish(region, arrays, rows, split))

    blocks = -(-region.size("N") // COLUMN_MULTIPLE)
    grid = (blocks, shape.rows, shape.splits)
    return kernel(
        pointers, lambda rows: (grid[0], ceildiv(rows, grid[1]), grid[2]), TILE_THREADS, body
    )


class Sums:
    """What a warp adds up: 32 columns times all tokens of the tile."""

    def __init__(
        self, region: Region, shape: Tile, product: Product, place: Place, memory: Expr
    ) -> None:
        self._product, self._shape = product, shape
        self._place, self._memory = place, memory
        self._bytes = stage_bytes(region, shape.rows)
        self._group = dict(region.sizes).get("G")
        self._tokens = shape.rows // 8
        count = 2 * self._tokens * 4
        self.totals = registers(self._product.register, count)
        self._product.clear(self.totals, count)

    def prepare(self, stages: Stages, stage: Expr) -> None:
        """What each thread does with what it asked for, once it is there."""

    def tile_row(self, side: int) -> Expr:
        """Which of the block's eight tiles of 16 columns a warp has as one of its two."""
        return self._place.warp * 2 + side

    def add_chunk(self, stage: Expr) -> None:
        """Add the products of a chunk in shared memory."""
        start = let(stage * self._bytes)
        words, scales = self._load_weights(let(start + self._shape.rows * CHUNK_BYTES))
        for step in range(STEPS):
            fragments = [self._fragment(words, side, step, scales) for side in range(2)]
            with unrolled(self._tokens // 2) as pair:
                self._add_pair(fragments, start, step, pair)

    def _load_weights(self, weights: Expr) -> tuple[Expr, Expr]:
        """What a lane holds of its two tiles' weights, and of their scales."""
        words = registers("uint32", 2 * 4 * self._product.tiles)
        for side in range(2):
            for tile in range(self._product.tiles):
                index = side * self._product.tiles + tile
                row = self.tile_row(side)
                tile_start = weights + (row * self._product.tiles + tile) * TILE_BYTES
                source = self._memory.ptr_to([tile_start + self._place.lane * PART])
                emit("ld.shared.v4.u32", *(words[4 * index + i] for i in range(4)), source)
        return words, self._load_scales(weights)

    def _fragment(self, words: Expr, side: int, step: int, scales: Expr) -> list[Expr]:
        per_side = 4 * self._product.tiles
        of_side = [words[side * per_side + i] for i in range(per_side)]
        fragment = list(self._product.fragment(of_side, step))
        if scales is None or self._group is None:
            return fragment
        groups = max(1, 64 // self._group)
        first = 2 * (side * groups + step * groups // STEPS)
        scaled = registers("uint32", 4)
        for i in range(4):
            emit("mul.f16x2", scaled[i], fragment[i], scales[first + i % 2])
        return [scaled[i] for i in range(4)]

    def _load_scales(self, weights: Expr) -> Expr:
        """Per side and group, the scales of the lane's two columns, each in both halves."""
        if self._group is None:
            return None
        groups = max(1, 64 // self._group)
        start = weights + TILE_ROWS * TILE_BYTES
        scales, pair = registers("uint32", 4 * groups), registers("uint32", 1)
        for side in range(2):
            for group in range(groups):
                row = self.tile_row(side) * groups + group
                source = self._memory.ptr_to([start + row * 32 + self._place.lane // 4 * 4])
                emit("ld.shared.u32", pair[0], source)
                for half, order in enumerate((0x1010, 0x3232)):
                    index = 2 * (side * groups + group) + half
                    emit("prmt.b32", scales[index], pair[0], pair[0], constant(order, "uint32"))
        return scales

    def _add_pair(self, fragments: list[list[Expr]], start: Expr, step: int, pair: Expr) -> None:
        """Add the products with 16 tokens."""
        lane = self._place.lane
        row = pair * 16 + lane // 16 * 8 + lane % 8
        part = (step * 2 + lane // 8 % 2) ^ (lane % 8)
        source = self._memory.ptr_to([start + row * CHUNK_BYTES + part * PART])
        tokens = registers("uint32", 4)
        instruction = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
        emit(instruction, *(tokens[i] for i in range(4)), source)
        operands = [self._product.operand([tokens[i], tokens[i + 1]]) for i in (0, 2)]
        for side, fragment in enumerate(fragments):
            for half, operand in enumerate(operands):
                first = 4 * (side * self._tokens + pair * 2 + half)
                self._product.multiply(self.totals, first, fragment, operand)


def _finish(sums: Sums, shape: Tile, place: Place, memory: Expr, finish: Finish) -> None:
    """Lay the sums out in rows and store them."""
    results = view(memory, "float32", shape.rows * RESULT_PITCH)
    totals = sums.totals
    dtype = "float32" if totals.dtype == "float32" else "int32"
    for side in range(2):
        with unrolled(shape.rows // 8) as tokens:
            for i in range(4):
                column = sums.tile_row(side) * 16 + i // 2 * 8 + place.lane // 4
                token = tokens * 8 + place.lane % 4 * 2 + i % 2
                total = totals[4 * (side * (shape.rows // 8) + tokens) + i]
                value = cast("float32", reinterpret(dtype, total))
                store(results, value, token * RESULT_PITCH + column)
    barrier()
    values = registers("float32", 4)
    with loop(0, shape.rows * COLUMN_MULTIPLE // 4 // TILE_THREADS) as turn:
        quad = let(turn * TILE_THREADS + place.thread)
        row, column = let(quad // 32), let(quad % 32 * 4)
        loaded = vector(results, row * RESULT_PITCH + column, "float32", 4)
        store_vector(values, loaded, constant(0), 4)
        finish.quad(place.y * shape.rows + row, place.x * COLUMN_MULTIPLE + column, values)

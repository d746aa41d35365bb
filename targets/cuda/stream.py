"""Products of at most 8 tokens: the time is that of reading the weights once.

A block has 16 columns.  Its warps divide K; a lane loads what it will multiply itself, 16 bytes of
weights at a time and as many of them as `batch` says before it needs the first, and 4 bytes of each
token per step.  The warps' sums meet in shared memory.  One launch, no workspace: at 4096 x 4096 a
second launch would cost as much as all of the reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.ir.region import Region
from qcompiler.targets.cuda.device import (
    Expr,
    Place,
    barrier,
    constant,
    emit,
    half_of,
    kernel,
    let,
    loop,
    minimum,
    registers,
    reinterpret,
    shared,
    store,
    view,
    when,
)
from qcompiler.targets.cuda.finish import Finish, pointers_of
from qcompiler.targets.cuda.packing import SCALES_BYTES, TILE_BYTES, packing
from qcompiler.targets.cuda.plan import (
    CHUNK_BYTES,
    STREAM_COLUMNS,
    STREAM_ROWS,
    activation_bytes,
    chunks_of,
)
from qcompiler.targets.cuda.products import STEPS, Product, offsets_of
from qcompiler.targets.cuda.rows import is_aligned, load_word
from qcompiler.targets.cuda.shapes import Stream

__all__ = ["stream_kernel"]

_STEP_BYTES = CHUNK_BYTES // STEPS
_RESULTS = STREAM_ROWS * STREAM_COLUMNS


def stream_kernel(region: Region, shape: Stream, product: Product) -> Any:
    """The kernel for M <= 8."""
    pointers = {
        product.activation: "uint8",
        "w": "uint8",
        **({"ws": "uint8"} if "G" in dict(region.sizes) else {}),
        **pointers_of(region, split=False),
    }

    def body(arrays: Mapping[str, Expr], rows: Expr, place: Place) -> None:
        sums = _Sums(region, shape, product, arrays, rows, place)
        batches = -(-sums.chunks // shape.batch)
        per_warp = -(-batches // shape.warps)
        with loop(0, per_warp) as batch:
            sums.add_batch(let((place.warp * per_warp + batch) * shape.batch))
        _reduce(sums.totals, shape.warps, place, Finish(region, arrays, rows))

    blocks = -(-region.size("N") // STREAM_COLUMNS)
    return kernel(pointers, lambda rows: (blocks, 1, 1), shape.warps * 32, body)


class _Sums:
    """What a warp adds up: 16 columns times 8 tokens, four sums per lane."""

    def __init__(
        self,
        region: Region,
        shape: Stream,
        product: Product,
        arrays: Mapping[str, Expr],
        rows: Expr,
        place: Place,
    ) -> None:
        self._product = product
        self._shape, self._arrays, self._rows, self._place = shape, arrays, rows, place
        self._row_bytes = region.size("K") * activation_bytes(region)
        self._layout = packing(region)
        self.chunks = chunks_of(region)
        # Steps that share a group's scales: at most a batch, even of larger groups.
        self._steps_of_group = 0
        self._group = None
        if self._layout.bits == 4:
            steps = STEPS * shape.batch
            self._group = region.size("G") if self._layout.groups > 1 else None
            self._steps_of_group = min(steps, (self._group or steps * 16) // 16)
        # Whether all chunks that warps get exist, and are whole.
        self._whole = self.chunks % (shape.batch * shape.warps) == 0
        self._whole &= self._row_bytes % CHUNK_BYTES == 0
        self.totals = registers(self._product.register, 4)
        self._product.clear(self.totals, 4)

    def add_batch(self, first: Expr) -> None:
        """Add the products of the chunks from `first`; all loads come before the first use."""
        batch, product = self._shape.batch, self._product
        words = registers("uint32", 4 * product.tiles * batch)
        for chunk in range(batch):
            for tile in range(product.tiles):
                self._load_tile(words, chunk * product.tiles + tile, first, chunk, tile)
        scales, offsets = self._load_scales(first)
        tokens = registers("uint32", 2 * STEPS * batch)
        for chunk in range(batch):
            self._load_tokens(tokens, 2 * STEPS * chunk, first + chunk)
        for step in range(batch * STEPS):
            start = 4 * product.tiles * (step // STEPS)
            of_chunk = [words[start + i] for i in range(4 * product.tiles)]
            operand = product.operand([tokens[2 * step], tokens[2 * step + 1]])
            if not self._steps_of_group:
                fragment = product.fragment(of_chunk, step % STEPS)
                self._add_plain(step % STEPS, fragment, operand)
                continue
            group, in_group = divmod(step, self._steps_of_group)
            of_group = offsets[2 * group : 2 * group + 2]
            fragment = product.fragment(of_chunk, step % STEPS, of_group)
            self._add_scaled(in_group, fragment, operand, scales[group])

    def _add_plain(self, step: int, weights: list[Expr], tokens: list[Expr]) -> None:
        """Add the product of a step, rough sums with the last of a chunk."""
        if not self._product.is_rough:
            self._product.multiply(self.totals, 0, weights, tokens)
            return
        if step == 0:
            self._of_chunk = registers(self._product.register, 4)
            self._product.clear(self._of_chunk, 4)
        self._product.multiply(self._of_chunk, 0, weights, tokens)
        if step + 1 == STEPS:
            for i in range(4):
                store(self.totals, self.totals[i] + self._of_chunk[i], i)

    def _add_scaled(self, step: int, weights: list[Expr], tokens: list[Expr], pair: Expr) -> None:
        """Add the product of one of a group's steps; the last scales their sum."""
        if step == 0:
            self._of_group = registers("float32", 4)
            self._product.clear(self._of_group, 4)
        self._product.multiply(self._of_group, 0, weights, tokens)
        if step + 1 == self._steps_of_group:
            halves = [half_of(pair, half) for half in range(2)]
            for i in range(4):
                scaled = self._of_group[i] * halves[i // 2]
                store(self.totals, self.totals[i] + scaled, i)

    def _load_tile(self, words: Expr, index: int, first: Expr, chunk: int, tile: int) -> None:
        product, place = self._product, self._place
        # What does not exist is multiplied by tokens that count as zeros.
        existing = first + chunk if self._whole else minimum(first + chunk, self.chunks - 1)
        tiles = self._layout.depth // self._layout.tile_depth
        start = (place.x * tiles + existing * product.tiles + tile) * TILE_BYTES
        emit(
            "ld.global.nc.L1::no_allocate.v4.u32",
            *(words[4 * index + i] for i in range(4)),
            self._arrays["w"].ptr_to([start + place.lane * 16]),
        )

    def _load_scales(self, first: Expr) -> tuple[Expr, list[Expr]]:
        """Per group of a batch, the scales of the lane's two columns as one word, and offsets."""
        if not self._steps_of_group:
            return None, []
        count = STEPS * self._shape.batch // self._steps_of_group
        scales, pairs = registers("uint32", count), registers("uint16", count)
        record, pair = self._layout.record_bytes, self._place.lane // 4
        has_offsets = record > SCALES_BYTES
        base = let(first * 64 // self._group) if self._group is not None else 0
        for i in range(count):
            group = base + i if self._whole else minimum(base + i, self._layout.groups - 1)
            start = let((self._place.x * self._layout.groups + group) * record)
            array = self._arrays["ws"]
            emit("ld.global.nc.u32", scales[i], array.ptr_to([start + pair * 4]))
            if has_offsets:
                zeros = array.ptr_to([start + SCALES_BYTES + pair * 2])
                emit("ld.global.nc.u16", pairs[i], zeros)
        if not has_offsets:
            return scales, []
        offsets = registers("uint32", 2 * count)
        for i in range(count):
            offsets_of(offsets, 2 * i, pairs[i])
        return scales, [offsets[i] for i in range(2 * count)]

    def _load_tokens(self, tokens: Expr, index: int, chunk: Expr) -> None:
        lane = self._place.lane
        array = self._arrays[self._product.activation]
        for half in range(2 * STEPS):
            offset = let(chunk * CHUNK_BYTES + half * _STEP_BYTES // 2 + lane % 4 * 4)
            if not is_aligned(self._row_bytes, 4):
                token = minimum(lane // 4, self._rows - 1)  # its products are not stored
                load_word(tokens, index + half, array, token, offset, self._row_bytes)
                continue
            exists = lane // 4 < self._rows
            if not self._whole:
                exists = exists & (offset < self._row_bytes)
            store(tokens, constant(0, "uint32"), index + half)
            with when(exists):
                source = array.ptr_to([lane // 4 * self._row_bytes + offset])
                emit("ld.global.nc.u32", tokens[index + half], source)


def _reduce(totals: Expr, warps: int, place: Place, finish: Finish) -> None:
    """Add the sums of the warps and store them."""
    dtype = "float32" if totals.dtype == "float32" else "int32"
    partial = view(shared(warps * _RESULTS * 4), dtype, warps * _RESULTS)
    for i in range(4):
        token, column = place.lane % 4 * 2 + i % 2, place.lane // 4 + 8 * (i // 2)
        index = place.warp * _RESULTS + token * STREAM_COLUMNS + column
        store(partial, reinterpret(dtype, totals[i]), index)
    barrier()
    threads = warps * 32
    with loop(0, -(-_RESULTS // threads)) as turn:
        result = let(turn * threads + place.thread)
        with when(result < _RESULTS):
            total = registers(dtype, 1)
            store(total, constant(0, dtype), 0)
            for warp in range(warps):
                store(total, total[0] + partial[warp * _RESULTS + result], 0)
            column = place.x * STREAM_COLUMNS + result % STREAM_COLUMNS
            finish.element(result // STREAM_COLUMNS, column, total[0])

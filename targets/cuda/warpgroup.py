"""The tiles of `tile.py` multiplied by `wgmma`, which sm_90 needs to come near its peak.

A warpgroup is the block's four warps.  Weights are the operand of 64 rows, in registers: a lane
holds the same of 16 columns as for `mma.sync`.  Tokens are the other operand, in shared memory as
`cp.async` left them.  `wgmma` reads that memory another way than threads write it, so each thread
fences what it brought before the barrier.  Nothing else of a block runs while it multiplies; the
other blocks of the multiprocessor do.
"""

from __future__ import annotations

import itertools

from qcompiler.ir.region import Region
from qcompiler.targets.cuda.device import (
    Expr,
    Place,
    constant,
    emit,
    let,
    registers,
    shared_address,
    store,
    unrolled,
)
from qcompiler.targets.cuda.plan import CHUNK_BYTES
from qcompiler.targets.cuda.products import STEPS, Product
from qcompiler.targets.cuda.shapes import Roles, Tile
from qcompiler.targets.cuda.tile import Sums

__all__ = ["WarpgroupSums"]

_SWIZZLE_128 = 1 << 62
_EIGHT_ROWS = CHUNK_BYTES * 8 // 16 << 32
"""From eight rows to the next, in units of 16 bytes."""
_UNUSED = 1 << 16
"""What a swizzled operand says for the distance that it has no use for."""


class WarpgroupSums(Sums):
    """What a warpgroup adds up: twice 64 columns times all tokens of the tile."""

    def __init__(
        self, region: Region, shape: Tile | Roles, product: Product, place: Place, memory: Expr
    ) -> None:
        super().__init__(region, shape, product, place, memory)
        # One wgmma takes 64 columns and some of the tokens.
        self._tokens_at_once = min(128, shape.rows)
        self._parts = shape.rows // self._tokens_at_once
        self._of_part = self._tokens_at_once // 2

    def tile_row(self, side: int) -> Expr:
        """Each warp has a quarter of each side's 64 columns."""
        return side * 4 + self._place.warp

    def prepare(self) -> None:
        """Let `wgmma` see what this thread brought."""
        emit("fence.proxy.async.shared::cta")

    def add_chunk(self, stage: Expr) -> None:
        """Add the products of a chunk in shared memory."""
        start = let(stage * self._bytes)
        words, scales = self._load_weights(let(start + self._shape.rows * CHUNK_BYTES))
        fragments = [
            [self._fragment(words, side, step, scales) for side in range(self.sides)]
            for step in range(STEPS)
        ]
        totals = self.totals
        is_rough = self._product.is_rough
        if is_rough:
            totals = registers("float32", self.sides * self._parts * self._of_part)
        emit("wgmma.fence.sync.aligned")
        for step, part in itertools.product(range(STEPS), range(self._parts)):
            first_row = part * self._tokens_at_once
            tokens = self._descriptor(
                start + first_row * CHUNK_BYTES + step * (CHUNK_BYTES // STEPS)
            )
            for side, fragment in enumerate(fragments[step]):
                first = (side * self._parts + part) * self._of_part
                sums = [totals[first + i] for i in range(self._of_part)]
                adds = not (is_rough and step == 0)
                self._product.multiply_group(self._tokens_at_once, sums, fragment, tokens, adds)
        emit("wgmma.commit_group.sync.aligned")
        emit("wgmma.wait_group.sync.aligned", 0)
        if is_rough:
            with unrolled(self.sides * self._parts * self._of_part) as i:
                store(self.totals, self.totals[i] + totals[i], i)

    def _descriptor(self, start: Expr) -> Expr:
        """Rows of 128 bytes, swizzled, from a byte of shared memory."""
        address = shared_address(self._memory.ptr_to([start]))
        units = (address >> constant(4, "uint64")) & constant(0x3FFF, "uint64")
        return let(units | constant(_SWIZZLE_128 | _EIGHT_ROWS | _UNUSED, "uint64"))

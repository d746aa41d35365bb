"""Products of very many tokens on sm_90: some warps bring what others multiply.

A block has three warpgroups.  The first copies chunks of K into a ring of stages, by `cp.async`.
The two others have 64 columns each and all tokens of the tile, and while one makes weights into
operands, the tensor cores have the other's products.  Every stage has two mbarriers:

    producer   wait until `empty`; ask for chunk c; wait for chunk c - ahead: arrive at its `full`
    consumers  wait until `full`; multiply; arrive at `empty`

A stage is used again and again; the n-th use waits for `full` of parity n % 2, and for `empty` of
the other, which a new mbarrier takes for over.  `wgmma` must see what threads wrote: the producer
fences what it brought before it arrives.  Registers that it does not need go to the consumers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qcompiler.ir.region import Region
from qcompiler.targets.cuda.device import (
    Expr,
    Place,
    barrier,
    barrier_of,
    ceildiv,
    constant,
    emit,
    kernel,
    let,
    loop,
    shared,
    view,
    wait_phase,
    warp_barrier,
    when,
)
from qcompiler.targets.cuda.finish import Finish
from qcompiler.targets.cuda.packing import COLUMN_MULTIPLE
from qcompiler.targets.cuda.plan import TILE_THREADS, chunks_of, shared_bytes
from qcompiler.targets.cuda.products import Product
from qcompiler.targets.cuda.shapes import Roles
from qcompiler.targets.cuda.stages import Stages
from qcompiler.targets.cuda.tile import finish_rows, pointers_of_tile
from qcompiler.targets.cuda.warpgroup import WarpgroupSums

__all__ = ["roles_kernel"]

_CONSUMERS = 2 * TILE_THREADS
_WARPS = TILE_THREADS // 32
"""Of a warpgroup; one lane of each arrives, when all have."""
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, 232
"""Of the 65536: 128 times 40 and 256 times 232 are 64512, what 384 threads of 168 have."""


def roles_kernel(region: Region, shape: Roles, product: Product) -> Any:
    """The kernel that computes tiles of `shape.rows` tokens."""
    size = shared_bytes(region, shape)

    def body(arrays: Mapping[str, Expr], rows: Expr, place: Place) -> None:
        memory = shared(size, align=1024)
        ring = _Ring(shape.stages, view(memory, "uint64", size // 8), size // 8)
        with when(place.thread == 0):
            ring.begin()
        barrier()
        own = dataclasses.replace(
            place, thread=let(place.thread % TILE_THREADS), warp=let(place.warp % _WARPS)
        )
        with when(place.thread < TILE_THREADS):
            emit("setmaxnreg.dec.sync.aligned.u32", _PRODUCER_REGISTERS)
            stages = Stages(region, shape, product, arrays, rows, own, memory)
            _produce(stages, ring, chunks_of(region), place.lane)
        with when(place.thread >= TILE_THREADS):
            emit("setmaxnreg.inc.sync.aligned.u32", _CONSUMER_REGISTERS)
            group = let(place.thread // TILE_THREADS - 1)
            sums = _HalfOfColumns(region, shape, product, own, memory, group)
            _consume(sums, ring, place.lane, chunks_of(region))
            barrier_of(_CONSUMERS)
            worker = dataclasses.replace(own, thread=let(place.thread - TILE_THREADS))
            finish = Finish(region, arrays, rows)
            finish_rows(
                sums, shape.rows, worker, memory, finish, _CONSUMERS, lambda: barrier_of(_CONSUMERS)
            )

    blocks = -(-region.size("N") // COLUMN_MULTIPLE)
    pointers = pointers_of_tile(region, product, split=False)
    grid = lambda rows: (blocks, ceildiv(rows, shape.rows), 1)  # noqa: E731
    return kernel(pointers, grid, TILE_THREADS + _CONSUMERS, body)


class _HalfOfColumns(WarpgroupSums):
    """What one of two warpgroups adds up: 64 columns times all tokens."""

    sides = 1

    def __init__(
        self, region: Region, shape: Roles, product: Product, place: Place, memory: Expr,
        group: Expr,
    ) -> None:  # fmt: skip
        super().__init__(region, shape, product, place, memory)
        self._half = group

    def tile_row(self, side: int) -> Expr:
        """Each warp has a quarter of them."""
        return self._half * _WARPS + self._place.warp


class _Ring:
    """The mbarriers of the stages, behind them in shared memory: all `full`, then all `empty`."""

    def __init__(self, stages: int, words: Expr, end: int) -> None:
        self.stages, self._words, self._first = stages, words, end - 2 * stages

    def begin(self) -> None:
        """Make them, by one thread."""
        for i in range(2 * self.stages):
            arrivals = _WARPS if i < self.stages else 2 * _WARPS
            target = self._words.ptr_to([self._first + i])
            emit("mbarrier.init.shared::cta.b64", target, constant(arrivals, "uint32"))
        emit("fence.mbarrier_init.release.cluster")

    def wait_full(self, chunk: Expr) -> None:
        """Wait until a chunk is there."""
        wait_phase(self._full(chunk), chunk // self.stages % 2)

    def wait_empty(self, chunk: Expr) -> None:
        """Wait until the place of a chunk is free."""
        wait_phase(self._empty(chunk), chunk // self.stages % 2 ^ 1)

    def arrive_full(self, chunk: Expr, lane: Expr) -> None:
        """Say that this warp's part of a chunk is there."""
        _arrive(self._full(chunk), lane)

    def arrive_empty(self, chunk: Expr, lane: Expr) -> None:
        """Say that this warp is done with a chunk."""
        _arrive(self._empty(chunk), lane)

    def _full(self, chunk: Expr) -> Expr:
        return self._words.ptr_to([self._first + chunk % self.stages])

    def _empty(self, chunk: Expr) -> Expr:
        return self._words.ptr_to([self._first + self.stages + chunk % self.stages])


def _arrive(pointer: Expr, lane: Expr) -> None:
    warp_barrier()
    with when(lane == 0):
        emit("mbarrier.arrive.release.cta.shared::cta.b64", pointer, constant(1, "uint32"))


def _produce(stages: Stages, ring: _Ring, chunks: int, lane: Expr) -> None:
    # So many chunks are under way while consumers have two stages to themselves.
    ahead = ring.stages - 2
    with loop(0, chunks + ahead) as turn:
        with when(turn < chunks):
            ring.wait_empty(turn)
            stages.ask(turn, turn % ring.stages)
        emit("cp.async.commit_group")
        with when(turn >= ahead):
            emit("cp.async.wait_group", ahead)
            emit("fence.proxy.async.shared::cta")
            ring.arrive_full(turn - ahead, lane)


def _consume(sums: WarpgroupSums, ring: _Ring, lane: Expr, chunks: int) -> None:
    with loop(0, chunks) as chunk:
        ring.wait_full(chunk)
        sums.add_chunk(let(chunk % ring.stages))
        ring.arrive_empty(chunk, lane)

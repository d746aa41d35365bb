"""Which kernels a region gets: their shapes, and for how many rows each is.

Nothing here imports tvm.  Weights are the 16-row operand of `mma.sync` and tokens its 8 columns, so
that a few tokens fill a product as well as many.  A step of K is counted in bytes of a row of
activations: one mma takes 32, a *chunk* is 128, which four of them share.

    M <= 8    `Stream`: a block has 16 columns, its warps divide K; each weight is read once,
              straight into the registers of the lane that multiplies it.
    above     `Tile`: 128 columns times 16 to 128 rows, through shared memory.  Where the blocks
              would not fill the device, K is split between several.
"""

from __future__ import annotations

import dataclasses

from qcompiler.ir.region import Region
from qcompiler.targets.cuda.launch import Launch
from qcompiler.targets.cuda.norm_plan import NORMS, norm_launches
from qcompiler.targets.cuda.packing import COLUMN_MULTIPLE, packing

__all__ = [
    "CHUNK_BYTES",
    "RESULT_PITCH",
    "STREAM_COLUMNS",
    "STREAM_ROWS",
    "TILE_THREADS",
    "Stream",
    "Tile",
    "activation_bytes",
    "chunks_of",
    "launches",
    "shapes_of",
    "shared_bytes",
    "stage_bytes",
]

CHUNK_BYTES = 128
STREAM_ROWS = 8
STREAM_COLUMNS = 16
TILE_THREADS = 128
_WARP = 32

_WANTED_BLOCKS = 264
"""Two for each of the 132 multiprocessors of an H100; an A100 has 108, an L40S 142."""
_FEWEST_CHUNKS = 4
"""Of K per split: below, filling the pipeline is most of a block's time."""
_MOST_SHARED = 99 << 10
"""Bytes of shared memory that a block may have on sm_89; the others have more."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """The kernel for a few rows.

    Attributes:
        warps: That divide K.
        batch: Chunks whose loads are under way together in a warp.
    """

    warps: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Tile:
    """A kernel for many rows.

    Attributes:
        rows: Of a block's tile.
        stages: Chunks in shared memory: one is multiplied while the others arrive.
        splits: Parts of K.
    """

    rows: int
    stages: int
    splits: int = 1


Shape = Stream | Tile


def activation_bytes(region: Region) -> int:
    """Bytes of an element of the operand that is not weights."""
    return 2 if region.anchor == "QMatMulW4A16" else 1


def chunks_of(region: Region) -> int:
    """Chunks of K, the last perhaps a part."""
    return -(-region.size("K") * activation_bytes(region) // CHUNK_BYTES)


def stage_bytes(region: Region, rows: int) -> int:
    """Shared memory for a chunk of `rows` activations and 128 columns of weights and scales.

    A multiple of 1024, where the swizzle of `wgmma` begins anew.
    """
    layout = packing(region)
    depth = CHUNK_BYTES // activation_bytes(region)
    weights = COLUMN_MULTIPLE * depth * layout.bits // 8
    scales = COLUMN_MULTIPLE * 2 * max(1, depth // region.size("G")) if layout.bits == 4 else 0
    return -(-(rows * CHUNK_BYTES + weights + scales) // 1024) * 1024


def shared_bytes(region: Region, shape: Shape) -> int:
    """Dynamic shared memory of a kernel: its stages, later its results as float32."""
    if isinstance(shape, Stream):
        return shape.warps * STREAM_COLUMNS * STREAM_ROWS * 4
    results = shape.rows * RESULT_PITCH * 4
    return max(shape.stages * stage_bytes(region, shape.rows), results)


RESULT_PITCH = COLUMN_MULTIPLE + 4
"""Floats from one row of results in shared memory to the next: 4 more, for other banks."""


def shapes_of(region: Region) -> list[tuple[int | None, Shape]]:
    """The kernels of a product, each with the largest M it is for."""
    # sm_90 keeps sums of FP8 twice (`warpgroup.py`), and has no registers for those of 128 rows.
    most_rows = 64 if region.anchor == "QMatMulFp8" else 128
    tiles = ((16, 16), (64, 64), (64, 256), (most_rows, None))
    shapes: list[tuple[int | None, Shape]] = [(STREAM_ROWS, _stream(region))]
    shapes += [(most, _tile(region, rows, most)) for rows, most in tiles]
    following = [shape for _, shape in shapes[1:]] + [None]
    return [entry for entry, after in zip(shapes, following, strict=True) if entry[1] != after]


def _stream(region: Region) -> Stream:
    chunks = chunks_of(region)
    most = 4 if region.anchor == "QMatMulW4A16" else 2
    batch = most if chunks >= 8 * most else most // 2
    return Stream(warps=min(8, -(-chunks // batch)), batch=batch)


def _tile(region: Region, rows: int, max_rows: int | None) -> Tile:
    chunks = chunks_of(region)
    stages = min(4, max(2, chunks), _MOST_SHARED // stage_bytes(region, rows))
    if max_rows is None:
        return Tile(rows, stages)
    blocks = -(-region.size("N") // COLUMN_MULTIPLE) * (max_rows // rows)
    wanted = max(1, min(_WANTED_BLOCKS // blocks, chunks // _FEWEST_CHUNKS))
    # So that every split has some chunks.
    per_split = -(-chunks // wanted)
    return Tile(rows, stages, -(-chunks // per_split))


def launches(region: Region) -> tuple[Launch, ...]:
    """The kernels of a region in order of the rows they take."""
    if region.anchor in NORMS:
        return norm_launches(region)
    if "N" not in dict(region.sizes):
        return _quantize_launches(region)
    return tuple(_launch(region, max_rows, shape) for max_rows, shape in shapes_of(region))


def _launch(region: Region, max_rows: int | None, shape: Shape) -> Launch:
    of_anchor = ("x", "w", "ws") if region.anchor == "QMatMulW4A16" else ("q", "s", "w", "ws")
    end = (*(f"extra{i}" for i in range(len(region.extras))), "y")
    is_stream, splits = isinstance(shape, Stream), 1 if isinstance(shape, Stream) else shape.splits
    combines = splits > 1
    return Launch(
        symbol=_symbol(region, shape),
        max_rows=max_rows,
        threads=shape.warps * _WARP if isinstance(shape, Stream) else TILE_THREADS,
        shared_bytes=shared_bytes(region, shape),
        block_rows=STREAM_ROWS if isinstance(shape, Stream) else shape.rows,
        block_columns=STREAM_COLUMNS if is_stream else COLUMN_MULTIPLE,
        splits=splits,
        combine=f"{region.name}_combine{splits}_kernel" if combines else None,
        parameters=_parameters(*of_anchor, *(("workspace",) if combines else end)),
        combine_parameters=_parameters("workspace", *end) if combines else (),
    )


def _symbol(region: Region, shape: Shape) -> str:
    if isinstance(shape, Stream):
        return f"{region.name}_stream_kernel"
    return f"{region.name}_tile{shape.rows}x{shape.splits}_kernel"


def _parameters(*pointers: str) -> tuple[str, ...]:
    """In TVM's order: pointers by name, then the rows."""
    return (*sorted(pointers), "rows")


def _quantize_launches(region: Region) -> tuple[Launch, ...]:
    k = region.size("K")
    threads = max(_WARP, min(256, -(-k // 16 // _WARP) * _WARP))
    one_row = Launch(
        symbol=f"{region.name}_row_kernel",
        max_rows=32768,
        threads=threads,
        shared_bytes=threads // _WARP * 4,
        block_rows=1,
        block_columns=k,
        parameters=("q", "s", "x", "rows"),
    )
    # A grid has at most 65535 blocks in y.
    many = dataclasses.replace(
        one_row, symbol=f"{region.name}_rows_kernel", max_rows=None, block_rows=16
    )
    return one_row, many

"""Which kernels a region gets: their shapes, and for how many rows each is.

Nothing here imports tvm.  Weights are the 16-row operand of `mma.sync` and tokens its 8 columns, so
that a few tokens fill a product as well as many.  A step of K is counted in bytes of a row of
activations: one mma takes 32, a *chunk* is 128, which four of them share.

    M <= 8    `Stream`: a block has 16 columns, its warps divide K; each weight is read once,
              straight into the registers of the lane that multiplies it.
    above     `Tile`: 128 columns times 16 to 128 rows, through shared memory.  Where the blocks
              would not fill the device, K is split between several.
    far above, where such large blocks fill the device, on sm_90a `Roles`: 128 columns times 128 or
              256 rows; some threads bring the chunks that others multiply.
"""

from __future__ import annotations

import itertools

from qcompiler.ir.region import Region
from qcompiler.targets.cuda.image_plan import image_launches
from qcompiler.targets.cuda.launch import Launch, row_launches
from qcompiler.targets.cuda.norm_plan import NORMS, norm_launches
from qcompiler.targets.cuda.packing import (
    COLUMN_MULTIPLE,
    CONV_IMAGE,
    CONVS,
    FOUR_BITS,
    IMAGE,
    TILE_COLUMNS,
    depth_of,
    is_depthwise,
    packing,
)
from qcompiler.targets.cuda.shapes import Channels, Roles, Shape, Stream, Tile

__all__ = [
    "BYTE_PITCH",
    "CHUNK_BYTES",
    "STREAM_COLUMNS",
    "STREAM_ROWS",
    "TILE_THREADS",
    "activation_bytes",
    "chunks_of",
    "groups_of_chunk",
    "launches",
    "result_pitch",
    "results_of",
    "scales_of",
    "shapes_of",
    "shared_bytes",
    "stage_bytes",
]

CHUNK_BYTES = 128
STREAM_ROWS = 8
STREAM_COLUMNS = 16
TILE_THREADS = 128
_WARP = 32

_MULTIPROCESSORS = 132
"""Of an H100; an A100 has 108, an L40S 142."""
_WANTED_BLOCKS = 2 * _MULTIPROCESSORS
_FEWEST_CHUNKS = 4
"""Of K per split: below, filling the pipeline is most of a block's time."""
_MOST_SHARED = 99 << 10
"""Bytes of shared memory that a block may have on sm_89; the others have more."""
_MOST_SHARED_SM90 = 226 << 10
"""And on sm_90, less the barriers of `Roles`."""


BYTE_PITCH = COLUMN_MULTIPLE + 4
"""From one pixel to the next, of results in 8 bits in shared memory: one bank more."""

_CONV_TILES = ((64, 64), (64, 256), (64, 1024), (64, 4096), (128, None))
"""Rows of a tile, and up to how many pixels: the last layers of a network have few, of much K."""
_CHANNELS_ROWS = 32
"""Of a tile of a depthwise convolution: 8 pixels of 4 channels each are a thread's."""


def activation_bytes(region: Region) -> int:
    """Bytes of an element of the operand that is not weights."""
    return 2 if region.anchor in FOUR_BITS else 1


def results_of(region: Region) -> dict[str, tuple[int, int]]:
    """The first column and the width of each result of a product, by the parameter it is."""
    if not region.widths:
        return {} if region.outputs == ("made",) else {"y": (0, region.size("N"))}
    firsts = itertools.accumulate(region.widths, initial=0)
    return {f"y{i}": each for i, each in enumerate(zip(firsts, region.widths, strict=False))}


def scales_of(region: Region) -> tuple[str, ...]:
    """The scales that sums are multiplied by."""
    if region.anchor in FOUR_BITS:
        return ()  # weights were, before they were multiplied
    # That of an image is in those of the weights.
    return ("ws",) if region.anchor in CONVS else ("s", "ws")


def chunks_of(region: Region) -> int:
    """Chunks of K, the last perhaps a part."""
    return -(-depth_of(region) * activation_bytes(region) // CHUNK_BYTES)


def stage_bytes(region: Region, rows: int) -> int:
    """Shared memory for a chunk of `rows` activations and 128 columns of weights and scales.

    A multiple of 1024, where the swizzle of `wgmma` begins anew.
    """
    layout = packing(region)
    weights = COLUMN_MULTIPLE * CHUNK_BYTES // activation_bytes(region) * layout.bits // 8
    records = COLUMN_MULTIPLE // TILE_COLUMNS * groups_of_chunk(region) * layout.record_bytes
    return -(-(rows * CHUNK_BYTES + weights + records) // 1024) * 1024


def groups_of_chunk(region: Region) -> int:
    """Groups of weights that a chunk of K meets; 0 where weights have none."""
    if region.anchor not in FOUR_BITS:
        return 0
    depth = CHUNK_BYTES // activation_bytes(region)
    return max(1, depth // region.size("G")) if packing(region).groups > 1 else 1


def shared_bytes(region: Region, shape: Shape) -> int:
    """Dynamic shared memory of a kernel: its stages, later its results as float32."""
    if isinstance(shape, Stream):
        return shape.warps * STREAM_COLUMNS * STREAM_ROWS * 4
    results = shape.rows * result_pitch(region, shape.splits) * 4
    if region.anchor == CONV_IMAGE and shape.splits == 1:
        results += shape.rows * BYTE_PITCH
    if isinstance(shape, Channels):
        return results
    if isinstance(shape, Roles):
        return max(shape.stages * stage_bytes(region, shape.rows), results) + 16 * shape.stages
    return max(shape.stages * stage_bytes(region, shape.rows), results)


def result_pitch(region: Region, splits: int = 1) -> int:
    """Words from one row of results in shared memory to the next: a few more, for other banks.

    Results are read four columns at a time, those that go to planes down a column.
    """
    is_down = region.anchor in CONVS and not (region.anchor == CONV_IMAGE and splits > 1)
    return COLUMN_MULTIPLE + (1 if is_down else 4)


def shapes_of(region: Region, arch: str) -> list[tuple[int | None, Shape]]:
    """The kernels of a product, each with the largest M it is for."""
    if is_depthwise(region):
        return [(None, Channels(_CHANNELS_ROWS))]
    if region.anchor in CONVS:
        return _without_repeats([(most, _tile(region, rows, most)) for rows, most in _CONV_TILES])
    # sm_90 keeps sums of FP8 twice (`warpgroup.py`), and has no registers for those of 128 rows.
    most_rows = 64 if region.anchor == "QMatMulFp8" else 128
    tiles = ((16, 16), (64, 64), (64, 256), (most_rows, None))
    shapes: list[tuple[int | None, Shape]] = [(STREAM_ROWS, _stream(region))]
    shapes += [(most, _tile(region, rows, most)) for rows, most in tiles]
    if arch == "sm_90a":
        roles = _roles(region)
        fills = roles.rows * -(-_MULTIPROCESSORS // -(-region.size("N") // COLUMN_MULTIPLE))
        shapes[-1:] = [(fills, shapes[-1][1])] * (fills > 256) + [(None, roles)]
    return _without_repeats(shapes)


def _without_repeats(shapes: list[tuple[int | None, Shape]]) -> list[tuple[int | None, Shape]]:
    following = [shape for _, shape in shapes[1:]] + [None]
    return [entry for entry, after in zip(shapes, following, strict=True) if entry[1] != after]


def _stream(region: Region) -> Stream:
    chunks = chunks_of(region)
    most = 4 if region.anchor in FOUR_BITS else 2
    batch = most if chunks >= 8 * most else most // 2
    if region.anchor in FOUR_BITS and region.size("G") < region.size("K"):
        # A batch is of whole groups, or a part of one.
        while (depth := 64 * batch) % region.size("G") and region.size("G") % depth:
            batch //= 2
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


def _roles(region: Region) -> Roles:
    # Sums of FP8 are kept twice (`warpgroup.py`).
    rows = 128 if region.anchor == "QMatMulFp8" else 256
    return Roles(rows, min(4, _MOST_SHARED_SM90 // stage_bytes(region, rows)))


def launches(region: Region, arch: str) -> tuple[Launch, ...]:
    """The kernels of a region in order of the rows they take."""
    if region.anchor in NORMS:
        return norm_launches(region)
    if region.anchor == IMAGE:
        return image_launches(region)
    if "N" not in dict(region.sizes):
        return _quantize_launches(region)
    return tuple(_launch(region, max_rows, shape) for max_rows, shape in shapes_of(region, arch))


def _launch(region: Region, max_rows: int | None, shape: Shape) -> Launch:
    operands = ("x", "w", "ws") if region.anchor in FOUR_BITS else ("q", "w")
    end = (
        *scales_of(region),
        *(f"extra{i}" for i in range(len(region.extras))),
        *results_of(region),
        *(("made",) if region.anchor == CONV_IMAGE else ()),
    )
    sizes = ("height", "rows", "width") if region.anchor in CONVS else ("rows",)
    is_stream, splits = isinstance(shape, Stream), 1 if isinstance(shape, Stream) else shape.splits
    combines = splits > 1
    return Launch(
        symbol=_symbol(region, shape),
        max_rows=max_rows,
        threads=_threads(shape),
        shared_bytes=shared_bytes(region, shape),
        block_rows=STREAM_ROWS if isinstance(shape, Stream) else shape.rows,
        block_columns=STREAM_COLUMNS if is_stream else COLUMN_MULTIPLE,
        splits=splits,
        combine=f"{region.name}_combine{splits}_kernel" if combines else None,
        parameters=(*sorted((*operands, *(("workspace",) if combines else end))), *sizes),
        combine_parameters=(*sorted(("workspace", *end)), *sizes) if combines else (),
    )


def _threads(shape: Shape) -> int:
    if isinstance(shape, Stream):
        return shape.warps * _WARP
    return TILE_THREADS * 3 if isinstance(shape, Roles) else TILE_THREADS


def _symbol(region: Region, shape: Shape) -> str:
    if isinstance(shape, Stream):
        return f"{region.name}_stream_kernel"
    if isinstance(shape, Roles):
        return f"{region.name}_roles{shape.rows}_kernel"
    if isinstance(shape, Channels):
        return f"{region.name}_channels_kernel"
    return f"{region.name}_tile{shape.rows}x{shape.splits}_kernel"


def _quantize_launches(region: Region) -> tuple[Launch, ...]:
    threads = max(_WARP, min(256, -(-region.size("K") // 16 // _WARP) * _WARP))
    return row_launches(region, threads, ("q", "s", "x", "rows"))

"""How the kernels of a region are launched: the contract between them and the library's C code.

Every region has one or more `Launch`es, in order of `max_rows`; of these the first runs that takes
the M rows at hand.  With M = 0 none runs.

    grid  = (ceil(N / block_columns), ceil(M / block_rows), splits)    block = (threads, 1, 1)

Of images more than 65535 blocks of pixels come to 32768 in y and the rest in z (`TALL_BLOCKS`).

N is the region's size "N"; where it has none, it is K.  A launch with `splits` > 1 leaves partial
sums [splits, M, N] in a workspace, and `combine` runs after it, on the same stream, with the
arguments `combine_parameters` and no dynamic shared memory:

    grid  = (ceil(M * N / (threads * 4)), 1, 1)                        block = (threads, 1, 1)

Arguments, all pointers to device memory at multiples of 16 bytes (s and z of an image: of their
size) but the last, int32:

    x           float16 [M, K]      activations of W4A16, Quantize and norms; of norms with a
                                    residual it is their first result, a + b; of QuantizeImage
                                    [images, K, height, width]
    a, b        float16 [M, K]      what such norms add
    gamma, beta float16 [K]         of norms
    q           [M, K]              uint8 with zero point 128, or float8e4m3fn (names with Fp8):
                                    read by products, made by Quantize and norms
    s           float32 [M, 1]      scales of tokens; float16 would underflow; of an image [1]
    z           uint8 [1]           the zero point of an image
    w           packed weights, see `packing.py`
    ws          packed scales of weights, see `packing.py`: float16 (W4A16) or float32 (W8A8, Fp8)
    extra<i>    float16             of kind "channel" [N], of norms [K]; of kind "tensor" [M, N]
    y           float16 [M, N]      of norms [M, K]; of a region with widths y0, y1, ...: [M, width]
    workspace   [splits, M, N]      int32 (W8A8) or float32
    rows        M
    height,     of the images that a kernel reads
    width

Rows of QuantizeImage and QConvW8A8 are pixels of what they make: q [images, height, width,
channels], with its border, and y [images, N, height, width].  Partial sums of the latter lie
[splits, N, M].

Nothing but the arguments is read or written, and no kernel waits for another block.  Results do not
depend on what shares the device.
"""

from __future__ import annotations

import dataclasses

from qcompiler.ir.region import Region

__all__ = ["TALL_BLOCKS", "Launch", "row_launches"]

TALL_BLOCKS = 32768
"""Blocks of pixels in y, where there are more than a grid holds there; `native/cuda_ops.c` too."""

_MOST_ROWS = 32768
"""Of one per block: a grid has at most 65535 blocks in y."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel of a region and when it runs.

    Attributes:
        symbol: Its extern "C" name in the CUDA source.
        max_rows: The largest M it is for; None for any.
        threads: Per block.
        shared_bytes: Dynamic shared memory; above 48 KiB it must be asked for.
        block_rows: Rows of the result that a block computes.
        block_columns: Columns of it.
        splits: Parts of K that different blocks sum.
        combine: The symbol of the kernel that adds partial sums and computes the epilogue.
        parameters: Its arguments in order.
        combine_parameters: Those of `combine`.
    """

    symbol: str
    max_rows: int | None
    threads: int
    shared_bytes: int
    block_rows: int
    block_columns: int
    splits: int = 1
    combine: str | None = None
    parameters: tuple[str, ...] = ()
    combine_parameters: tuple[str, ...] = ()


def row_launches(
    region: Region, threads: int, parameters: tuple[str, ...]
) -> tuple[Launch, Launch]:
    """The kernels of what is computed row by row: one row per block, and for very many rows 16.

    Args:
        region: Has the rows' length as K.
        threads: Per block; each warp has 4 bytes of shared memory.
        parameters: The arguments of both.
    """
    one_row = Launch(
        symbol=f"{region.name}_row_kernel",
        max_rows=_MOST_ROWS,
        threads=threads,
        shared_bytes=threads // 32 * 4,
        block_rows=1,
        block_columns=region.size("K"),
        parameters=parameters,
    )
    many = dataclasses.replace(
        one_row, symbol=f"{region.name}_rows_kernel", max_rows=None, block_rows=16
    )
    return one_row, many

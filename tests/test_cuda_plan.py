"""Which regions have CUDA kernels, their launches, and the layout of packed weights."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from qcompiler.ir.region import Region, Step
from qcompiler.targets import cuda
from qcompiler.targets.cuda.packing import pack, pack_scales

W4 = Region("QMatMulW4A16", (("K", 200), ("N", 136), ("G", 32)))
W8 = Region("QMatMulW8A8", (("K", 208), ("N", 40)))


def w4(k: int = 256, n: int = 64, group: int = 128, **more) -> Region:
    return Region("QMatMulW4A16", (("K", k), ("N", n), ("G", group)), **more)


def test_int4_lies_where_the_layout_says():
    rng = np.random.default_rng(0)
    w = rng.integers(-8, 8, (200, 136)).astype(np.int8)
    layout = cuda.packing(W4)
    words = np.frombuffer(pack(w, W4), "<u4")
    assert words.nbytes == layout.weight_bytes == 256 * 256 // 2
    for k, n in rng.integers(0, (200, 136), (300, 2)):
        c, d = n % 16, k % 64
        tile = n // 16 * (layout.depth // layout.tile_depth) + k // layout.tile_depth
        lane = c % 8 * 4 + d % 8 // 2
        word = words[(tile * 512 + lane * 16 + d // 16 * 4) // 4]
        assert (word >> (4 * (c // 8 + 2 * (d % 16 // 8)) + 16 * (d % 2))) & 15 == w[k, n] + 8


def test_padding_of_int4_is_zero():
    codes = np.frombuffer(pack(np.zeros((200, 136), np.int8), W4), np.uint8)
    assert (codes == 0x88).all()


def test_scales_of_int4_lie_where_the_layout_says():
    ws = np.random.default_rng(0).random((7, 136)).astype(np.float16)
    layout = cuda.packing(W4)
    packed = np.frombuffer(pack_scales(ws, W4), "<f2")
    assert packed.nbytes == layout.scale_bytes
    assert layout.groups == 8
    for g, n in np.ndindex(7, 136):
        assert packed[(n // 16 * layout.groups + g) * 16 + n % 8 * 2 + n % 16 // 8] == ws[g, n]


def test_zero_points_lie_where_the_layout_says():
    region = Region("QMatMulW4Z4A16", W4.sizes)
    rng = np.random.default_rng(0)
    ws, wz = rng.random((7, 136)).astype(np.float16), rng.integers(-8, 8, (7, 136)).astype(np.int8)
    layout = cuda.packing(region)
    records = np.frombuffer(pack_scales(ws, region, wz), np.uint8).reshape(-1, 48)
    assert (layout.record_bytes, records.size) == (48, layout.scale_bytes)
    for g, n in np.ndindex(7, 136):
        record, place = records[n // 16 * layout.groups + g], n % 8 * 2 + n % 16 // 8
        assert record[:32].view("<f2")[place] == ws[g, n]
        assert record[32 + place] == (int(wz[g, n]) + 8) * 16 ** (n % 16 // 8)


def test_one_group_is_one_whatever_the_padding():
    for k, group in ((100, 100), (20, 32), (16, 16)):
        assert cuda.packing(w4(k, group=group)).groups == 1


def test_bytes_lie_where_the_layout_says():
    rng = np.random.default_rng(0)
    w = rng.integers(-128, 128, (208, 40)).astype(np.int8)
    layout = cuda.packing(W8)
    packed = np.frombuffer(pack(w, W8), np.int8)
    assert packed.size == layout.weight_bytes == 256 * 128
    for k, n in rng.integers(0, (208, 40), (300, 2)):
        c, d = n % 16, k % 32
        tile = n // 16 * (layout.depth // layout.tile_depth) + k // layout.tile_depth
        lane = c % 8 * 4 + d % 16 // 4
        assert packed[tile * 512 + lane * 16 + (c // 8 + 2 * (d // 16)) * 4 + d % 4] == w[k, n]


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (Region("QConv", ()), "no kernel for QConv; there are"),
        (Region("QMatMulW4A16", (("K", 64), ("N", 64))), "takes the sizes K, N, G"),
        (w4(k=0), "is not positive"),
        (w4(k=1 << 31), "more than 2\\^30"),
        (w4(group=24), "groups of 24; known are 16, 32 and multiples of 64"),
        (w4(n=1 << 23), "weights are more than 2\\^30"),
        (w4(k=1 << 26, n=1), "67108864 x 1 weights are 4294967296 bytes when padded"),
        (w4(widths=(8,) * 8 + (0,)), "9 results; at most 8 are supported"),
        (w4(steps=(Step("Erf", (0,)),)), "no vector form of Erf"),
        (w4(steps=(Step("Add", (0, -1)),)), "reads values that do not exist"),
        (w4(extras=("channel",) * 9), "9 extra operands; at most 8"),
        (Region("QMatMulW8A8", (("K", 1 << 18), ("N", 64))), "an int32 sum"),
        (Region("Quantize", (("K", 64),), steps=(Step("Relu", (0,)),)), "takes no epilogue"),
    ],
)
def test_what_has_no_kernel_says_why(region, reason):
    found = cuda.supports(region)
    assert found is not None
    assert re.search(reason, found)


@pytest.mark.parametrize("region", [w4(), w4(4096, 4096), w4(576, 1536, 32), w4(8192, 28672), W8,
                                    Region("QMatMulFp8", (("K", 4096), ("N", 4096))),
                                    w4(333, group=16), w4(4096, 4096, 192), w4(100, group=100),
                                    w4(256, 96, widths=(32, 64)),
                                    Region("Quantize", (("K", 4096),))],
                         ids=lambda region: region.name)  # fmt: skip
def test_launches_cover_all_rows_and_fit_every_device(region):
    assert cuda.supports(region) is None
    launches = cuda.launches(region, "sm_90a")
    limits = [launch.max_rows for launch in launches]
    assert limits[-1] is None
    assert limits[:-1] == sorted({limit for limit in limits[:-1] if limit is not None})
    for launch in launches:
        assert launch.shared_bytes <= (227 if "_roles" in launch.symbol else 99) << 10
        assert launch.threads % 32 == 0
        assert (launch.combine is None) == (launch.splits == 1)
        assert launch.parameters[-1] == "rows"
        if launch.max_rows is not None:
            assert launch.max_rows / launch.block_rows < 65536


def test_roles_are_for_rows_that_fill_the_device():
    for n, tiles_until in ((28672, 256), (4096, 5 * 256)):
        *_, before, last = cuda.launches(w4(8192, n), "sm_90a")
        assert (last.threads, last.block_rows, before.max_rows) == (384, 256, tiles_until)


def test_every_split_has_work():
    for k in range(64, 8192, 64):
        region = w4(k, 256)
        for launch in cuda.launches(region, "sm_80"):
            per_split = -(-k // 64 // launch.splits)
            assert (launch.splits - 1) * per_split < k // 64


def test_fp8_is_not_for_sm_80():
    assert cuda.archs_of(Region("QMatMulFp8", (("K", 64), ("N", 64)))) == ("sm_89", "sm_90a")


def test_asking_imports_no_tvm():
    program = (
        "import sys; from qcompiler.targets import cuda; from qcompiler.ir.region import Region; "
        "r = Region('QMatMulW4A16', (('K', 64), ('N', 64), ('G', 32))); "
        "cuda.supports(r), cuda.launches(r, 'sm_80'), cuda.packing(r), cuda.fingerprint(); "
        "assert 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

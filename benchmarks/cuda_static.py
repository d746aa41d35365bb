"""What the CUDA kernels would cost, without a GPU: python benchmarks/cuda_static.py [--json].

Of products, and of convolutions, whose rows are pixels.  For each kernel: registers, blocks per
multiprocessor and warps of all it holds, as ptxas compiled it; bytes that must come from memory,
and those that all blocks bring to shared memory (or, depthwise, load); instructions of a block's
code; and floors, the time that memory and tensor cores of the device need at least.
`busy` is the part of the device's multiprocessors that the grid gives a block to, in its last wave
or only one.  Times are arithmetic, not measured: a floor is what no kernel can beat, and says
nothing of how near it comes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cuda_convs import Conv

from qcompiler.ir.region import Region
from qcompiler.targets import cuda
from qcompiler.targets.cubin import find_cubin_compiler
from qcompiler.targets.cuda.machine_code import (
    KernelCode,
    blocks_per_multiprocessor,
    compile_kernels,
    find_cuobjdump,
)
from qcompiler.targets.cuda.packing import depth_of, image_columns, is_depthwise

RESULT = Path(__file__).resolve().parent / "results" / "cuda_static.json"
SHAPES = ((4096, 4096), (28672, 8192))
"""N, K: the smallest and the largest that the kernels are judged by."""
ROWS = (1, 16, 64, 256, 4096)


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU's limits: multiprocessors, bytes/s of memory, dense products of 8 and 16 bits per s."""

    name: str
    multiprocessors: int
    bandwidth: float
    operations: dict[str, float]


# From NVIDIA's data sheets, except the H200's bandwidth, which is a measured copy.  A dp4a is 8
# operations, of which a multiprocessor has 64 per clock (CUDA programming guide, 8.4.1).
_A100 = {"float16": 312e12, "int8": 624e12, "dp4a": 78e12}
_L40S = {"float16": 362e12, "int8": 733e12, "fp8": 733e12, "dp4a": 183e12}
_H200 = {"float16": 989e12, "int8": 1979e12, "fp8": 1979e12, "dp4a": 134e12}
DEVICES = {
    "sm_80": Device("A100 80GB", 108, 2.0e12, _A100),
    "sm_89": Device("L40S", 142, 0.86e12, _L40S),
    "sm_90a": Device("H200", 132, 4.3e12, _H200),
}
MULTIPLIES = {"QMatMulW4A16": "float16", "QMatMulW8A8": "int8", "QMatMulFp8": "fp8",
              "QConvW8A8": "int8", "QConvImageW8A8": "int8"}  # fmt: skip
TENSOR = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "IDP")
"""And, of depthwise convolutions, what adds four products."""

# Layers of ResNet50, of ResNeXt50 and of MobileNetV2, whose results are stored as images but of the
# first, with the images at batch 8.
CONVS = (
    (Conv(256, 256), (8, 14, 14)),
    (Conv(256, 256, made=1), (8, 14, 14)),
    (Conv(64, 64, made=1), (8, 56, 56)),
    (Conv(256, 64, taps=1, pad=0, made=1), (8, 56, 56)),
    (Conv(128, 128, group=32, made=0), (8, 56, 56)),
    (Conv(144, 144, group=144, made=0), (8, 56, 56)),
)


def regions() -> list[Region]:
    """What is looked at."""
    found = []
    for n, k in SHAPES:
        sizes = (("K", k), ("N", n))
        found.append(Region("QMatMulW4A16", (*sizes, ("G", 128))))
        found += [Region(anchor, sizes) for anchor in ("QMatMulW8A8", "QMatMulFp8")]
    return found


def bytes_moved(region: Region, rows: int, launch: cuda.Launch) -> int:
    """What a launch reads and writes at least: each operand once, partial sums twice."""
    layout, k, n = cuda.packing(region), region.size("K"), region.size("N")
    activations = rows * k * (2 if region.anchor == "QMatMulW4A16" else 1)
    partial = 2 * 4 * launch.splits * rows * n if launch.combine else 0
    return layout.weight_bytes + layout.scale_bytes + activations + 2 * rows * n + partial


def bytes_brought(region: Region, rows: int, launch: cuda.Launch) -> int:
    """What all blocks bring into shared memory or registers, most of it from the L2 cache."""
    columns = cuda.packing(region).columns if launch.block_columns > 16 else region.size("N")
    blocks = columns // launch.block_columns * -(-rows // launch.block_rows)
    layout = cuda.packing(region)
    weights = (layout.weight_bytes + layout.scale_bytes) // (layout.columns // launch.block_columns)
    element = 2 if "G" in dict(region.sizes) else 1
    return blocks * (weights + launch.block_rows * region.size("K") * element)


def cost_of(region: Region, rows: int, launch: cuda.Launch) -> tuple[int, int, int]:
    """Bytes moved and brought, and operations that count, of a product."""
    operations = 2 * rows * region.size("N") * region.size("K")
    return bytes_moved(region, rows, launch), bytes_brought(region, rows, launch), operations


def cost_of_conv(conv: Conv, shape: tuple[int, int, int], launch: cuda.Launch) -> tuple[int, ...]:
    """The same of a convolution; what is brought is, for each tap, all that a tile multiplies."""
    made, layout = conv.made_shape(shape), cuda.packing(conv.region)
    results, stored = int(np.prod(made)), int(np.prod(conv.stored_shape(shape)))
    rows, columns = results // conv.columns, layout.columns // launch.block_columns
    blocks = columns * -(-rows // launch.block_rows)
    weights = (layout.weight_bytes + layout.scale_bytes) // columns
    # A depthwise kernel has 128 channels of each tap.
    per_row = layout.depth * (launch.block_columns if "_channels" in launch.symbol else 1)
    moved = stored + layout.weight_bytes + layout.scale_bytes + 2 * results
    if conv.made is not None:
        moved += int(np.prod(conv.image_shape(shape))) - 2 * results
    if launch.combine is not None:
        moved += 2 * 4 * launch.splits * rows * image_columns(conv.region)
    operations = 2 * results * conv.taps**2 * conv.channels // conv.group
    return moved, blocks * (weights + launch.block_rows * per_row), operations


def row_of(
    region: Region, arch: str, rows: int, codes: dict[str, KernelCode],
    cost: Callable[[cuda.Launch], Sequence[int]],
) -> dict[str, Any]:  # fmt: skip
    """One line of the table."""
    device, k, n = DEVICES[arch], depth_of(region), region.size("N")
    launch = next(
        one for one in cuda.launches(region, arch) if one.max_rows is None or rows <= one.max_rows
    )
    code = codes[launch.symbol]
    resident = blocks_per_multiprocessor(arch, code.registers, launch.threads, launch.shared_bytes)
    blocks = -(-n // launch.block_columns) * -(-rows // launch.block_rows) * launch.splits
    at_once = device.multiprocessors * resident
    moved, brought, operations = cost(launch)
    kind = "dp4a" if is_depthwise(region) else MULTIPLIES[region.anchor]
    peak = device.operations[kind]
    return {
        "anchor": region.anchor, "arch": arch, "device": device.name, "rows": rows, "n": n, "k": k,
        "groups": int(dict(region.attributes).get("group", 1)), "operations": operations,
        "kernel": launch.symbol.removeprefix(f"{region.name}_").removesuffix("_kernel"),
        "registers": code.registers, "spilled_bytes": code.spilled_bytes,
        "shared_bytes": launch.shared_bytes, "blocks_per_multiprocessor": resident,
        "warps_per_multiprocessor": resident * launch.threads // 32,
        "blocks": blocks, "waves": round(blocks / at_once, 2),
        "busy": round(min(1.0, blocks / device.multiprocessors), 2),
        "bytes": moved, "bytes_per_output": round(moved / (rows * n), 1),
        "bytes_brought": brought,
        "instructions": sum(code.instructions.values()),
        "tensor_instructions": code.count(*TENSOR),
        "memory_floor_us": round(moved / device.bandwidth * 1e6, 2),
        "tensor_floor_us": round(operations / peak * 1e6, 2),
    }  # fmt: skip


def product_rows(compiled: Callable[[Region, str], dict[str, KernelCode]]) -> list[dict[str, Any]]:
    """Those of products."""
    table = []
    for region in regions():
        for arch in cuda.archs_of(region):
            codes = compiled(region, arch)
            table += [
                row_of(region, arch, rows, codes, functools.partial(cost_of, region, rows))
                for rows in ROWS
            ]
    return table


def conv_rows(compiled: Callable[[Region, str], dict[str, KernelCode]]) -> list[dict[str, Any]]:
    """Those of convolutions."""
    table = []
    for conv, shape in CONVS:
        count, _, height, width = conv.made_shape(shape)
        for arch in cuda.archs_of(conv.region):
            cost, pixels = functools.partial(cost_of_conv, conv, shape), count * height * width
            table.append(row_of(conv.region, arch, pixels, compiled(conv.region, arch), cost))
    return table


PARTS = {"products": product_rows, "convolutions": conv_rows}


def main() -> None:
    """Print the table, or write it to `results/`, where parts that were not asked for stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    compiler, cuobjdump = find_cubin_compiler(), find_cuobjdump()

    def compiled(region: Region, arch: str) -> dict[str, KernelCode]:
        return compile_kernels(cuda.source(region, arch), arch, compiler, cuobjdump)

    shown = ("anchor", "device", "rows", "n", "k", "kernel", "registers",
             "blocks_per_multiprocessor", "waves", "busy", "bytes_per_output", "bytes_brought",
             "instructions", "memory_floor_us", "tensor_floor_us")  # fmt: skip
    print(" | ".join(shown), flush=True)
    found = {part: PARTS[part](compiled) for part in options.parts}
    for row in (row for table in found.values() for row in table):
        print(" | ".join(str(row[name]) for name in shown))
    if options.json:
        before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        kept = {part: before[part] for part in PARTS if part in before}
        result = {"compiler": compiler.name, "measured": False, **kept, **found}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What the CUDA kernels would cost, without a GPU: python benchmarks/cuda_static.py [--json].

For each kernel: registers, blocks per multiprocessor and warps of all it holds, as ptxas compiled
it; bytes that must come from memory, and those that all blocks bring to shared memory; instructions
of a block's code; and floors, the time that memory and tensor cores of the device need at least.
`busy` is the part of the device's multiprocessors that the grid gives a block to, in its last wave
or only one.  Times are arithmetic, not measured: a floor is what no kernel can beat, and says
nothing of how near it comes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from qcompiler.ir.region import Region
from qcompiler.targets import cuda
from qcompiler.targets.cubin import Nvcc, find_cubin_compiler
from qcompiler.targets.cuda.machine_code import (
    KernelCode,
    blocks_per_multiprocessor,
    compile_kernels,
    find_cuobjdump,
)

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


# From NVIDIA's data sheets, except the H200's bandwidth, which is a measured copy.
DEVICES = {
    "sm_80": Device("A100 80GB", 108, 2.0e12, {"float16": 312e12, "int8": 624e12}),
    "sm_89": Device("L40S", 142, 0.86e12, {"float16": 362e12, "int8": 733e12, "fp8": 733e12}),
    "sm_90a": Device("H200", 132, 4.3e12, {"float16": 989e12, "int8": 1979e12, "fp8": 1979e12}),
}
MULTIPLIES = {"QMatMulW4A16": "float16", "QMatMulW8A8": "int8", "QMatMulFp8": "fp8"}
TENSOR = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA")


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


def row_of(region: Region, arch: str, rows: int, codes: dict[str, KernelCode]) -> dict[str, Any]:
    """One line of the table."""
    device, k, n = DEVICES[arch], region.size("K"), region.size("N")
    launch = next(
        one for one in cuda.launches(region, arch) if one.max_rows is None or rows <= one.max_rows
    )
    code = codes[launch.symbol]
    resident = blocks_per_multiprocessor(arch, code.registers, launch.threads, launch.shared_bytes)
    blocks = -(-n // launch.block_columns) * -(-rows // launch.block_rows) * launch.splits
    at_once = device.multiprocessors * resident
    moved = bytes_moved(region, rows, launch)
    operations, peak = 2 * rows * n * k, device.operations[MULTIPLIES[region.anchor]]
    return {
        "anchor": region.anchor, "arch": arch, "device": device.name, "rows": rows, "n": n, "k": k,
        "kernel": launch.symbol.removeprefix(f"{region.name}_").removesuffix("_kernel"),
        "registers": code.registers, "spilled_bytes": code.spilled_bytes,
        "shared_bytes": launch.shared_bytes, "blocks_per_multiprocessor": resident,
        "warps_per_multiprocessor": resident * launch.threads // 32,
        "blocks": blocks, "waves": round(blocks / at_once, 2),
        "busy": round(min(1.0, blocks / device.multiprocessors), 2),
        "bytes": moved, "bytes_per_output": round(moved / (rows * n), 1),
        "bytes_brought": bytes_brought(region, rows, launch),
        "instructions": sum(code.instructions.values()),
        "tensor_instructions": code.count(*TENSOR),
        "memory_floor_us": round(moved / device.bandwidth * 1e6, 2),
        "tensor_floor_us": round(operations / peak * 1e6, 2),
    }  # fmt: skip


def main() -> None:
    """Print the table, or write it to `results/`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    write = parser.parse_args().json
    nvcc, cuobjdump = find_cubin_compiler(), find_cuobjdump()
    assert isinstance(nvcc, Nvcc), "only nvcc says what registers kernels take"
    table = []
    for region in regions():
        for arch in cuda.archs_of(region):
            codes = compile_kernels(cuda.source(region, arch), arch, nvcc, cuobjdump)
            table += [row_of(region, arch, rows, codes) for rows in ROWS]
    shown = ("anchor", "device", "rows", "n", "k", "kernel", "registers",
             "blocks_per_multiprocessor", "waves", "busy", "bytes_per_output", "bytes_brought",
             "instructions", "memory_floor_us", "tensor_floor_us")  # fmt: skip
    print(" | ".join(shown), flush=True)
    for row in table:
        print(" | ".join(str(row[name]) for name in shown))
    if write:
        result = {"compiler": nvcc.name, "measured": False, "kernels": table}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

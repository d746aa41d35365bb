"""The kernels on a GPU: are they right, and how fast: python benchmarks/cuda.py [--json FILE].

One command, in this order:

1. numbers against float64, on random data that is new each time (`--seed` repeats a run), for rows
   around every border between kernels;
2. times beside floors (bytes at the bandwidth of a copy measured here) and beside peers, as far as
   they are installed: cuBLAS(Lt) for fp16, int8 and fp8 and torch's int4 product through torch,
   MatMulNBits of ONNX Runtime's CUDA provider;
3. whole models in ONNX Runtime's CUDA provider, beside its float16 and its MatMulNBits;
4. the numbers again, smaller, under the checkers of compute-sanitizer (memory, races,
   synchronisation), where it is installed: last, because they may take minutes each.

Weights rotate, more than any cache holds, and calls are replayed as a CUDA graph, ours and peers'.
Needs a GPU of compute capability 8.0 to 9.0, its driver, and nvcc or the extra [cuda].
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cuda_checkers import is_bad, sanitize
from cuda_convs import Conv, ConvProblem, convs_to_check
from cuda_device import CudaError, Device, Kernels
from cuda_models import whole_models
from cuda_norms import NormProblem, is_norm
from cuda_numbers import (
    E4M3,
    EIGHT_BIT,
    TOLERANCE,
    Problem,
    eight_bit,
    regions_to_check,
    rows_to_check,
    w4,
)
from cuda_peers import EIGHT_BIT_SIZES, ROTATED, W4_ROWS, W4_SHAPES, ort_peers, torch_peers

from qcompiler.ir.errors import ToolchainError
from qcompiler.ir.region import Region
from qcompiler.targets import cuda
from qcompiler.targets.cubin import CubinCompiler, find_cubin_compiler

COPIED = 1 << 30


class Bench:
    """What is found on one device."""

    def __init__(self, device: Device, arch: str, compiler: CubinCompiler, seed: int) -> None:
        self.device, self.arch, self.compiler = device, arch, compiler
        self.rng = np.random.default_rng(seed)

    def kernels(self, region: Region) -> Kernels:
        """The kernels of a region on this device."""
        return Kernels(self.device, region, self.arch, self.compiler)

    def check(self, small: bool) -> list[dict[str, Any]]:
        """The largest error of each region and number of rows."""
        found = []
        for region in regions_to_check(small):
            if self.arch not in cuda.archs_of(region):
                continue
            kernels = self.kernels(region)
            for rows in rows_to_check(kernels.launches):
                problem = NormProblem if is_norm(region) else Problem
                error = problem(kernels, rows, self.rng).error(self.rng)
                found.append({"region": region.name, "rows": rows, "error": error})
                _say(found[-1])
        return found + self.check_convs(small)

    def check_convs(self, small: bool) -> list[dict[str, Any]]:
        """The same of convolutions, each with the kernel that stores its images."""
        found = []
        for conv, shape in convs_to_check(small):
            kernels = self.kernels(conv.image), self.kernels(conv.region)
            problem = ConvProblem(conv, kernels, shape, self.rng)
            error = problem.error(self.rng)
            found.append({"region": conv.region.name, "rows": problem.rows, "error": error})
            _say(found[-1])
        return found

    # --- times --------------------------------------------------------------------------------

    def bandwidth(self) -> float:
        """Bytes per second that a copy reads and writes."""
        source, target = self.device.allocate(COPIED), self.device.allocate(COPIED)
        seconds = self.device.seconds(lambda _: self.device.copy(target, source, COPIED), 4)
        return 2 * COPIED / seconds

    def time(self, region: Region, rows: int, sets: list[dict[str, int]]) -> dict[str, Any]:
        """One call of a product; `sets` of weights take turns."""
        kernels, layout = self.kernels(region), cuda.packing(region)
        k, n = region.size("K"), region.size("N")
        width = 2 if region.anchor == "QMatMulW4A16" else 1
        x = self.rng.standard_normal((rows, k)).astype(np.float16 if width == 2 else E4M3)
        given = {
            "x" if width == 2 else "q": self.device.upload(x),
            "s": self.device.upload(np.ones(rows, np.float32)),
            "y": self.device.allocate(rows * n * 2),
        }
        seconds = self.device.seconds(
            lambda i: kernels.run(given | sets[i % len(sets)], rows), max(16, len(sets))
        )
        moved = layout.weight_bytes + layout.scale_bytes + rows * k * width + rows * n * 2
        return {
            "region": region.name, "rows": rows, "microseconds": seconds * 1e6, "bytes": moved,
            "operations": 2 * rows * k * n,
        }  # fmt: skip

    def weights(self, region: Region) -> list[dict[str, int]]:
        """As many sets as no cache holds; what the numbers are does not matter for the time."""
        layout = cuda.packing(region)
        size = layout.weight_bytes + layout.scale_bytes
        w, ws = self.rng.bytes(layout.weight_bytes), b"\x10\x20" * (layout.scale_bytes // 2)
        return [
            {"w": self.device.upload(w), "ws": self.device.upload(ws)}
            for _ in range(max(1, -(-ROTATED // size)))
        ]

    def times(self) -> list[dict[str, Any]]:
        """All that is timed, beside the floor."""
        bandwidth, found = self.bandwidth(), []
        wanted = [(w4(k, n), W4_ROWS) for k, n in W4_SHAPES]
        wanted += [
            (eight_bit(a, size, size), (size,)) for a in EIGHT_BIT for size in EIGHT_BIT_SIZES
        ]
        for region, all_rows in wanted:
            if self.arch not in cuda.archs_of(region):
                continue
            sets = self.weights(region)
            for rows in all_rows:
                row = self.time(region, rows, sets)
                row["of_bandwidth"] = row["bytes"] / bandwidth / (row["microseconds"] / 1e6)
                row["tera_operations"] = row["operations"] / row["microseconds"] / 1e6
                print(
                    f"  {row['region']:40} {rows:5} rows {row['microseconds']:9.1f} us   "
                    f"{row['of_bandwidth']:4.0%} of a copy's bandwidth   "
                    f"{row['tera_operations']:6.0f} TOPS",
                    file=sys.stderr,
                )
                found.append(row)
            for pointer in (pointer for each in sets for pointer in each.values()):
                self.device.free(pointer)
        found += [self.time_conv(conv, shape) for conv, shape in convs_to_check(small=False)]
        return [{"copy_bytes_per_second": bandwidth}, *found]

    def time_conv(self, conv: Conv, shape: tuple[int, int, int]) -> dict[str, Any]:
        """One call of a convolution with its image's; weights and images may lie in a cache."""
        kernels = self.kernels(conv.image), self.kernels(conv.region)
        problem = ConvProblem(conv, kernels, shape, self.rng)
        seconds = self.device.seconds(lambda _: problem.run(), 16)
        moved, operations = problem.cost()
        print(f"  {conv.region.name:48} {problem.rows:7} pixels {seconds * 1e6:9.1f} us   "
              f"{operations / seconds / 1e12:6.0f} TOPS", file=sys.stderr)  # fmt: skip
        return {
            "region": conv.region.name, "rows": problem.rows, "microseconds": seconds * 1e6,
            "bytes": moved, "operations": operations,
        }  # fmt: skip


def _say(row: dict[str, Any]) -> None:
    mark = "" if row["error"] <= TOLERANCE else "   WRONG"
    print(f"  {row['region']:48} {row['rows']:5} rows   {row['error']:.1e}{mark}", file=sys.stderr)


def versions() -> dict[str, str]:
    found = {}
    for name in ("apache-tvm", "torch", "onnxruntime-gpu", "onnxruntime", "torchao", "qcompiler"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def open_device(driver: str) -> tuple[Device, str]:
    """The GPU, and the architecture whose kernels it runs; exits where there is none."""
    try:
        device = Device(driver)
    except CudaError as error:
        sys.exit(f"benchmarks/cuda.py needs an NVIDIA GPU: {error}")
    if device.arch is None:
        number = ".".join(map(str, device.capability))
        sys.exit(
            f"benchmarks/cuda.py: {device.name} has compute capability {number}, and there are "
            f"kernels for {', '.join(cuda.ARCHS)}"
        )
    return device, device.arch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--small", action="store_true", help="numbers of small sizes alone")
    parser.add_argument("--driver", default="libcuda.so.1", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, arch = open_device(options.driver)
    try:
        compiler = find_cubin_compiler()
    except ToolchainError as error:
        sys.exit(f"benchmarks/cuda.py: {error}")
    bench = Bench(device, arch, compiler, options.seed)
    print(f"{device.name}, driver for CUDA {device.driver_version}, {compiler.name}, kernels for "
          f"{arch}, seed {options.seed}", file=sys.stderr)  # fmt: skip
    checked = bench.check(options.small)
    wrong = [row for row in checked if not row["error"] <= TOLERANCE]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(checked)} results are wrong; not timed")
    if options.small:
        return
    result: dict[str, Any] = {
        "device": device.name, "capability": device.capability, "arch": arch,
        "driver": device.driver_version, "compiler": compiler.name, "versions": versions(),
        "seed": options.seed, "numbers": checked,
    }  # fmt: skip
    arguments = ["--seed", str(options.seed), "--driver", options.driver]
    parts: dict[str, Callable[[], Any]] = {
        "times": bench.times,
        "peers": lambda: torch_peers() + ort_peers(),
        "models": whole_models,
        "checkers": lambda: sanitize(Path(__file__), arguments),
    }
    for name, make in parts.items():
        result[name] = make()
        if options.json is not None:  # what is there survives a part that fails
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.json is None:
        print(json.dumps(result, indent=1))
    if found := [f"{tool}: {said}" for tool, said in result["checkers"].items() if is_bad(said)]:
        sys.exit("; ".join(found))


if __name__ == "__main__":
    main()

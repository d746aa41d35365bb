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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from cuda_checkers import is_bad, sanitize
from cuda_device import Array, CudaError, Device, Kernels
from cuda_models import whole_models
from cuda_peers import EIGHT_BIT_SIZES, ROTATED, W4_ROWS, W4_SHAPES, ort_peers, torch_peers

from qcompiler.ir.errors import ToolchainError
from qcompiler.ir.region import HALF, Region, Step
from qcompiler.targets import cuda
from qcompiler.targets.cubin import CubinCompiler, find_cubin_compiler

E4M3 = ml_dtypes.float8_e4m3fn
COPIED = 1 << 30
BIAS_GELU = {"extras": ("channel",), "steps": (Step("Add", (0, -1)), Step("Gelu", (1,)))}
TOLERANCE = 4e-3
"""Of the largest result: float16 rounds results, and weights times their scales, by 2^-11."""
SAMPLED = 48
"""Rows and columns of large results that are compared."""

EIGHT_BIT = {"QMatMulW8A8": "Quantize", "QMatMulFp8": "QuantizeFp8"}


def w4(k: int, n: int, group: int = 128, **more: Any) -> Region:
    return Region("QMatMulW4A16", (("K", k), ("N", n), ("G", group)), flags=(HALF,), **more)


def eight_bit(anchor: str, k: int, n: int, **more: Any) -> Region:
    return Region(anchor, (("K", k), ("N", n)), flags=(HALF,), **more)


def regions_to_check(small: bool) -> list[Region]:
    """Odd sizes, every group size, epilogues; then those that are timed."""
    found = [
        w4(200, 40, 32), w4(576, 136, 64), w4(1024, 130, **BIAS_GELU),
        *(eight_bit(anchor, 272, 133, **BIAS_GELU) for anchor in EIGHT_BIT),
        *(Region(anchor, (("K", 384),), flags=(HALF,)) for anchor in EIGHT_BIT.values()),
    ]  # fmt: skip
    if small:
        return found
    found += [w4(k, n) for k, n in W4_SHAPES[:2]]
    return found + [eight_bit(anchor, 4096, 4096) for anchor in EIGHT_BIT]


# --- numbers ----------------------------------------------------------------------------------


class Problem:
    """Random operands of a region, on the host and on the device."""

    def __init__(self, kernels: Kernels, rows: int, rng: np.random.Generator) -> None:
        self.kernels, self.rows, self.region = kernels, rows, kernels.region
        sizes = dict(self.region.sizes)
        self.k, self.n = sizes["K"], sizes.get("N", 0)
        self.host: dict[str, Array] = dict(self._activations(rng))
        for i, kind in enumerate(self.region.extras):
            shape = (self.n,) if kind == "channel" else (rows, self.n)
            self.host[f"extra{i}"] = rng.standard_normal(shape).astype(np.float16)
        device = kernels.device
        self.given = {name: device.upload(array) for name, array in self.host.items()}
        if self.n:
            self.w, self.ws = random_weights(self.region, rng)
            self.given |= kernels.weights(self.w, self.ws)
            # A row more, which must stay as it is.
            self.given["y"] = device.upload(np.full((rows + 1, self.n), np.nan, np.float16))
        else:
            self.given["q"] = device.upload(np.full((rows + 1, self.k), 7, np.uint8))
            self.given["s"] = device.upload(np.full((rows + 1, 1), np.nan, np.float32))

    def _activations(self, rng: np.random.Generator) -> Iterator[tuple[str, Array]]:
        shape = (self.rows, self.k)
        if self.region.anchor in ("QMatMulW4A16", *EIGHT_BIT.values()):
            yield "x", rng.standard_normal(shape).astype(np.float16)
            return
        yield "s", rng.uniform(1e-3, 1e-2, (self.rows, 1)).astype(np.float32)
        if self.region.anchor == "QMatMulW8A8":
            yield "q", rng.integers(0, 256, shape, np.uint8)
        else:
            yield "q", rng.standard_normal(shape).astype(E4M3)

    def error(self, rng: np.random.Generator) -> float:
        """The largest, as a part of the largest result; infinite if a row too many was written."""
        self.kernels.run(self.given, self.rows)
        return self._error_of_product(rng) if self.n else self._error_of_quantize()

    def _error_of_product(self, rng: np.random.Generator) -> float:
        y = self.kernels.device.download(self.given["y"], np.float16, self.rows + 1, self.n)
        if not np.isnan(y[-1]).all():
            return float("inf")
        rows = rng.permutation(self.rows)[:SAMPLED]
        columns = rng.permutation(self.n)[:SAMPLED]
        expected = self._expected(rows, columns)
        worst = np.abs(y[np.ix_(rows, columns)] - expected).max() / np.abs(expected).max()
        return float(worst) if np.isfinite(worst) else float("inf")

    def _expected(self, rows: Array, columns: Array) -> Array:
        w, ws = self.w[:, columns].astype(np.float64), self.ws[..., columns].astype(np.float64)
        if self.region.anchor == "QMatMulW4A16":
            wide = w * np.repeat(ws, self.region.size("G"), axis=0)[: self.k]
            y = self.host["x"][rows].astype(np.float64) @ wide
        else:
            middle = 128 if self.region.anchor == "QMatMulW8A8" else 0
            y = (self.host["q"][rows].astype(np.float64) - middle) @ w
            y *= self.host["s"][rows] * ws
        extras = [self._extra(i, rows, columns) for i in range(len(self.region.extras))]
        return with_steps(self.region, y, extras)

    def _extra(self, index: int, rows: Array, columns: Array) -> Array:
        extra = self.host[f"extra{index}"].astype(np.float64)
        return np.asarray(extra[columns] if extra.ndim == 1 else extra[np.ix_(rows, columns)])

    def _error_of_quantize(self) -> float:
        """Integers may differ by one step at ties, float8 numbers by one of theirs; scales not."""
        fp8 = self.region.anchor == "QuantizeFp8"
        download = self.kernels.device.download
        q = download(self.given["q"], E4M3 if fp8 else np.uint8, self.rows + 1, self.k)
        s = download(self.given["s"], np.float32, self.rows + 1, 1)
        if not np.isnan(s[-1]).all() or not (q[-1].view(np.uint8) == 7).all():
            return float("inf")
        x = self.host["x"].astype(np.float64)
        largest = np.maximum(np.abs(x).max(1, keepdims=True), 1e-20)
        scale = largest / (448 if fp8 else 127)
        if np.abs(s[:-1] / scale - 1).max() > 1e-6:
            return float("inf")
        step = np.maximum(np.abs(x) / 8, scale * 2**-9) if fp8 else scale
        wide = (q[:-1].astype(np.float64) - (0 if fp8 else 128)) * s[:-1]
        # Half a step, as a part of what is allowed of a product.
        return float((np.abs(wide - x) / step).max() / 0.51 * TOLERANCE)


def random_weights(region: Region, rng: np.random.Generator) -> tuple[Array, Array]:
    """Weights [K, N] and their scales."""
    sizes = dict(region.sizes)
    k, n = sizes["K"], sizes["N"]
    if region.anchor == "QMatMulW4A16":
        ws = rng.uniform(1e-3, 1e-2, (-(-k // sizes["G"]), n)).astype(np.float16)
        return rng.integers(-8, 8, (k, n), np.int8), ws
    ws = rng.uniform(1e-3, 1e-2, n).astype(np.float32)
    if region.anchor == "QMatMulW8A8":
        return rng.integers(-127, 128, (k, n), np.int8), ws
    return rng.standard_normal((k, n), np.float32).astype(E4M3), ws


def with_steps(region: Region, y: Array, extras: list[Array]) -> Array:
    from scipy import special

    ops: dict[str, Callable[..., Array]] = {
        "Add": np.add,
        "Gelu": lambda x: x * special.ndtr(x),
    }
    values = [y]
    for step in region.steps:
        args = [values[arg] if arg >= 0 else extras[-1 - arg] for arg in step.args]
        values.append(ops[step.op](*args))
    return values[-1]


def rows_to_check(launches: tuple[cuda.Launch, ...]) -> list[int]:
    """Around every border between kernels."""
    edges = [launch.max_rows for launch in launches if launch.max_rows is not None]
    near = [edge for edge in edges if edge <= 4096]
    return sorted({1, 5, *near, *(edge + 1 for edge in near), 300})


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
                error = Problem(kernels, rows, self.rng).error(self.rng)
                found.append({"region": region.name, "rows": rows, "error": error})
                mark = "" if error <= TOLERANCE else "   WRONG"
                print(f"  {region.name:48} {rows:5} rows   {error:.1e}{mark}", file=sys.stderr)
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
        return [{"copy_bytes_per_second": bandwidth}, *found]


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

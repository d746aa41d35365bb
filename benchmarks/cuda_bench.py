"""What `cuda.py` does on one device: numbers of kernels against float64, and their times."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from cuda_convs import TOLERANCE, Conv, ConvProblem
from cuda_cubins import Cubins
from cuda_device import Device, Kernels
from cuda_norms import NormProblem, is_norm
from cuda_numbers import E4M3, Problem, rows_to_check
from cuda_peers import ROTATED

from qcompiler.ir.region import Region
from qcompiler.targets import cuda

__all__ = ["Bench", "WrongError"]

COPIED = 1 << 30


class WrongError(Exception):
    """A kernel whose numbers are wrong: its time says nothing."""


class Bench:
    """What is found on one device."""

    def __init__(self, device: Device, arch: str, cubins: Cubins, seed: int) -> None:
        self.device, self.arch, self.cubins = device, arch, cubins
        self.rng = np.random.default_rng(seed)

    def kernels(self, region: Region) -> Kernels:
        """The kernels of a region on this device."""
        return Kernels(self.device, region, self.arch, self.cubins)

    def check(self, region: Region) -> list[dict[str, Any]]:
        """The largest error of a region, for rows around every border between its kernels."""
        kernels, found = self.kernels(region), []
        for rows in rows_to_check(kernels.launches):
            found.append(self._row(kernels, rows))
            _say(found[-1])
        return found

    def check_few(self, region: Region, all_rows: Sequence[int]) -> None:
        """Raise a `WrongError` if the kernels of a region that is to be timed are wrong."""
        kernels = self.kernels(region)
        for rows in dict.fromkeys(all_rows):
            _refuse_wrong(self._row(kernels, rows)["error"])

    def _row(self, kernels: Kernels, rows: int) -> dict[str, Any]:
        problem = NormProblem if is_norm(kernels.region) else Problem
        error = problem(kernels, rows, self.rng).error(self.rng)
        return {"region": kernels.region.name, "rows": rows, "error": error}

    def check_conv(self, conv: Conv, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
        """The same of a convolution, with the kernel that stores its images."""
        kernels = self.kernels(conv.image), self.kernels(conv.region)
        problem = ConvProblem(conv, kernels, shape, self.rng)
        error = problem.error(self.rng)
        row = {"region": conv.region.name, "rows": problem.rows, "error": error}
        _say(row)
        return [row]

    # --- times --------------------------------------------------------------------------------

    @functools.cached_property
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

    def times(self, region: Region, all_rows: tuple[int, ...]) -> list[dict[str, Any]]:
        """The times of a product, beside the floor; nothing where its numbers are wrong."""
        self.check_few(region, (all_rows[0], all_rows[-1]))
        bandwidth, sets, found = self.bandwidth, self.weights(region), []
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
        return found

    def time_conv(self, conv: Conv, shape: tuple[int, int, int]) -> dict[str, Any]:
        """One call of a convolution with its image's; weights and images may lie in a cache."""
        kernels = self.kernels(conv.image), self.kernels(conv.region)
        problem = ConvProblem(conv, kernels, shape, self.rng)
        _refuse_wrong(problem.error(self.rng))
        seconds = self.device.seconds(lambda _: problem.run(), 16)
        moved, operations = problem.cost()
        print(f"  {conv.region.name:48} {problem.rows:7} pixels {seconds * 1e6:9.1f} us   "
              f"{operations / seconds / 1e12:6.0f} TOPS", file=sys.stderr)  # fmt: skip
        return {
            "region": conv.region.name, "rows": problem.rows, "microseconds": seconds * 1e6,
            "bytes": moved, "operations": operations,
        }  # fmt: skip


def _refuse_wrong(error: float) -> None:
    if not error <= TOLERANCE:
        raise WrongError(f"not timed: its numbers are off by {error:.1e} of the largest")


def _say(row: dict[str, Any]) -> None:
    mark = "" if row["error"] <= TOLERANCE else "   WRONG"
    print(f"  {row['region']:48} {row['rows']:5} rows   {row['error']:.1e}{mark}", file=sys.stderr)

"""Random problems for the kernels, and how far results are from float64; part of `cuda.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from cuda_convs import TOLERANCE
from cuda_device import Array, Kernels
from cuda_norms import norms_to_check
from cuda_peers import W4_SHAPES

from qcompiler.ir.region import HALF, Region, Step
from qcompiler.targets import cuda
from qcompiler.targets.cuda.packing import FOUR_BITS

__all__ = [
    "E4M3", "EIGHT_BIT", "TOLERANCE", "Problem", "eight_bit", "regions_to_check", "rows_to_check",
    "w4",
]  # fmt: skip

E4M3 = ml_dtypes.float8_e4m3fn
BIAS_GELU = {"extras": ("channel",), "steps": (Step("Add", (0, -1)), Step("Gelu", (1,)))}
SAMPLED = 48
"""Rows and columns of large results that are compared."""

EIGHT_BIT = {"QMatMulW8A8": "Quantize", "QMatMulFp8": "QuantizeFp8"}


def w4(k: int, n: int, group: int = 128, *, zeros: bool = False, **more: Any) -> Region:
    anchor = "QMatMulW4Z4A16" if zeros else "QMatMulW4A16"
    return Region(anchor, (("K", k), ("N", n), ("G", group)), flags=(HALF,), **more)


def eight_bit(anchor: str, k: int, n: int, **more: Any) -> Region:
    return Region(anchor, (("K", k), ("N", n)), flags=(HALF,), **more)


def regions_to_check(small: bool) -> list[Region]:
    """Odd sizes, every group size, epilogues; then those that are timed."""
    found = [
        w4(200, 40, 32), w4(576, 136, 64), w4(1024, 130, **BIAS_GELU),
        # Zero points; rows that begin anywhere.
        w4(328, 40, 16, zeros=True), w4(2048, 136, **BIAS_GELU, zeros=True), w4(333, 40, 64),
        *(eight_bit(anchor, 267, 40) for anchor in EIGHT_BIT),
        *(Region(anchor, (("K", 333),), flags=(HALF,)) for anchor in EIGHT_BIT.values()),
        *(eight_bit(anchor, 272, 133, **BIAS_GELU) for anchor in EIGHT_BIT),
        *(Region(anchor, (("K", 384),), flags=(HALF,)) for anchor in EIGHT_BIT.values()),
    ]  # fmt: skip
    found += norms_to_check()
    if small:
        return found
    found += [w4(k, n) for k, n in W4_SHAPES[:2]]
    return found + [eight_bit(anchor, 4096, 4096) for anchor in EIGHT_BIT]


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
            self.wz: Array | None = None
            if self.region.anchor == "QMatMulW4Z4A16":
                self.wz = rng.integers(-8, 8, self.ws.shape, np.int8)
            self.given |= kernels.weights(self.w, self.ws, self.wz)
            # A row more, which must stay as it is.
            self.given["y"] = device.upload(np.full((rows + 1, self.n), np.nan, np.float16))
        else:
            self.given["q"] = device.upload(np.full((rows + 1, self.k), 7, np.uint8))
            self.given["s"] = device.upload(np.full((rows + 1, 1), np.nan, np.float32))

    def _activations(self, rng: np.random.Generator) -> Iterator[tuple[str, Array]]:
        shape = (self.rows, self.k)
        if self.region.anchor in (*FOUR_BITS, *EIGHT_BIT.values()):
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
        if self.region.anchor in FOUR_BITS:
            group = self.region.size("G")
            if self.wz is not None:
                w = w - np.repeat(self.wz[:, columns], group, axis=0)[: self.k]
            wide = w * np.repeat(ws, group, axis=0)[: self.k]
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
    if region.anchor in FOUR_BITS:
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

"""Random problems for norms with Quantize, and how far their results are off; part of `cuda.py`."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from cuda_device import Array, Kernels

from qcompiler.ir.region import HALF, Region
from qcompiler.targets.cuda.norm_plan import NORMS, quantizes_to_fp8

__all__ = ["NormProblem", "is_norm", "norms_to_check"]

_EPSILON, _TOLERANCE = 1e-5, 4e-3


def is_norm(region: Region) -> bool:
    """Whether it is one."""
    return region.anchor in NORMS


def norms_to_check() -> list[Region]:
    """Each kind; of a row that fills the threads of a block, and one that does not."""
    wanted = (("AddLayerNorm", 1000, True), ("LayerNorm", 384, False), ("AddRMSNorm", 4096, False),
              ("RMSNorm", 576, True), ("AddRMSNormFp8", 576, False))  # fmt: skip
    return [
        Region(
            anchor, (("K", k),), ("channel",) if smoothed else (),
            outputs=(*(("x",) if anchor.startswith("Add") else ()), "y", "q", "s"),
            attributes=(("epsilon", _EPSILON),),
            flags=(HALF, "smoothed") if smoothed else (HALF,),
        )
        for anchor, k, smoothed in wanted
    ]  # fmt: skip


class NormProblem:
    """Random operands of a norm, on the host and on the device."""

    def __init__(self, kernels: Kernels, rows: int, rng: np.random.Generator) -> None:
        self.kernels, self.rows, self.region = kernels, rows, kernels.region
        self.k = k = self.region.size("K")
        shapes = {"a": (rows, k), "b": (rows, k), "x": (rows, k), "gamma": (k,), "beta": (k,),
                  "extra0": (k,)}  # fmt: skip
        self.host = {
            name: rng.standard_normal(shape).astype(np.float16)
            for name, shape in shapes.items()
            if name in kernels.launches[0].parameters and name not in self.region.outputs
        }
        upload = kernels.device.upload
        self.given = {name: upload(array) for name, array in self.host.items()}
        for name in self.region.outputs:  # a row more, which must stay as it is
            shape, kind = (rows + 1, 1 if name == "s" else k), self._kind(name)
            self.given[name] = upload(np.full(shape, 7, kind))

    def error(self, rng: np.random.Generator) -> float:
        """The largest of y, as a part of the largest result; infinite if anything else is wrong."""
        self.kernels.run(self.given, self.rows)
        made = {name: self._made(name) for name in self.region.outputs}
        if any((array[-1] != 7).any() for array in made.values()):
            return float("inf")
        wide = {name: array.astype(np.float64) for name, array in self.host.items()}
        x = wide.get("x")
        if x is None:
            x = (self.host["a"].astype("f4") + self.host["b"].astype("f4")).astype("f2")
            if not np.array_equal(made["x"][:-1], x):
                return float("inf")
        expected = self._expected(x.astype(np.float64), wide)
        y = made["y"][:-1].astype(np.float64)
        worst = np.abs(y - expected).max() / np.abs(expected).max()
        return float(max(worst, self._error_of_quantize(y * wide.get("extra0", 1), made)))

    def _expected(self, x: Array, wide: dict[str, Array]) -> Array:
        if "LayerNorm" in self.region.anchor:
            x = x - x.mean(1, keepdims=True)
        y = x / np.sqrt(np.square(x).mean(1, keepdims=True) + _EPSILON) * wide["gamma"]
        return np.asarray(y + wide.get("beta", 0))

    def _error_of_quantize(self, z: Array, made: dict[str, Array]) -> float:
        fp8 = quantizes_to_fp8(self.region)
        scale = np.abs(z).max(1, keepdims=True) / (448 if fp8 else 127)
        if np.abs(made["s"][:-1] / scale - 1).max() > 1e-5:
            return float("inf")
        step = np.maximum(np.abs(z) / 8, scale * 2**-9) if fp8 else scale
        back = (made["q"][:-1].astype(np.float64) - (0 if fp8 else 128)) * made["s"][:-1]
        return float((np.abs(back - z) / step).max() / 0.51 * _TOLERANCE)

    def _made(self, name: str) -> Array:
        shape = self.rows + 1, 1 if name == "s" else self.k
        return self.kernels.device.download(self.given[name], self._kind(name), *shape)

    def _kind(self, name: str) -> type:
        narrow = ml_dtypes.float8_e4m3fn if quantizes_to_fp8(self.region) else np.uint8
        return {"q": narrow, "s": np.float32}.get(name, np.float16)

"""Quantized types: how a float tensor is stored as integers or small floats.

After MLIR's quant dialect (expressed and storage type) and torchao's granularity.  These are
facts, never graph objects: the graph is always an `onnx_ir.Model`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import ml_dtypes
import onnx_ir as ir

__all__ = [
    "Granularity",
    "PerAxis",
    "PerGroup",
    "PerTensor",
    "QuantSpec",
    "QuantType",
    "TensorStats",
]


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "tensor"


@dataclasses.dataclass(frozen=True)
class PerAxis:
    """One scale per slice along `axis` ("per channel")."""

    axis: int

    def __str__(self) -> str:
        return f"axis={self.axis}"


@dataclasses.dataclass(frozen=True)
class PerGroup:
    """One scale per `group_size` neighbours along `axis` (`block_size` at the ONNX border).

    A dynamic scale over whole rows, "per token", is `PerGroup(-1, K)`.
    """

    axis: int
    group_size: int

    def __str__(self) -> str:
        return f"axis={self.axis}/{self.group_size}"


Granularity = PerTensor | PerAxis | PerGroup


@dataclasses.dataclass(frozen=True)
class QuantType:
    """What a quantized tensor is: `expressed = (stored - zero_point) * scale`.

    Attributes:
        storage: INT8, UINT8, INT4, UINT4 or FLOAT8E4M3FN.
        expressed: The float type it stands for.
        granularity: Which elements share a scale.
        symmetric: The zero point is 0 (for UINT8: 128, the middle).
        narrow_range: -127..127 rather than -128..127, so that negation cannot overflow.
    """

    storage: ir.DataType
    expressed: ir.DataType = ir.DataType.FLOAT
    granularity: Granularity = PerTensor()
    symmetric: bool = True
    narrow_range: bool = False

    @property
    def is_float(self) -> bool:
        """Whether the storage is itself a (small) float: rounding follows the format."""
        return self.storage.is_floating_point()

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest stored value."""
        if self.is_float:
            largest = float(ml_dtypes.finfo(self.storage.numpy()).max)
            return -largest, largest
        bits = int(self.storage.bitwidth)
        if not self.storage.is_signed():
            return 0.0, float(2**bits - 1)
        return float(-(2 ** (bits - 1)) + self.narrow_range), float(2 ** (bits - 1) - 1)

    def __str__(self) -> str:
        flags = ("" if self.symmetric else ", asymmetric") + (", narrow" * self.narrow_range)
        names = f"{self.storage.name.lower()}:{self.expressed.name.lower()}"
        return f"quant<{names}, {self.granularity}{flags}>"


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """An intent: this type, with scales known before the model runs or computed while it runs."""

    type: QuantType
    scale: Literal["static", "dynamic"]

    def __str__(self) -> str:
        return f"{self.scale} {self.type}"


@dataclasses.dataclass(frozen=True)
class TensorStats:
    """What calibration saw of one tensor, in its own units."""

    minimum: float
    maximum: float

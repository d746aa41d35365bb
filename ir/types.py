"""Quantized types: how a float tensor is stored as integers, small floats or indices.

After MLIR's quant dialect (expressed and storage type) and torchao's granularity.  These are
facts, never graph objects: the graph is always an `onnx_ir.Model`.  Each has a text that parses
back, `QuantType.parse(str(t)) == t`:

    quant<int4:float, axis=0/32>               int4 in groups of 32 along axis 0
    quant<uint8:float16, tensor, asymmetric>   one scale and zero point
    quant<nf4:float, axis=1/64>                indices into a codebook
    quant<int4:float, axis=0/32, bits=3>       three bits, in the storage of four
    quant<int4:float, axis=0/32, two-level>    scales are int8 times a float per column
    quant<int4:float, axis=0/32, offset>       a group has a float for what 0 stands for
    dynamic quant<int8:float, axis=-1/384>     per token, scale computed while the model runs
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Literal

import ml_dtypes
import onnx_ir as ir

from qcompiler.ir.codebooks import CODEBOOKS, Codebook
from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.ir.granularity import Granularity, PerAxis, PerGroup, PerTensor, parse_granularity

__all__ = [
    "Granularity",
    "PerAxis",
    "PerGroup",
    "PerTensor",
    "QuantSpec",
    "QuantType",
    "TensorStats",
]

_STORAGE = {
    dtype.name.lower(): dtype
    for dtype in (
        *(ir.DataType.INT2, ir.DataType.UINT2, ir.DataType.INT4, ir.DataType.UINT4),
        *(ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16),
        *(ir.DataType.INT32, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2),
    )
}
_EXPRESSED = {
    dtype.name.lower(): dtype
    for dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
}


@dataclasses.dataclass(frozen=True)
class QuantType:
    """What a quantized tensor is: `expressed = (stored - zero_point) * scale + offset`.

    Attributes:
        storage: int2, int4, int8, int16, unsigned or not, int32 (biases), e4m3fn or e5m2.
        expressed: The float type it stands for, and of its scale: FLOAT, FLOAT16 or BFLOAT16.
        granularity: Which elements share a scale.
        symmetric: The zero point is 0, the middle of the range for an unsigned storage.
        narrow_range: -127..127 rather than -128..127, so that negation cannot overflow.
        codebook: Stored values are indices into it; the storage is then the codebook's.
        bits: Stored values are integers of so many bits, fewer than the storage has: ONNX has no
            int3, and int2 only from opset 25.
        two_level: Scales of groups of rows of a matrix are int8 times a float per column, see
            `ir/two_level.py`.
        offset: Groups of rows of a matrix have a float beside the scale, which is what a stored 0
            stands for, in place of a zero point; of two levels it has two as well.

    Raises:
        OptionError: The parts do not go together.
    """

    storage: ir.DataType
    expressed: ir.DataType = ir.DataType.FLOAT
    granularity: Granularity = dataclasses.field(default_factory=PerTensor)
    symmetric: bool = True
    narrow_range: bool = False
    codebook: Codebook | None = None
    bits: int | None = None
    two_level: bool = False
    offset: bool = False

    def __post_init__(self) -> None:
        if (mistake := self._mistake()) is not None:
            raise OptionError(f"no quantized type: {mistake}")
        problem = self._problem()
        if problem is not None:
            raise OptionError(f"{self}: {problem}")

    def _mistake(self) -> str | None:
        """A part that is of another kind than it must be."""
        for name in ("storage", "expressed"):
            if not isinstance(kind := getattr(self, name), ir.DataType):
                return f"{name} {kind!r} is no onnx_ir.DataType{_data_type_meant(kind)}"
        if not isinstance(self.granularity, Granularity):
            return f"granularity {self.granularity!r} is no PerTensor, PerAxis or PerGroup"
        if not isinstance(self.codebook, Codebook | None):
            return f"codebook {self.codebook!r} is no Codebook"
        if self.bits is not None and type(self.bits) is not int:
            return f"bits {self.bits!r}: it is a whole number"
        for name in ("symmetric", "narrow_range", "two_level", "offset"):
            if not isinstance(flag := getattr(self, name), bool):
                return f"{name} {flag!r} is neither True nor False"
        return None

    def _problem(self) -> str | None:
        if self.storage not in _STORAGE.values():
            return f"no storage type {self.storage}; there are {', '.join(_STORAGE)}"
        if self.expressed not in _EXPRESSED.values():
            return f"cannot stand for {self.expressed}, only for {', '.join(_EXPRESSED)}"
        if self.codebook is not None and self.storage is not self.codebook.storage:
            return f"indices of {self.codebook.name} are {self.codebook.storage}"
        if self.narrow_range and (self.codebook is not None or not _is_signed(self.storage)):
            return "only signed integers have a narrow range"
        if self.bits is not None and (self.codebook is not None or self.is_float):
            return "only integers have fewer bits than their storage"
        if self.bits is not None and not 2 <= self.bits < self.storage.bitwidth:
            return f"{self.bits} bits: must be 2 or more, and fewer than {self.storage} has"
        if self.two_level and not _in_groups_of_rows(self):
            return "only float scales of groups of rows, without zero points, have two levels"
        if self.offset and (not _in_groups_of_rows(self) or self.codebook or self.is_float):
            return "only integers in groups of rows, without zero points, have offsets"
        if not self.symmetric and self.codebook is not None:
            return "a codebook has no zero point, so it cannot be asymmetric"
        if not self.symmetric and (self.is_float or self.storage is ir.DataType.INT32):
            return f"{self.storage} has no zero point in ONNX, so it cannot be asymmetric"
        return None

    @functools.cached_property
    def is_float(self) -> bool:
        """Whether the storage is itself a (small) float: rounding follows the format."""
        return self.storage.is_floating_point()

    @functools.cached_property
    def range(self) -> tuple[float, float]:
        """Smallest and largest stored value; of a codebook, its smallest and largest entry."""
        if self.codebook is not None:
            return min(self.codebook.values), max(self.codebook.values)
        if self.is_float:
            largest = float(ml_dtypes.finfo(self.storage.numpy()).max)
            return -largest, largest
        bits = self.bits or int(self.storage.bitwidth)
        if not self.storage.is_signed():
            return 0.0, float(2**bits - 1)
        return float(-(2 ** (bits - 1)) + self.narrow_range), float(2 ** (bits - 1) - 1)

    @functools.cached_property
    def middle(self) -> int:
        """The zero point of a symmetric type: 0, for unsigned integers half their range."""
        if self.codebook is not None or self.storage.is_signed():
            return 0
        return int(2 ** ((self.bits or self.storage.bitwidth) - 1))

    def __str__(self) -> str:
        flags = ("" if self.symmetric else ", asymmetric") + (", narrow" * self.narrow_range)
        flags += "" if self.bits is None else f", bits={self.bits}"
        flags += ", two-level" * self.two_level + ", offset" * self.offset
        stored = self.storage.name.lower() if self.codebook is None else str(self.codebook)
        return f"quant<{stored}:{self.expressed.name.lower()}, {self.granularity}{flags}>"

    @classmethod
    def parse(cls, text: str) -> QuantType:
        """The type that `str` wrote.

        Raises:
            OptionError: Says which part of the text is wrong, and what could stand there.
        """
        pattern = r"quant<([^:,]+):(\w+), ([^,]+?)(, asymmetric)?(, narrow)?(?:, bits=(\d+))?"
        pattern += "(, two-level)?(, offset)?>"
        match = re.fullmatch(pattern, text) if isinstance(text, str) else None
        if match is None:
            raise OptionError(
                f"no quantized type: {text!r}; write quant<STORAGE:EXPRESSED, GRANULARITY>, with "
                "', asymmetric', ', narrow', ', bits=3', ', two-level' or ', offset' before the '>'"
            )
        try:
            stored, codebook = _STORAGE.get(match[1]), None
            if stored is None:
                codebook = _parse_codebook(match[1])
                stored = codebook.storage
            return cls(
                stored,
                _parse_expressed(match[2]),
                parse_granularity(match[3]),
                symmetric=match[4] is None,
                narrow_range=match[5] is not None,
                codebook=codebook,
                bits=None if match[6] is None else int(match[6]),
                two_level=match[7] is not None,
                offset=match[8] is not None,
            )
        except OptionError as error:
            raise OptionError(f"in {text!r}: {error}") from None


def _in_groups_of_rows(type: QuantType) -> bool:
    grouped = isinstance(type.granularity, PerGroup) and type.granularity.axis in (0, -2)
    return grouped and type.symmetric and type.expressed is ir.DataType.FLOAT


def _data_type_meant(kind: object) -> str:
    """How to write what somebody wrote as a text, or a type of numpy."""
    name = kind.lower() if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    known = _STORAGE | _EXPRESSED
    if name in known:
        return f": write onnx_ir.DataType.{known[name].name}"
    return f"{did_you_mean(name, known)}; there are {', '.join(known)}"


def _is_signed(storage: ir.DataType) -> bool:
    return storage.is_integer() and storage.is_signed()


def _parse_codebook(text: str) -> Codebook:
    if "[" in text or text in CODEBOOKS:
        return Codebook.parse(text)
    known = [*_STORAGE, *CODEBOOKS]
    raise OptionError(
        f"no storage type {text!r}{did_you_mean(text, known)}; there are {', '.join(known)}"
    )


def _parse_expressed(text: str) -> ir.DataType:
    if text not in _EXPRESSED:
        raise OptionError(f"no expressed type {text!r}; there are {', '.join(_EXPRESSED)}")
    return _EXPRESSED[text]


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """An intent: this type, with scales known before the model runs or computed while it runs.

    Raises:
        OptionError: The type is none, or the scale neither static nor dynamic.
    """

    type: QuantType
    scale: Literal["static", "dynamic"]

    def __post_init__(self) -> None:
        if not isinstance(self.type, QuantType):
            raise OptionError(f"no type {self.type!r}: it is a QuantType")
        if self.scale not in ("static", "dynamic"):
            raise OptionError(f"no scale {self.scale!r}: it is static or dynamic")

    def __str__(self) -> str:
        return f"{self.scale} {self.type}"

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """The intent that `str` wrote.

        Raises:
            OptionError: Says which part of the text is wrong, and what could stand there.
        """
        scale, _, type = text.partition(" ") if isinstance(text, str) else (text, "", "")
        if scale not in ("static", "dynamic"):
            raise OptionError(f"in {text!r}: no scale {scale!r}: write static or dynamic first")
        return cls(QuantType.parse(type), scale)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class TensorStats:
    """What calibration saw of one tensor, in its own units."""

    minimum: float
    maximum: float

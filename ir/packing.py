"""How numbers of 2 and 4 bits lie in bytes, here and elsewhere.

The one convention inside is ONNX's: the first element in the lowest bits, two's complement for
int4 and int2, plain codes for uint4 and uint2, which have a zero point.  Whatever comes packed
otherwise is unpacked at the border into an array of that storage, and only there:

    unpack(packed, length, PackedFormat("offset"))               codes 0..15 mean -8..7
    unpack(packed, length, PackedFormat("sign-magnitude", high_first=True))
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.errors import ModelError, OptionError

__all__ = ["ONNX", "Encoding", "PackedFormat", "pack", "unpack"]

Encoding = Literal[
    "twos-complement",
    "unsigned",
    "offset",
    "sign-magnitude",
    "sign-magnitude-without-negative-zero",
]
"""What a code means:

* "twos-complement": 1000 is -8, 1111 is -1;
* "unsigned": the code itself, to be read with a zero point (which may be packed the same way);
* "offset": the code less 8, an unsigned one whose zero point 8 goes without saying;
* "sign-magnitude": the high bit is the sign: 1111 is -7, and 1000, a negative zero, is 0;
* "sign-magnitude-without-negative-zero": the same, but 1000 is -8.
"""


@dataclasses.dataclass(frozen=True)
class PackedFormat:
    """How numbers of a few bits are packed into bytes.

    Attributes:
        encoding: What a code means.
        bits: 2 or 4.
        high_first: The first element is in the highest bits of its byte, not in the lowest.

    Raises:
        OptionError: There is no such encoding or width.
    """

    encoding: Encoding = "twos-complement"
    bits: Literal[2, 4] = 4
    high_first: bool = False

    def __post_init__(self) -> None:
        if self.encoding not in get_args(Encoding):
            known = ", ".join(get_args(Encoding))
            raise OptionError(f"no encoding {self.encoding!r}; there are {known}")
        if type(self.bits) is not int or self.bits not in (2, 4):
            raise OptionError(f"no packing of {self.bits!r} bits, only of 2 and 4")
        if not isinstance(self.high_first, bool):
            raise OptionError(f"high_first {self.high_first!r} is neither True nor False")

    @property
    def storage(self) -> ir.DataType:
        """What it is unpacked to."""
        sign = "U" if self.encoding == "unsigned" else ""
        return ir.DataType[f"{sign}INT{self.bits}"]

    @property
    def meanings(self) -> tuple[int, ...]:
        """The number that each code stands for."""
        half = 1 << (self.bits - 1)
        magnitudes = range(half)
        match self.encoding:
            case "unsigned":
                return tuple(range(2 * half))
            case "offset":
                return tuple(range(-half, half))
            case "twos-complement":
                return (*magnitudes, *range(-half, 0))
            case "sign-magnitude":
                return (*magnitudes, *(-m for m in magnitudes))
            case "sign-magnitude-without-negative-zero":
                return (*magnitudes, -half, *(-m for m in magnitudes[1:]))

    @property
    def _shifts(self) -> NDArray[np.uint8]:
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
        return shifts[::-1] if self.high_first else shifts


ONNX = PackedFormat()
"""ONNX's own int4."""


def unpack(packed: NDArray[np.uint8], length: int, format: PackedFormat) -> NDArray[Any]:
    """The numbers in packed bytes.

    Args:
        packed: uint8 [..., bytes]; each row begins with a byte of its own.
        length: Numbers in a row.
        format: How they are packed.

    Returns:
        [..., length] of `format.storage`.

    Raises:
        ModelError: So many numbers take another number of bytes.
    """
    needed = -(-length * format.bits // 8)
    if packed.dtype != np.uint8 or packed.ndim == 0 or packed.shape[-1] != needed:
        raise ModelError(
            f"packed data is {packed.dtype} {list(packed.shape)}: {length} numbers of "
            f"{format.bits} bits take {needed} bytes of uint8 in the last axis"
        )
    codes = (packed[..., None] >> format._shifts) & np.uint8((1 << format.bits) - 1)
    codes = codes.reshape(*packed.shape[:-1], needed * 8 // format.bits)[..., :length]
    numbers = np.asarray(format.meanings, np.int8)[codes]
    return np.asarray(numbers.astype(format.storage.numpy()))


def pack(numbers: NDArray[Any], format: PackedFormat) -> NDArray[np.uint8]:
    """The inverse of `unpack`; what is left of the last byte is 0.

    Args:
        numbers: Integers [..., length].
        format: How to pack them.  A negative zero is never written.

    Returns:
        uint8 [..., bytes].

    Raises:
        ModelError: A number has no code in that format, as -8 has none in sign and magnitude, and
            1.5 in any.
    """
    wide = numbers.astype(np.float64)  # which holds fractions too, and those have no code
    half = 1 << (format.bits - 1)
    code_of = np.full(3 * half, -1, np.int64)  # of -half to 2 * half - 1
    # Backwards, so that of two codes of 0 the positive one stays.
    for code, meaning in reversed(list(enumerate(format.meanings))):
        code_of[meaning + half] = code
    inside = (wide >= -half) & (wide < 2 * half) & (wide == np.floor(wide))
    codes = np.where(inside, code_of[np.where(inside, wide + half, 0).astype(np.int64)], -1)
    if (codes < 0).any():
        raise ModelError(
            f"{wide[codes < 0][0]:.15g} has no code in {format.bits} bits of {format.encoding}"
        )
    shifts = format._shifts
    *rows, length = codes.shape
    padding = [(0, 0)] * len(rows) + [(0, -length % len(shifts))]
    padded = np.pad(codes.astype(np.uint8), padding)
    grouped = padded.reshape(*rows, -(-length // len(shifts)), len(shifts))
    return np.asarray(np.bitwise_or.reduce(grouped << shifts, axis=-1))

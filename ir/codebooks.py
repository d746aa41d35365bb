"""Codebooks: stored values are indices into a short table of floats.

    expressed = values[stored] * scale

In ONNX that is a Gather (and a Mul): no operator set has a DequantizeLinear for nf4, and ONNX
Runtime 1.31 has none for fp4.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.errors import OptionError, did_you_mean

__all__ = ["CODEBOOKS", "FP4", "NF4", "Codebook"]


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A table of floats.

    Attributes:
        name: An identifier, the name in texts.
        values: 2 to 256 finite floats in any order; at least one is above 0.

    Raises:
        OptionError: The name or the values are something else.
    """

    name: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise OptionError(f"codebook {self.name!r}: the name must be an identifier")
        try:
            # Numbers of numpy print as something that does not parse back.
            object.__setattr__(self, "values", tuple(map(float, self.values)))
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"codebook {self.name!r}: its values are no floats: {error}"
            ) from None
        if not 2 <= len(self.values) <= 256:
            raise OptionError(
                f"codebook {self.name!r} has {len(self.values)} values, it needs 2 to 256"
            )
        bad = [value for value in self.values if not math.isfinite(value)]
        if bad:
            raise OptionError(f"codebook {self.name!r} holds {bad[0]}, all values must be finite")
        if max(self.values) <= 0:
            raise OptionError(f"codebook {self.name!r} has no value above 0 to scale to")

    @property
    def storage(self) -> ir.DataType:
        """The narrowest unsigned type that holds every index."""
        if len(self.values) <= 4:
            return ir.DataType.UINT2
        return ir.DataType.UINT4 if len(self.values) <= 16 else ir.DataType.UINT8

    def nearest(self, numbers: NDArray[Any]) -> NDArray[np.intp]:
        """The index of the entry nearest to each number.

        Halfway between two entries the even index wins, which for fp4, whose lowest bit is its
        mantissa, is rounding half to even; if that does not tell them apart, the one farther from
        0, which gives -0.0 the zero of its sign where there are two.  NaN takes the smallest entry.
        """
        order = np.asarray(sorted(range(len(self.values)), key=self._sort_key))
        entries = np.asarray(self.values, np.float64)[order]
        borders = np.asarray([(a + b) / 2 for a, b in itertools.pairwise(entries)])
        numbers = np.where(np.isnan(numbers), -np.inf, np.asarray(numbers, np.float64))
        below = order[np.searchsorted(borders, numbers, side="left")]
        above = order[np.searchsorted(borders, numbers, side="right")]
        even = below % 2 == 0
        wants_below = np.where(even == (above % 2 == 0), np.signbit(numbers), even)
        nearest: NDArray[np.intp] = np.where(wants_below, below, above)
        return nearest

    def _sort_key(self, index: int) -> tuple[float, float]:
        value = self.values[index]
        return value, math.copysign(1.0, value)

    def __str__(self) -> str:
        if CODEBOOKS.get(self.name) == self:
            return self.name
        return f"{self.name}[{' '.join(map(repr, self.values))}]"

    @classmethod
    def parse(cls, text: str) -> Codebook:
        """The codebook that `str` wrote.

        Raises:
            OptionError: It is neither a known name nor `name[value value ...]`.
        """
        if isinstance(text, str) and text in CODEBOOKS:
            return CODEBOOKS[text]
        match = re.fullmatch(r"(\w+)\[([^\]]*)\]", str(text))
        if match is None:
            raise OptionError(
                f"no codebook {text!r}{did_you_mean(str(text), CODEBOOKS)}; known are "
                f"{', '.join(CODEBOOKS)}, others are written name[value value ...]"
            )
        return cls(match[1], match[2].split())  # type: ignore[arg-type]


_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

FP4 = Codebook("fp4", (*_POSITIVE, *(-value for value in _POSITIVE)))
"""e2m1, as ONNX's FLOAT4E2M1: an index is the number's bits, sign first."""

NF4 = Codebook(
    "nf4",
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip
"""Quantiles of the normal distribution, 0 and both ends among them (QLoRA, arXiv:2305.14314)."""

CODEBOOKS = {book.name: book for book in (NF4, FP4)}

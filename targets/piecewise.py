"""Functions of a magnitude as cubic polynomials on equal segments, for lookup by vector permutes.

Sixteen or thirty-two coefficients fit in one or two registers, so a lookup is one instruction where
an exponential and a rational function take twenty.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

__all__ = ["GELU_TAILS", "SEGMENTS", "Piecewise"]

SEGMENTS = 32
_TERMS = 4

Function = Callable[[float], float]


@dataclasses.dataclass(frozen=True)
class Piecewise:
    """A function on [0, last], constant from there on.

    Attributes:
        step: Distance of the middles of two segments; the first segment begins at its middle, 0.
        coefficients: For each power of x / step - i, one number per segment i.
    """

    step: float
    coefficients: tuple[tuple[float, ...], ...]

    @property
    def last(self) -> float:
        """The middle of the last segment."""
        return self.step * (SEGMENTS - 1)


def fit(function: Function, last: float) -> Piecewise:
    """Interpolate `function` at the Chebyshev nodes of each segment.

    Args:
        function: Smooth, with function(0) = 0, which the fit has too: near it errors are relative.
        last: Where it has reached its limit.
    """
    step = last / (SEGMENTS - 1)
    segments = [_origin(function, step)]
    segments += [_segment(function, step, index) for index in range(1, SEGMENTS)]
    return Piecewise(step, tuple(zip(*segments, strict=True)))


def _segment(function: Function, step: float, index: int) -> list[float]:
    nodes = [math.cos(math.pi * (2 * i + 1) / (2 * _TERMS)) / 2 for i in range(_TERMS)]
    return _interpolate(nodes, [function(step * (index + node)) for node in nodes])


def _origin(function: Function, step: float) -> list[float]:
    """The half segment that begins at 0, with constant term 0: x times a fit of function(x) / x."""
    count = _TERMS - 1
    nodes = [(1 + math.cos(math.pi * (2 * i + 1) / (2 * count))) / 4 for i in range(count)]
    return [0.0, *_interpolate(nodes, [function(step * node) / node for node in nodes])]


def _interpolate(nodes: list[float], values: list[float]) -> list[float]:
    """Coefficients, from the constant up, of the polynomial through these points."""
    powers = np.vander(nodes, increasing=True)
    return [float(coefficient) for coefficient in np.linalg.solve(powers, values)]


def _exact_tail(x: float) -> float:
    return x * math.erfc(x / math.sqrt(2)) / 2


def _tanh_tail(x: float) -> float:
    return x / (1 + math.exp(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Beyond the last segment a tail is less than 1.1e-7.
GELU_TAILS = {"none": fit(_exact_tail, 5.5), "tanh": fit(_tanh_tail, 5.1)}
"""max(x, 0) - GELU(x) as a function of |x|, for each way to approximate it; good to 6e-7."""

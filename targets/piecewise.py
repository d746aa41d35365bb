"""Functions of a magnitude as polynomials on equal segments, for lookup by vector permutes.

Eight or thirty-two coefficients fit in one or two registers: a lookup is one instruction where an
exponential and a rational function take twenty.  The polynomials are of x itself, not of its
distance to the middle of a segment, which would be two more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["GELU_TAILS", "Piecewise"]

_TERMS = {8: 5, 32: 3}
"""How many coefficients a polynomial needs, by the number of segments."""

Function = Callable[[float], float]


@dataclasses.dataclass(frozen=True)
class Piecewise:
    """A function on [0, last], constant from there on.

    Attributes:
        step: Distance of the middles of two segments; the first segment begins at its middle, 0.
        coefficients: For each power of x, one number per segment.
    """

    step: float
    coefficients: tuple[tuple[float, ...], ...]

    @property
    def segments(self) -> int:
        """How many there are."""
        return len(self.coefficients[0])

    @property
    def last(self) -> float:
        """The middle of the last segment."""
        return self.step * (self.segments - 1)


def fit(function: Function, last: float, segments: int) -> Piecewise:
    """Interpolate `function` at the Chebyshev nodes of each segment.

    Args:
        function: Smooth, with function(0) = 0, which the fit has too: near it errors are relative.
        last: Where it has reached its limit.
        segments: 8 or 32.
    """
    step, terms = last / (segments - 1), _TERMS[segments]
    fits = [_origin(function, step, terms)]
    fits += [_segment(function, step, terms, index) for index in range(1, segments)]
    of_x = [_of_x(coefficients, index, step) for index, coefficients in enumerate(fits)]
    return Piecewise(step, tuple(zip(*of_x, strict=True)))


def _segment(function: Function, step: float, terms: int, index: int) -> list[float]:
    nodes = [math.cos(math.pi * (2 * i + 1) / (2 * terms)) / 2 for i in range(terms)]
    return _interpolate(nodes, [function(step * (index + node)) for node in nodes])


def _origin(function: Function, step: float, terms: int) -> list[float]:
    """The half segment that begins at 0, with constant term 0: x times a fit of function(x) / x."""
    count = terms - 1
    nodes = [(1 + math.cos(math.pi * (2 * i + 1) / (2 * count))) / 4 for i in range(count)]
    return [0.0, *_interpolate(nodes, [function(step * node) / node for node in nodes])]


def _interpolate(nodes: list[float], values: list[float]) -> list[float]:
    """Coefficients, from the constant up, of the polynomial through these points."""
    powers = np.vander(nodes, increasing=True)
    return [float(coefficient) for coefficient in np.linalg.solve(powers, values)]


def _of_x(coefficients: Sequence[float], index: int, step: float) -> list[float]:
    """Those of a polynomial of x / step - index, as one of x."""
    position = np.polynomial.Polynomial([-index, 1 / step])
    return [float(c) for c in np.polynomial.Polynomial(coefficients)(position).coef]


def _exact_tail(x: float) -> float:
    return x * math.erfc(x / math.sqrt(2)) / 2


def _tanh_tail(x: float) -> float:
    return x / (1 + math.exp(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Beyond the last segment a tail is less than 1.1e-7.
GELU_TAILS = {
    segments: {"none": fit(_exact_tail, 5.5, segments), "tanh": fit(_tanh_tail, 5.1, segments)}
    for segments in _TERMS
}
"""max(x, 0) - GELU(x) as a function of |x|, by the number of segments, for each way to approximate
it; good to 3e-5, a hundredth of what 8 bits can tell apart up to 1."""

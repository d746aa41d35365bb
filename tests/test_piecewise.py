"""Functions on equal segments, in float64: what the tables promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qcompiler.targets.piecewise import GELU_TAILS, Piecewise


def evaluate(pieces: Piecewise, x: np.ndarray) -> np.ndarray:
    bounded = np.minimum(x, pieces.last)
    index = np.rint(bounded / pieces.step).astype(int)
    powers = bounded[None] ** np.arange(len(pieces.coefficients))[:, None]
    return (np.array(pieces.coefficients)[:, index] * powers).sum(0)


def exact(x: float) -> float:
    return x - x * (1 + math.erf(x / math.sqrt(2))) / 2


def tanh(x: float) -> float:
    return x - x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


@pytest.mark.parametrize("segments", list(GELU_TAILS))
@pytest.mark.parametrize(("approximate", "gelu_tail"), [("none", exact), ("tanh", tanh)])
def test_gelu_tails_agree_with_their_definition(approximate, gelu_tail, segments):
    pieces = GELU_TAILS[segments][approximate]
    assert all(len(row) == segments for row in pieces.coefficients)
    x = np.linspace(0, 12, 20001)
    expected = np.array([gelu_tail(value) for value in x])
    assert np.abs(evaluate(pieces, x) - expected).max() < 3e-5


@pytest.mark.parametrize("segments", list(GELU_TAILS))
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_near_zero_the_error_is_relative(approximate, segments):
    pieces = GELU_TAILS[segments][approximate]
    x = np.geomspace(1e-12, 1e-3, 100)
    assert np.abs(evaluate(pieces, x) / (x / 2) - 1).max() < 2e-3
    assert evaluate(pieces, np.zeros(1)) == 0

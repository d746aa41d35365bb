"""Grids of groups whose zero points are floats: found again, of least squares, by all roundings."""

import numpy as np
import pytest
from golden import sqnr
from offset_groups import FEEDS, K, N, W, type_of

from qcompiler.ir.two_level import on_two_levels, split_scale
from qcompiler.passes.gptq import GPTQ, gptq
from qcompiler.passes.hqq import HQQ, hqq
from qcompiler.passes.offset_grid import fitted_offsets, whole_range
from qcompiler.passes.rounded_weight import RoundedWeight
from qcompiler.passes.weight_grid import Grid, rounded_on, weight_grid

RNG = np.random.default_rng(1)


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("bits", [None, 2])
def test_what_lies_on_a_grid_with_a_minimum_is_found_again(two_level, bits):
    """As of Q4_1 of llama.cpp: the ends of the range are the ends of the codes."""
    type = type_of(two_level=two_level, bits=bits)
    first, last = type.range
    codes = RNG.integers(first, last + 1, (K, N)).astype(np.float32)
    codes[::32], codes[1::32] = first, last
    scale = RNG.uniform(1, 2, (3, N)).astype(np.float32)
    offset = RNG.standard_normal((3, N)).astype(np.float32)
    if two_level:
        scale, offset = on_two_levels(scale), on_two_levels(offset, zero=True)
    rows = np.arange(K) // 32
    weight = codes * scale[rows] + offset[rows]
    for range in ("max", "mse"):
        rounded = rounded_on(weight, type, weight_grid(weight, type, range))
        assert (rounded.stored.astype(int) == codes).all()
        assert sqnr(weight, rounded.floats(type)) > (44 if two_level else 120)


def test_offsets_of_least_squares_beat_the_range_and_integer_zero_points():
    errors = {}
    for kind, range in (("float", "max"), ("float", "mse"), ("integer", "mse"), ("none", "mse")):
        type = type_of(kind)
        rounded = rounded_on(W, type, weight_grid(W, type, range))
        errors[kind, range] = np.square(W - rounded.floats(type)).sum()
    best = errors.pop(("float", "mse"))
    assert best < 0.95 * min(errors.values())


def test_little_is_left_to_win_by_trying_every_grid():
    """Of one group per column, against 60 x 60 scales and offsets."""
    type, weight = type_of(), W[:32]
    counts = RNG.uniform(0.1, 1, (32, 1)).astype(np.float32)

    def error(scale, offset):
        codes = np.clip(np.rint((weight - offset) / scale), -8, 7)
        return (counts * np.square(weight - codes * scale - offset)).sum(0)

    scale, offset = whole_range(weight, type)
    tried = [
        error(scale * part, offset + move * scale)
        for part in np.linspace(0.6, 1.1, 60)
        for move in np.linspace(-2, 2, 60)
    ]
    found, best = error(*fitted_offsets(weight, type, counts)), np.min(tried, axis=0)
    assert found.sum() < 1.1 * best.sum() and found.sum() < 0.9 * error(scale, offset).sum()


def test_a_step_at_0_where_most_weights_are_close_to_it():
    """A few weights far out make steps wide: the ends of the range are no longer what matters."""
    type, weight = type_of(), RNG.standard_normal((32, 40)).astype(np.float32) / 50
    weight[0], weight[1] = 1, RNG.uniform(-2, -0.5, 40)

    def error(scale, offset):
        return np.square(weight - np.clip(np.rint((weight - offset) / scale), -8, 7) * scale
                         - offset).sum(0)  # fmt: skip

    step = (weight.max(0) - weight.min(0)) / 15
    ends = error(step, weight.min(0) + 8 * step)
    scale, offset = whole_range(weight, type)
    assert (error(scale, offset) <= 1.001 * ends).all()
    assert error(scale, offset).sum() < 0.5 * ends.sum()
    assert (np.abs(offset / scale - np.rint(offset / scale)) < 1e-5).mean() > 0.5


def test_rows_that_count_for_nothing_and_constant_groups():
    type, weight = type_of(), W.copy()
    weight[:32, 3], weight[32:64, 4] = 0.7, 0.0
    for rows in (None, np.zeros((K, 1), np.float32), (np.arange(K) < 5).astype("f4")[:, None]):
        importance = None if rows is None else rows[:, 0]
        for range in ("max", "mse"):
            grid = weight_grid(weight, type, range, importance)
            floats = rounded_on(weight, type, grid).floats(type)
            assert np.isfinite(grid.scale).all() and (grid.scale > 0).all()
            np.testing.assert_allclose(floats[:32, 3], 0.7, rtol=1e-6)
            np.testing.assert_allclose(floats[32:64, 4], 0, atol=1e-12)
            assert sqnr(weight, floats) > 15


@pytest.mark.parametrize("kind", ["integer", "float"])
@pytest.mark.parametrize("group", [16, 24, 128])
def test_gptq_and_hqq_know_them(kind, group):
    type = type_of(kind, group)
    x = FEEDS["x"].reshape(-1, K) @ RNG.standard_normal((K, K)).astype(np.float32)
    nearest = rounded_on(W, type, weight_grid(W, type, "max"))
    by_gptq, _ = gptq(W, x.T @ x / len(x), type, GPTQ.Options())
    errors = [np.square(x @ (W - r.floats(type))).sum() for r in (nearest, by_gptq)]
    assert errors[1] < 0.5 * errors[0]
    fitted = hqq(W, type, HQQ.Options())
    if kind == "float":  # hqq starts from a whole number, and moves on
        start = np.rint(nearest.offset / nearest.scale) * nearest.scale
        nearest = rounded_on(W, type, Grid(nearest.scale, None, start))
    squares = [np.square(W - r.floats(type)).sum() for r in (nearest, fitted)]
    assert squares[1] < squares[0] if kind == "float" else squares[1] == squares[0]
    for rounded in (by_gptq, fitted):
        again = RoundedWeight.from_arrays(rounded.to_arrays(), type)
        np.testing.assert_array_equal(again.floats(type), rounded.floats(type))


def test_int8_offsets_keep_their_zeros():
    offsets = np.asarray([[0, 0], [1, 0], [-2, 0]], np.float32)
    groups, _ = split_scale(offsets, zero=True)
    assert groups[0].tolist() == [0, 0] and groups[:, 1].tolist() == [0, 0, 0]
    np.testing.assert_allclose(on_two_levels(offsets, zero=True), offsets, rtol=0.01)

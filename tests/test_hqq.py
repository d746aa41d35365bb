"""hqq: text, and zero points that it moves to where the error is less."""

import dataclasses
import tracemalloc

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_rewrites
from planned_norm import FEEDS, K, N, planned

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.types import PerGroup, QuantType
from qcompiler.passes.hqq import HQQ, hqq
from qcompiler.passes.weight_grid import rounded_on, weight_grid

RNG = np.random.default_rng(0)


def test_hqq_becomes_the_same_graph_as_rounding_to_nearest():
    after = """
        inputs x
        v4 = DequantizeLinear {'axis': '0', 'block_size': '64'} (v2, v3)
        v7 = LayerNormalization {'axis': '-1'} (x, v5, v6)
        o = MatMul  (v7, v4)
        outputs o
    """
    assert_rewrites(HQQ(), planned(rounding="hqq"), after, FEEDS, exact=False, floor_db=17)


def filled(weight, size):
    return np.pad(weight, ((0, -len(weight) % size), (0, 0)))


@pytest.mark.parametrize("two_level", [False, True])
def test_hqq_fits_a_shorter_group_as_if_zeros_filled_it_up(two_level):
    type = QuantType(
        ir.DataType.INT4, granularity=PerGroup(0, 24), offset=True, two_level=two_level
    )
    weight = RNG.standard_t(3, (K, N)).astype(np.float32)
    assert len(weight) % 24
    one, other = hqq(weight, type, HQQ.Options()), hqq(filled(weight, 24), type, HQQ.Options())
    np.testing.assert_array_equal(one.floats(type), other.floats(type)[: len(weight)])


@pytest.mark.parametrize("granularity", [PerGroup(0, 32), PerGroup(0, 16), PerGroup(0, K)])
@pytest.mark.parametrize("start", ["max", "mse"])
def test_hqq_moves_zero_points_to_where_the_error_is_less(granularity, start):
    type = QuantType(ir.DataType.INT4, granularity=granularity, offset=True)
    weight = RNG.standard_t(3, (K, N)).astype(np.float32)
    first = weight_grid(weight, type, start)
    if start == "max":  # from a whole number
        first = dataclasses.replace(first, offset=np.rint(first.offset / first.scale) * first.scale)
    fitted = hqq(weight, type, HQQ.Options(range=start))
    losses = [
        np.square(weight - r.floats(type)).sum() for r in (rounded_on(weight, type, first), fitted)
    ]
    assert losses[1] < losses[0]
    np.testing.assert_array_equal(fitted.scale, first.scale)
    moved = np.abs(fitted.offset - first.offset) / first.scale
    assert 0 < moved.mean() < 0.5


def test_hqq_finds_the_grid_that_weights_once_lay_on():
    """Its zero points are no whole numbers, where it starts."""
    type = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 32), offset=True)
    rng = np.random.default_rng(3)
    levels = rng.integers(-8, 8, (2, 32, N))
    levels[:, 0], levels[:, 1] = -8, 7
    step, zero = rng.uniform(0.1, 1, (2, 1, N)), rng.uniform(-9, 9, (2, 1, N))
    weight = np.asarray((levels + zero) * step, np.float32).reshape(64, N)
    np.testing.assert_allclose(hqq(weight, type, HQQ.Options()).floats(type), weight, atol=1e-4)


def test_hqq_makes_no_copies_of_a_weight_in_each_step():
    weight = np.random.default_rng(3).standard_normal((512, 8192), dtype=np.float32)
    type = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 128), offset=True)
    tracemalloc.start()
    try:
        hqq(weight, type, HQQ.Options())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * weight.nbytes


def test_a_clipped_weight_does_not_move_the_zero_point_of_all_others():
    """What the end of the range cuts off is an outlier: by least squares alone it counts whole."""
    type = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 16), offset=True)
    weight = np.arange(-8, 8, dtype=np.float32)[:, None] + np.float32(0.02)
    weight[-1] += 0.9
    fits = [hqq(weight, type, HQQ.Options(norm=norm)) for norm in (0.7, 2)]
    errors = [np.median(np.abs(weight - fit.floats(type))) for fit in fits]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_offsets_hqq_rounds_to_nearest_and_says_so(symmetric):
    type = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 32), symmetric=symmetric)
    weight = np.random.default_rng(1).standard_t(3, (K, N)).astype(np.float32)
    nearest = rounded_on(weight, type, weight_grid(weight, type, "max"))
    fitted = hqq(weight, type, HQQ.Options())
    np.testing.assert_array_equal(fitted.floats(type), nearest.floats(type))
    model = planned(rounding="hqq")
    HQQ()(model)
    assert (
        "rounded to nearest: hqq fits zero points that are floats"
        in decision_of(model.graph[-1]).why
    )

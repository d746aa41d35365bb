"""The grids that weights are rounded on: the whole range, least squares, what counts."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.types import PerAxis, PerGroup, QuantType
from qcompiler.passes.weight_grid import rounded_on, weight_grid

K, N = 64, 48
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("range", ["max", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_weights_are_exact_enough(range, symmetric):
    type = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 16), symmetric=symmetric)
    weight = np.zeros((32, 3), np.float32)
    weight[:, 1] = 0.7
    rounded = rounded_on(weight, type, weight_grid(weight, type, range))
    np.testing.assert_allclose(rounded.floats(type), weight, atol=0.051)


def test_an_asymmetric_grid_is_never_worse_than_the_whole_range():
    type = QuantType(ir.DataType.UINT4, granularity=PerGroup(0, 32), symmetric=False)
    weight = (np.random.default_rng(2).standard_t(4, (K, N)) + 0.4).astype(np.float32)
    errors = []
    for range in ("max", "mse"):
        floats = rounded_on(weight, type, weight_grid(weight, type, range)).floats(type)
        errors.append(np.square(weight - floats).reshape(2, 32, N).sum(1))
    assert (errors[1] <= errors[0] * 1.0001).all() and errors[1].sum() < 0.95 * errors[0].sum()


def test_groups_that_nothing_counts_in_keep_the_whole_range():
    """Channels that no sample reached."""
    type = QuantType(ir.DataType.UINT4, granularity=PerGroup(0, 32), symmetric=False)
    weight = RNG.standard_normal((K, N), dtype=np.float32)
    dead, whole = weight_grid(weight, type, "mse", np.zeros(K)), weight_grid(weight, type, "max")
    floats = [rounded_on(weight, type, grid).floats(type) for grid in (dead, whole)]
    np.testing.assert_allclose(*floats, rtol=1e-6)


@pytest.mark.parametrize(("bits", "less"), [(None, 0.925), (3, 0.982)])
def test_whole_zero_points_are_better_than_none(bits, less):
    """What is cut off need not be the same on both sides, so the zero point is searched for too."""
    errors = []
    for more in ({}, {"symmetric": False}):
        type = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 32), bits=bits, **more)
        weight = np.random.default_rng(3).standard_normal((256, 512), dtype=np.float32)
        floats = rounded_on(weight, type, weight_grid(weight, type, "mse")).floats(type)
        errors.append(np.square(weight - floats).sum())
    assert errors[1] < less * errors[0]  # 0.939 and 0.986 with zero points as the range has them


def test_importance_spares_what_counts():
    type = QuantType(ir.DataType.INT4, granularity=PerAxis(1))
    weight = RNG.standard_t(3, (K, N)).astype(np.float32)
    importance = np.where(np.arange(K) < 4, 100, 0.01).astype(np.float32)
    errors = []
    for counts in (None, importance):
        rounded = rounded_on(weight, type, weight_grid(weight, type, "mse", counts))
        errors.append(np.square(weight - rounded.floats(type))[:4].sum())
    assert errors[1] < 0.8 * errors[0]

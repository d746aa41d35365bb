"""Scales and zero points of values: no value is cut off, all scales are normal numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from quantized_types import GRANULARITIES, STORED, D

from qcompiler.ir.arithmetic import (
    dequantize,
    quantize,
    scale_and_zero_point,
    weight_scale,
)
from qcompiler.ir.errors import ModelError
from qcompiler.ir.types import PerAxis, PerGroup, QuantType


def half_a_step(scale, type, shape):
    """Half the distance of two integers, with what two roundings to the expressed type add."""
    steps = scale.astype(np.float64)
    if isinstance(type.granularity, PerGroup):
        steps = np.repeat(steps, type.granularity.group_size, type.granularity.axis)
        steps = steps[: shape[0], : shape[1]]
    elif type.granularity == PerAxis(0):
        steps = steps[:, None]
    return steps * 0.5001


weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
    elements=st.floats(-1e4, 1e4, width=32),
)


@settings(deadline=None, max_examples=80)
@given(weights, st.sampled_from(GRANULARITIES), st.sampled_from(STORED[:8]), st.booleans())
def test_rounding_errs_by_at_most_half_a_step(weight, granularity, storage, symmetric):
    type = QuantType(storage, granularity=granularity, symmetric=symmetric)
    scale, zero_point = scale_and_zero_point(weight, type)
    assert scale.shape == zero_point.shape == granularity.scale_shape(weight.shape)
    assert zero_point.dtype == storage.numpy()
    back = dequantize(quantize(weight, scale, type, zero_point), scale, type, zero_point)
    error = np.abs(back.astype(np.float64) - weight)
    assert (error <= half_a_step(scale, type, weight.shape) + np.abs(weight) * 1e-6).all()
    zero = np.zeros_like(weight)
    stored = quantize(zero, scale, type, zero_point)
    assert not dequantize(stored, scale, type, zero_point).any()


@pytest.mark.parametrize("expressed", [D.FLOAT16, D.BFLOAT16])
@pytest.mark.parametrize("storage", [D.INT4, D.INT16, D.FLOAT8E4M3FN])
def test_narrow_scales_are_rounded_up(expressed, storage):
    values = np.random.default_rng(0).standard_normal((64, 50)).astype(expressed.numpy())
    type = QuantType(storage, expressed, PerAxis(1))
    scale = weight_scale(values, type)
    assert scale.dtype == values.dtype
    largest = np.abs(values.astype(np.float64)).max(axis=0)
    assert (largest <= scale.astype(np.float64) * type.range[1]).all()


@pytest.mark.parametrize("values", [np.zeros((4, 6)), np.full((4, 6), 1e-42), np.zeros((0, 6))])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("expressed", [D.FLOAT, D.FLOAT16])
def test_scales_of_nothing_are_normal_numbers(values, granularity, expressed):
    values = values.astype(expressed.numpy())
    for symmetric in (True, False):
        type = QuantType(D.INT8, expressed, granularity, symmetric)
        scale, zero_point = scale_and_zero_point(values, type)
        assert (scale >= np.finfo(scale.dtype).smallest_normal).all()
        assert scale.shape == granularity.scale_shape(values.shape)
        stored = quantize(values, scale, type, zero_point)
        assert not dequantize(stored, scale, type, zero_point).any()


def test_the_whole_span_of_float32_has_a_scale():
    largest = float(np.finfo(np.float32).max)
    values = np.asarray([-largest, largest], np.float32)
    scale, zero_point = scale_and_zero_point(values, QuantType(D.UINT8, symmetric=False))
    assert np.isfinite(scale)
    assert zero_point in (127, 128)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_range_of_what_is_not_finite_is_refused(bad):
    with pytest.raises(ModelError, match="values that hold NaN or Inf"):
        scale_and_zero_point(np.asarray([1, bad], np.float32), QuantType(D.INT8, symmetric=False))

"""Scales of the least squared error, against the largest magnitude's and a dense search."""

import dataclasses
import re

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of, run, sqnr
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.ir import clipped_scale as module
from qcompiler.ir.arithmetic import dequantize, quantize, weight_scale
from qcompiler.ir.clipped_scale import clipped_scale, signed_scale
from qcompiler.ir.errors import OptionError
from qcompiler.ir.types import PerAxis, PerGroup, PerTensor, QuantType
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.options import configured
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
GRANULARITIES = [PerTensor(), PerAxis(0), PerAxis(-1), PerGroup(0, 16), PerGroup(-1, 16)]
INT4 = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 16))


def rounded(weight, scale, type):
    return dequantize(quantize(weight, scale, type), scale, type)


def noise(weight, scale, type, importance=1.0):
    """The squared error of each slice, in the shape of the scale."""
    error = importance * np.square(rounded(weight, scale, type).astype(np.float64) - weight)
    match type.granularity:
        case PerTensor():
            return error.sum()
        case PerAxis(axis):
            return error.sum(axis=1 - axis % 2)
        case PerGroup(axis, size):
            return np.add.reduceat(error, np.arange(0, weight.shape[axis], size), axis=axis)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("storage", ["INT2", "INT4", "INT8", "FLOAT8E4M3FN"])
def test_no_slice_loses_and_the_whole_gains(storage, granularity):
    type = QuantType(ir.DataType[storage], granularity=granularity)
    weight = RNG.standard_t(4, (72, 40)).astype(np.float32)
    scale, widest = clipped_scale(weight, type), weight_scale(weight, type)
    assert scale.shape == widest.shape and scale.dtype == widest.dtype
    ours, theirs = noise(weight, scale, type), noise(weight, widest, type)
    assert (ours <= theirs * 1.0001).all()
    few = storage in ("INT2", "INT4")
    assert np.sum(ours) < (0.85 if few else 1.0) * np.sum(theirs)


def test_is_close_to_a_dense_search():
    weight = RNG.standard_normal((64, 50), dtype=np.float32)
    widest = weight_scale(weight, INT4)
    tried = [noise(weight, widest * np.float32(f), INT4) for f in np.linspace(0.3, 1.2, 200)]
    assert noise(weight, clipped_scale(weight, INT4), INT4).sum() < 1.02 * np.min(tried, 0).sum()


def test_importance_moves_the_error_to_where_it_counts_less():
    weight = RNG.standard_normal((64, 50), dtype=np.float32)
    importance = np.exp(RNG.standard_normal((64, 1)) * 2).astype(np.float32)
    plain, weighted = clipped_scale(weight, INT4), clipped_scale(weight, INT4, importance)
    errors = [noise(weight, scale, INT4, importance).sum() for scale in (plain, weighted)]
    assert errors[1] < 0.95 * errors[0]
    assert noise(weight, weighted, INT4).sum() > noise(weight, plain, INT4).sum()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_pieces_are_searched_alone(granularity, monkeypatch):
    type = QuantType(ir.DataType.INT4, granularity=granularity)
    weight = RNG.standard_normal((72, 40), dtype=np.float32)
    whole = clipped_scale(weight, type, weight[:, :1] ** 2)
    monkeypatch.setattr(module, "_PIECE", 100)
    np.testing.assert_allclose(clipped_scale(weight, type, weight[:, :1] ** 2), whole, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0.0, 1e-38, 1e-30, 1.0, 1e30, 3e38]), st.sampled_from(GRANULARITIES))
def test_any_magnitude_has_a_scale(magnitude, granularity):
    type = QuantType(ir.DataType.INT4, granularity=granularity)
    weight = np.full((32, 16), magnitude, np.float32) * np.linspace(-1, 1, 16, dtype=np.float32)
    scale = clipped_scale(weight, type)
    assert np.isfinite(scale).all() and (scale > 0).all()
    most = noise(weight, weight_scale(weight, type), type)
    assert (noise(weight, scale, type) <= 1.0001 * most + 1e-10 * magnitude**2).all()


def product_error(target, scale):
    """The SQNR of a product with its weight rounded so."""
    rng = np.random.default_rng(1)
    weights = {"w": rng.standard_t(4, (128, 8)).astype(np.float32)}
    feeds = {"x": rng.standard_normal((64, 128)).astype(np.float32)}
    model = model_of("g (float[m,128] x) => (float[m,8] y) { y = MatMul (x, w) }", weights)
    AssignPrecision(TARGETS[target].scheme)(model)
    RoundToNearest(RoundToNearest.Options(scale))(model)
    return sqnr(feeds["x"] @ weights["w"], run(model, feeds, plainly=True)[0])


def test_rounding_by_error_is_an_option():
    largest, least = (product_error("x86-int4", scale) for scale in ("max", "mse"))
    assert least > largest + 0.1
    largest, least = (product_error("x86-int8", scale) for scale in ("max", "mse"))
    assert largest != least


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_the_largest_magnitude_takes_the_longer_side(granularity):
    type = QuantType(ir.DataType.INT4, granularity=granularity)
    weight = RNG.standard_t(4, (72, 40)).astype(np.float32)
    scale, plain = signed_scale(weight, type), weight_scale(weight, type)
    assert scale.shape == plain.shape and scale.dtype == plain.dtype
    np.testing.assert_allclose(np.abs(scale), plain * np.float32(7 / 8), rtol=1e-6)
    before, after = noise(weight, plain, type).sum(), noise(weight, scale, type).sum()
    assert after <= before * (1.1 if granularity == PerTensor() else 0.9)
    positive = np.abs(weight).astype(np.float32)
    assert (signed_scale(positive, type) < 0).all() and (signed_scale(-positive, type) > 0).all()
    narrow = dataclasses.replace(type, narrow_range=True)
    np.testing.assert_array_equal(signed_scale(weight, narrow), weight_scale(weight, narrow))


@pytest.mark.parametrize(("value", "hint"), [("mean", ""), ("maxx", "; did you mean 'max'?")])
def test_an_unknown_scale_is_refused(value, hint):
    with pytest.raises(
        OptionError,
        match=f"round-to-nearest: scale must be max or mse, not .{value}.{re.escape(hint)}$",
    ):
        configured(RoundToNearest(), "round-to-nearest", {"scale": [value]})


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_negative_scales_use_the_longer_side(granularity):
    type = QuantType(ir.DataType.INT4, granularity=granularity)
    weight = RNG.standard_t(4, (72, 40)).astype(np.float32)
    plain, signed = clipped_scale(weight, type), clipped_scale(weight, type, signed=True)
    before, after = noise(weight, plain, type).sum(), noise(weight, signed, type).sum()
    assert after <= before * (1 if granularity == PerTensor() else 0.97)
    positive = np.abs(weight).astype(np.float32)
    assert (clipped_scale(positive, type, signed=True) < 0).all()
    narrow = dataclasses.replace(type, narrow_range=True)
    assert (clipped_scale(positive, narrow, signed=True) > 0).all()

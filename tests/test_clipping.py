"""Ranges: the histogram they are cut from, and what each method cuts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.clipping import METHODS, Clipping, Observed
from qcompiler.histogram import BINS, Histogram
from qcompiler.ir.errors import OptionError

finite = st.floats(-(2.0**100), 2.0**100, width=32)
RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal(1 << 16).astype(np.float32)


def look(observed, values):
    """Count all values of a sample."""
    observed.add(values, (values.min(), values.max()) if values.size else (np.inf, -np.inf))


def seen(values, method, parts=8):
    observed = Observed(Clipping.parse(method))
    for part in np.array_split(np.asarray(values, np.float32), parts):
        look(observed, part)
    return observed


def squared_error(values, low, high):
    step = (high - low) / 255
    zero = round(-low / step)
    rounded = (np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step
    return float(((values - rounded) ** 2).sum())


@given(st.lists(st.lists(finite, max_size=20), min_size=1, max_size=6), st.randoms())
def test_a_histogram_does_not_depend_on_order(batches, random):
    one, other = Histogram(), Histogram()
    for batch in batches:
        one.add(np.asarray(batch, np.float32))
    values = [value for batch in batches for value in batch]
    random.shuffle(values)
    other.add(np.asarray(values, np.float32))
    assert one.counts.sum() == len(values)
    if values:
        assert (one.width, one.first) == (other.width, other.first)
    np.testing.assert_array_equal(one.counts, other.counts)


@given(st.lists(finite, min_size=1, max_size=50))
def test_bins_hold_what_they_count(values):
    histogram = Histogram()
    histogram.add(np.asarray(values, np.float32))
    edges = (histogram.first + np.arange(BINS + 1)) * histogram.width
    expected, _ = np.histogram(np.asarray(values, np.float32).astype(np.float64), edges)
    # numpy's last bin is closed on its right; no value lies there, for 0 <= values < last edge.
    np.testing.assert_array_equal(histogram.counts, expected)


@pytest.mark.parametrize("method", METHODS)
@given(st.lists(st.lists(finite, max_size=9), min_size=1, max_size=4))
def test_every_range_is_of_what_was_seen_and_holds_zero(method, batches):
    observed = Observed(Clipping(method))
    for batch in batches:
        look(observed, np.asarray(batch, np.float32))
    values = [value for batch in batches for value in batch]
    if values:
        low, high = observed.range()
        assert min(*values, 0.0) <= low <= 0 <= high <= max(*values, 0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-30])
def test_a_constant_tensor(method, value):
    low, high = seen(np.full(100, value), method).range()
    assert low == min(value, 0) or method == "sigma"
    assert np.isfinite([low, high]).all()


def test_min_max():
    assert seen([1, -2, 3, 0.5], "min-max", 2).range() == (-2, 3)


def test_moving_average_forgets():
    # Samples with the greatest values 8, 0 and 4: 8, then 8/2 + 0/2, then 4/2 + 4/2.
    assert seen([8, 0, 4], "moving-average=0.5", 3).range() == (0, 4)


def test_percentile_is_that_of_numpy():
    low, high = seen(NORMAL, "percentile=99").range()
    expected = np.percentile(NORMAL, [1, 99])
    np.testing.assert_allclose([low, high], expected, atol=2 * 16 / BINS)


def test_sigma_is_that_of_numpy():
    shifted = NORMAL + 1
    expected = shifted.mean() + 3 * shifted.std() * np.asarray([-1, 1])
    np.testing.assert_allclose(seen(shifted, "sigma=3").range(), expected, atol=0.01)


@pytest.mark.parametrize("values", [
    NORMAL, np.maximum(NORMAL, 0), NORMAL**3, np.append(NORMAL, 300), NORMAL * 1e-6 - 3e-6,
])  # fmt: skip
def test_mse_is_the_best_of_all(values):
    errors = {m: squared_error(values, *seen(values, m).range()) for m in METHODS}
    assert errors["mse"] <= 1.02 * min(errors.values())
    assert errors["mse"] < errors["min-max"] or np.ptp(values) < 1e-4


def test_entropy_cuts_off_what_is_rare_but_not_what_is_common():
    rare = seen(np.append(NORMAL, 300), "entropy").range()
    assert rare[1] < 200
    low, high = seen(NORMAL, "entropy").range()
    assert 3 < -low < 4.8
    assert 3 < high < 4.8
    low, high = seen(np.maximum(NORMAL, 0), "entropy").range()
    assert low == 0
    assert high > 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or Inf"):
        seen([1, bad, 2], "mse", 1)


@given(st.sampled_from(list(METHODS)), st.floats(51, 100))
def test_text_form(method, amount):
    clipping = Clipping(method)
    assert Clipping.parse(str(clipping)) == clipping or str(clipping) == method
    percentile = Clipping("percentile", float(f"{amount:g}"))
    assert Clipping.parse(str(percentile)) == percentile


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("minmax", "unknown calibration method 'minmax'; did you mean 'min-max'"),
        ("x", "unknown calibration method 'x'; one of min-max, moving-average"),
        ("percentile=high", "'high' is not a number"),
        ("percentile=nan", "'nan' is not a number"),
        ("mse=nan", "'nan' is not a number"),
        ("percentile=50", "percentile=50: must be above 50 and at most 100"),
        ("percentile=101", "must be above 50 and at most 100"),
        ("sigma=0", "sigma=0: must be above 0"),
        ("sigma=inf", "must be above 0 and finite"),
        ("moving-average=1", "must be above 0 and at most 0.999"),
        ("entropy=3", "'entropy' takes no amount, not 3"),
    ],
)
def test_bad_methods(text, message):
    with pytest.raises(OptionError, match=message):
        Clipping.parse(text)

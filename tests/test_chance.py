"""How much of what inputs have in common is chance of the samples, and what gptq makes of it."""

import dataclasses
from functools import partial

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.ir.types import PerGroup, QuantType
from qcompiler.passes.gptq import GPTQ, gptq, round_one
from qcompiler.passes.second_moments import Moments

K = 64
INT4 = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 32))
UINT4 = dataclasses.replace(INT4, storage=ir.DataType.UINT4, symmetric=False)


def texts(seed, count, length, own):
    """Samples [length, K]: directions that all of them have, and of each some of its own."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((K, K)) * np.exp(-np.arange(K) / 8)[:, None]
    for _ in range(count):
        rows = rng.standard_normal((length, K)) @ shared
        rows += rng.standard_normal((length, 4)) @ rng.standard_normal((4, K)) * own
        yield (rows + 0.3 * rng.standard_normal((length, K))).astype(np.float32)


def moments_of(samples):
    moments = Moments(K)
    for rows in samples:
        moments.add(rows)
    return moments


def errors(seed, count, length, own, type, shrinkages):
    """Of new samples that have the same in common, by part of the error of what is believed."""
    weight = np.random.default_rng(seed + 100).standard_normal((K, 48), dtype=np.float32)
    drawn = list(texts(seed, count + 100, length, own))
    seen, new = moments_of(drawn[:count]), moments_of(drawn[count:])
    found = []
    for shrinkage in shrinkages:
        rounded, _ = round_one(weight, type, seen, GPTQ.Options(shrinkage=shrinkage))
        found.append(new.error(weight - rounded.floats(type)))
    return np.array(found) / found[0]


def average(*arguments):
    return np.mean([errors(seed, *arguments) for seed in range(4)], axis=0)


@pytest.mark.parametrize("type", [INT4, UINT4], ids=["int4", "uint4"])
def test_what_each_sample_has_of_its_own_is_not_believed(type):
    """By default, too: other texts have other directions."""
    assert average(8, 64, 2.0, type, (0, GPTQ.Options().shrinkage))[1] < 0.6


def test_what_samples_share_is_believed():
    _, usual = average(64, 64, 0.0, INT4, (0, GPTQ.Options().shrinkage))
    assert usual == pytest.approx(1, abs=0.05)


def test_where_nothing_is_believed_each_input_is_rounded_by_itself():
    weight = np.random.default_rng(0).standard_normal((K, 48), dtype=np.float32)
    moments = moments_of(texts(0, 8, 64, 2.0))
    alone, _ = gptq(weight, np.diag(np.diag(moments.second)), INT4, GPTQ.Options())
    doubted, _ = round_one(weight, INT4, moments, GPTQ.Options(shrinkage=1e3))
    np.testing.assert_array_equal(doubted.stored, alone.stored)


def test_chance_is_the_variance_of_correlations_between_samples():
    """Against the definition, which keeps the correlations of every sample."""
    samples = list(texts(3, 12, 64, 1.0))
    each = np.stack([_correlations(rows.T @ rows) for rows in samples])
    pooled = _correlations(sum(rows.T @ rows for rows in samples))
    variance = (np.square(each).sum((1, 2)).mean() - np.square(pooled).sum()) / (len(samples) - 1)
    chance = moments_of(samples).chance()
    assert chance == pytest.approx(variance / np.square(pooled).sum(), rel=1e-3)
    # About the mean of correlations, instead of those of all rows, it is nearly the same.
    around = np.square(each - each.mean(0)).sum() / len(samples) / (len(samples) - 1)
    assert chance == pytest.approx(around / np.square(pooled).sum(), rel=0.15)


def _correlations(second):
    second = second.astype(np.float64)
    found = second / np.sqrt(np.outer(np.diag(second), np.diag(second)))
    np.fill_diagonal(found, 0)
    return found


def test_it_falls_with_the_number_of_samples():
    chances = [moments_of(texts(1, count, 32, 1.0)).chance() for count in (4, 16, 64, 256)]
    assert chances == sorted(chances, reverse=True)
    assert chances[0] > 0.2 and chances[-1] < 0.02


def test_cutting_independent_rows_into_samples_changes_little():
    (rows,) = texts(2, 1, 512, 0.0)
    cut = [moments_of(np.split(rows, parts)).chance() for parts in (1, 8, 64, 512)]
    assert cut == pytest.approx([cut[0]] * 4, rel=0.25)


def test_samples_of_different_sizes_count_by_their_rows():
    samples = list(texts(4, 8, 64, 1.0))
    empty, one = np.zeros((0, K), np.float32), samples[0][:1]
    without, with_it = (moments_of([*samples, *more]).chance() for more in ([], [empty, one]))
    assert with_it == pytest.approx(without, rel=0.05)


def test_one_long_sample_and_a_few_rows_more():
    """Two rows say nothing about how far texts are from each other."""
    (long,) = texts(6, 1, 1000, 0.0)
    alone = moments_of([long]).chance()
    for more in ([long[:1]], [long[:1], long[5:6]]):
        assert moments_of([long, *more]).chance() == pytest.approx(alone, rel=0.3)


def test_independent_rows_cut_unevenly():
    (rows,) = texts(7, 1, 1200, 0.0)
    cuts = np.cumsum([600, 200, 100, 100, 50, 50, 20, 20, 20, 20])
    uneven, whole = (moments_of(p).chance() for p in (np.split(rows, cuts), [rows]))
    assert uneven == pytest.approx(whole, rel=0.3)


def test_borders():
    alone = np.eye(K, dtype=np.float32)
    assert moments_of([np.zeros((5, K), np.float32)]).chance() == 0
    assert moments_of([alone]).chance() == 0  # nothing in common
    assert moments_of([np.ones((1, K), np.float32)]).chance() == 0  # all in common
    noise = np.random.default_rng(0).standard_normal((2, 40, K)).astype(np.float32)
    assert moments_of(noise).chance() > 0.8
    noise[..., 5:] = 0
    assert 0 < moments_of(noise).chance() <= 1
    large = partial(np.full, (3, K), dtype=np.float32)
    assert 0 <= moments_of([large(1e15), large(-1e-20)]).chance() <= 1

"""sensitive-groups: which nodes are left out, by a made-up noise that adds up or does not."""

import math

import pytest

from qcompiler.passes.sensitive_groups import sensitive_groups

NAMES = [f"n{i}" for i in range(40)]
LOUD = {"n1": 0.1, "n2": 0.2, "n30": 0.05}


class Noise:
    """Counts what it is asked."""

    def __init__(self, of=LOUD, most=math.inf, extra=0.0):
        self.of, self.most, self.extra, self.asked = of, most, extra, 0

    def __call__(self, names):
        self.asked += 1
        return min(sum(self.of.get(name, 1e-5) for name in names) + self.extra, self.most)


def left_out(noise, allowed=0.01, runs=40):
    found = sensitive_groups(NAMES, noise, allowed, runs)
    assert noise.asked <= runs
    return [name for group in found for name in group.names]


@pytest.mark.parametrize("most", [math.inf, 0.25])  # noise is never much more than the signal
def test_finds_the_few_that_matter(most):
    assert left_out(Noise(most=most)) == ["n2", "n1", "n30"]


def test_nothing_is_left_out_where_all_is_good():
    noise = Noise({})
    assert left_out(noise) == [] and noise.asked == 1
    assert left_out(Noise(extra=math.nan)) == []


def test_without_runs_to_search_all_are_left_out():
    assert left_out(Noise(), runs=1) == NAMES
    found = left_out(Noise(), runs=12)
    assert set(LOUD) < set(found) and len(found) < len(NAMES)


def test_what_does_not_add_up_is_seen_in_the_end():
    """Together they make more noise than each alone."""

    def noise(names):
        return sum(LOUD.get(name, 1e-4) for name in names) + 1e-5 * len(names) ** 2

    found = sensitive_groups(NAMES, noise, 0.012, 40)
    kept = [name for group in found for name in group.names]
    assert set(LOUD) < set(kept) and len(kept) < len(NAMES)
    assert noise([name for name in NAMES if name not in kept]) <= 0.012


def test_what_is_never_good_enough_is_left_out_altogether():
    assert sorted(left_out(Noise(extra=0.02))) == sorted(NAMES)


def test_one_noisy_node_rather_than_many_quiet_ones():
    """All the quiet ones together make more noise than it does."""
    of = {name: 5e-5 for name in NAMES} | {"n1": 0.1, "n2": 8e-4}

    def noise(names):
        return sum(of[name] for name in names) + 5e-4 * (30 < len(names) < 40)

    found = sensitive_groups(NAMES, noise, 0.003, 40)
    assert [name for group in found for name in group.names] == ["n1", "n2"]


def test_groups_without_noise_that_make_some_together_are_asked_about_once():
    noise = Noise()
    noise.of = dict.fromkeys(NAMES, 0.0) | {"n0": 1.0}
    asked = []

    def together(names):
        asked.append(tuple(names))
        return noise(names) + (0.5 if {"n3", "n30"} <= set(names) else 0)

    found = sensitive_groups(NAMES, together, 0.01, 40)
    assert sorted(name for group in found for name in group.names) == sorted(NAMES)
    assert len(asked) == len(set(asked))


def test_what_only_together_makes_noise_is_left_out_together():
    """A chain of which one alone is nothing: it is found, and not everything is left out."""
    chain = {"n4", "n5", "n6"}

    def noise(names):
        return 0.5 * (chain <= set(names)) + 1e-5 * len(names)

    found = sensitive_groups(NAMES, noise, 0.01, 40)
    (group,) = [group for group in found if group.together]
    assert chain <= set(group.names) and len(group.names) <= 10
    assert [name for group in found for name in group.names] == list(group.names)

"""Find which of many nodes cost an output its accuracy, in few runs.

Noise adds up: with n(S) that of the output where only the nodes S are quantized,

    n(A + B) = n(A) + n(B), nearly

so that what one group does alone tells what leaving it out gains, which its own error on exact
inputs does not: a layer may be good to 16 dB and leave a network's result at 6, and another be as
bad and leave it at 40.  Starting from all nodes, a group that is too noisy is taken in two halves,
in the order of the graph, because what is sensitive often lies together.  Where the halves make
less than half of what it makes, its nodes do so together, and it stays one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

__all__ = ["Group", "sensitive_groups"]

_CHECKS = 6
"""Runs that are kept for looking at what is left once groups are chosen."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Nodes that were quantized alone.

    Attributes:
        names: Of the nodes, in the order of the graph.
        noise: What that made, as a part of the output's power.
        together: They make it together, and are not taken apart.
    """

    names: tuple[str, ...]
    noise: float
    together: bool = False


def sensitive_groups(
    names: Sequence[str], noise: Callable[[Sequence[str]], float], allowed: float, runs: int
) -> list[Group]:
    """The groups to leave out so that all others together make no more noise than is allowed.

    Args:
        names: Of all nodes, in the order of the graph.
        noise: What quantizing some of them alone makes; NaN if that could not be measured.
        allowed: How much there may be.
        runs: The most times that `noise` is asked, at least 1. If they do not suffice, groups that
            are larger than they had to be are left out, in the end all of them.
    """
    groups = [Group(tuple(names), noise(names))]
    left, bound = runs - 1, allowed
    if not groups[0].noise > allowed:
        return []
    while True:
        out = _out(groups, bound)
        mixed = next((g for g in out if len(g.names) > 1 and not g.together), None)
        if mixed is not None and left >= 2 + _CHECKS:
            half, left = len(mixed.names) // 2, left - 2
            parts = mixed.names[:half], mixed.names[half:]
            groups = [group for group in groups if group is not mixed]
            found = [Group(part, noise(part)) for part in parts]
            add_up = not sum(group.noise for group in found) < mixed.noise / 2
            groups += found if add_up else [dataclasses.replace(mixed, together=True)]
            continue
        rest = [group for group in groups if group not in out]
        if not rest or not left:
            return groups
        left, whole = left - 1, noise([name for group in rest for name in group.names])
        if whole <= allowed:
            return out
        # Together they make more noise than each alone: aim lower, by at least one group.
        heard = sum(group.noise for group in rest)
        if not heard:
            return groups
        bound = min(bound * allowed / whole, heard * (1 - 1e-6))


def _out(groups: Sequence[Group], allowed: float) -> list[Group]:
    """Those that make the most noise per node, as few as leave no more than is allowed."""
    ordered = sorted(groups, key=lambda group: -group.noise / len(group.names))
    rest = 0.0
    while ordered and rest + ordered[-1].noise <= allowed:
        rest += ordered.pop().noise
    return ordered

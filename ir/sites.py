"""Sites: ops whose kernel is chosen, by all that their speed depends on, and what was chosen.

    y = MatMul(x, W)        Site("MatMul", weight=(384, 1536), inputs=((1, 384), (128, 384)))

A site holds no graph objects, so equal ones are timed once and the times kept by their content.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["CANDIDATES", "Candidate", "Choice", "Costs", "Point", "Site"]

Candidate = Literal["kernel", "ort", "float"]
"""Who may compute a site: our kernel, ORT's own quantized ops, or the op as it was."""

CANDIDATES: tuple[Candidate, ...] = ("kernel", "ort", "float")

Point = tuple[int, tuple[int, ...]]
"""Threads, and the shape of the data input."""


@dataclasses.dataclass(frozen=True)
class Site:
    """An op with its sizes.

    Attributes:
        op: "MatMul" or "Conv".
        weight: Shape of its constant weight.
        inputs: Shapes of its data input that matter; none where nothing is known of it.
        attributes: Those that shape the work: dilations, group, pads, strides.
        kernel: Whether the target has a kernel for it.
    """

    op: str
    weight: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...] = ()
    attributes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    kernel: bool = False

    @property
    def name(self) -> str:
        """What it is, whatever its input: "Conv 64x3x7x7 strides=2x2"."""
        words = [f"{key}={_by(numbers)}" for key, numbers in self.attributes]
        return " ".join([self.op, _by(self.weight), *words])

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Who may compute it, the one it gets unless another is faster first."""
        return CANDIDATES if self.kernel else CANDIDATES[1:]

    def attribute(self, name: str) -> tuple[int, ...]:
        """The numbers of an attribute."""
        return dict(self.attributes)[name]

    def result(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of its result for an input of that shape."""
        if self.op == "MatMul":
            return (*shape[:-1], self.weight[1])
        axes = len(self.weight) - 2
        pads, strides = self.attribute("pads"), self.attribute("strides")
        spans = [
            dilation * (size - 1) + 1
            for dilation, size in zip(self.attribute("dilations"), self.weight[2:], strict=True)
        ]
        spatial = [
            (shape[2 + i] + pads[i] + pads[axes + i] - spans[i]) // strides[i] + 1
            for i in range(axes)
        ]
        return (shape[0], self.weight[0], *spatial)


@dataclasses.dataclass(frozen=True)
class Costs:
    """How long each candidate takes at one site.

    Attributes:
        source: Whether they were timed here, or come from the cost model.
        points: Where.
        times: Microseconds at each point.
        busy: Whether others kept the cores busy meanwhile, so that they may be wrong.
    """

    source: Literal["timed", "model"]
    points: tuple[Point, ...]
    times: Mapping[Candidate, tuple[float, ...]]
    busy: bool = False

    def mean(self, candidate: Candidate, threads: int | None = None) -> float:
        """The geometric mean over all points, or those of so many threads; microseconds."""
        pairs = zip(self.points, self.times[candidate], strict=True)
        logs = [math.log(time) for (count, _), time in pairs if threads in (None, count)]
        return math.exp(sum(logs) / len(logs))

    def wins(self, candidate: Candidate, other: Candidate, margin: float) -> bool:
        """Whether it is `margin` times faster than another, and slower for no number of threads.

        What neighbours do to one measurement they seldom do to all.
        """
        counts = {threads for threads, _ in self.points}
        return self.mean(candidate) * margin < self.mean(other) and all(
            self.mean(candidate, threads) <= self.mean(other, threads) for threads in counts
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        points = [[threads, list(shape)] for threads, shape in self.points]
        times = {name: list(values) for name, values in self.times.items()}
        return {"source": self.source, "points": points, "times": times, "busy": self.busy}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Costs:
        """Costs out of what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: Something else was given.
        """
        points = tuple(
            (int(threads), tuple(map(int, shape))) for threads, shape in content["points"]
        )
        times: dict[Candidate, tuple[float, ...]] = {
            name: tuple(map(float, content["times"][name]))
            for name in CANDIDATES
            if name in content["times"]
        }
        if any(len(values) != len(points) for values in times.values()):
            raise ValueError("as many times are needed as points")
        # What was written before this was noted does not have it.
        return cls(content["source"], points, times, content.get("busy", False) is True)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for one node.

    Attributes:
        node: Its name.
        site: Its site's name.
        candidate: Who computes it.
        why: For people.
        costs: What the choice was made on; None where there was nothing to go by.
    """

    node: str
    site: str
    candidate: Candidate
    why: str
    costs: Costs | None = None


def _by(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))

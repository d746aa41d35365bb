"""A model of how long a site takes, for where it cannot be timed.

    time = call + nodes * node + max(MACs / rate, bytes / bandwidth) + values * stream

A roofline with a price per node and per value that is quantized, converted or rounded on the way.
Its constants were fitted to times of one core of an AMD EPYC (Zen 4) under ONNX Runtime 1.31; what
it is wrong by is in every report whose sites were timed (`model_error`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from qcompiler.ir.sites import Candidate, Costs, Site

__all__ = ["MODELLED", "border_cost", "estimate", "model_error"]

MODELLED = frozenset({"x86"})
"""Architectures that the constants were measured on."""

_CALL, _NODE = 4.5, 0.5
"""Microseconds of one run of a session, and of one node in it."""
_PARALLEL = 0.85
"""What a further thread adds, where there is work for it."""
_LEAST_PARALLEL = 20.0
"""Microseconds of work below which further threads add nothing."""


@dataclasses.dataclass(frozen=True)
class _Rates:
    """One core: MACs, bytes, values and gathered values per microsecond, and nodes of one site."""

    macs: float
    bytes: float
    streamed: float
    nodes: int
    weight_bytes: int
    gathered: float = math.inf


_MATMUL: Mapping[Candidate, _Rates] = {
    "kernel": _Rates(macs=235e3, bytes=60e3, streamed=40e3, nodes=2, weight_bytes=1),
    "ort": _Rates(macs=215e3, bytes=60e3, streamed=4.5e3, nodes=9, weight_bytes=1),
    "float": _Rates(macs=58e3, bytes=60e3, streamed=1e9, nodes=1, weight_bytes=4),
}
_CONV: Mapping[Candidate, _Rates] = {
    "ort": _Rates(220e3, bytes=60e3, streamed=10e3, nodes=4, weight_bytes=1, gathered=4e3),
    "float": _Rates(macs=57e3, bytes=60e3, streamed=8e3, nodes=2, weight_bytes=4),
}
_DEPTHWISE: Mapping[Candidate, _Rates] = {
    "ort": _Rates(macs=15.5e3, bytes=60e3, streamed=60e3, nodes=4, weight_bytes=1),
    "float": _Rates(macs=80e3, bytes=60e3, streamed=8e3, nodes=2, weight_bytes=4),
}

_VECTOR = 16
"""Channels computed at once; with fewer to read, ORT copies patches before it multiplies."""

_BORDER_VALUES = 8e3
"""Values per microsecond that QuantizeLinear and DequantizeLinear convert."""


def estimate(site: Site, threads: Sequence[int]) -> Costs:
    """The costs of a site whose input shapes are known, by the model."""
    points = tuple((count, shape) for count in threads for shape in site.inputs)
    times = {
        candidate: tuple(round(_time(site, candidate, *point), 2) for point in points)
        for candidate in site.candidates
    }
    return Costs("model", points, times)


def border_cost(elements: int) -> float:
    """Microseconds of the QuantizeLinear or DequantizeLinear of a tensor."""
    return _NODE + elements / _BORDER_VALUES


def model_error(timed: Iterable[tuple[Site, Costs]]) -> dict[Candidate, float]:
    """By how much the model is off: median of |estimate / time - 1|, per candidate."""
    errors: dict[Candidate, list[float]] = {}
    for site, costs in timed:
        for candidate, times in costs.times.items():
            for point, found in zip(costs.points, times, strict=True):
                off = abs(_time(site, candidate, *point) / found - 1)
                errors.setdefault(candidate, []).append(off)
    return {candidate: round(statistics.median(off), 3) for candidate, off in errors.items()}


def _time(site: Site, candidate: Candidate, threads: int, shape: tuple[int, ...]) -> float:
    rates = _rates(site)[candidate]
    values, macs, gathered = _work(site, shape)
    moved = rates.weight_bytes * (math.prod(site.weight) + values)
    alone = max(macs / rates.macs, moved / rates.bytes) + values / rates.streamed
    alone += gathered / rates.gathered
    if alone > _LEAST_PARALLEL:
        alone /= 1 + _PARALLEL * (threads - 1)
    return _CALL + rates.nodes * _NODE + alone


def _rates(site: Site) -> Mapping[Candidate, _Rates]:
    if site.op == "MatMul":
        return _MATMUL
    return _DEPTHWISE if site.weight[1] == 1 and site.attribute("group")[0] > 1 else _CONV


def _work(site: Site, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Values that a site reads and writes, products that it adds up, values it gathers first."""
    if site.op == "MatMul":
        depth, width = site.weight
        rows = math.prod(shape[:-1])
        return rows * (depth + width), rows * depth * width, 0
    written, products = math.prod(site.result(shape)), math.prod(site.weight[1:])
    values = math.prod(shape) + written
    if _rates(site) is _DEPTHWISE:
        return values, written * products, 0
    channels = site.weight[0]
    # A vector of the result is computed whole, however few channels there are.
    macs = written * products * max(_VECTOR, channels) // channels
    copies = site.weight[1] < _VECTOR and math.prod(site.weight[2:]) > 1
    return values, macs, written // channels * products if copies else 0

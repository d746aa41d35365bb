"""Where to lay the border between two parts of a graph so that what crosses it costs least.

Some nodes are inside (they compute in integers), some outside (in floats), some may be either at a
price.  A value whose maker and reader are apart is converted once, whoever reads it.  The cheapest
division is a minimum cut (Stone, "Multiprocessor scheduling with the aid of network flow
algorithms", 1977):

    source -> node   what it costs outside          node -> sink    what it costs inside
    maker  -> out -> readers                        readers -> in -> maker

with the price of the value on the edges between it and its maker, and none to be cut to a reader.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import networkx as nx
import onnx_ir as ir

__all__ = ["Crossing", "bytes_of", "cheapest_inside"]

N = TypeVar("N")

_ASSUMED = 64
"""A dimension that only the run will tell; what is compared shares most of those."""

_RANK = 4
"""Of a value of which no shape is known: large, so that it is converted last."""

_SOURCE, _SINK = ("source",), ("sink",)

_UNIT = 1000
"""Costs are rounded to a thousandth: flows of floats do not come to an end exactly."""


@dataclasses.dataclass(frozen=True)
class Crossing(Generic[N]):
    """A value that may cross the border.

    Attributes:
        maker: Who makes it; None: somebody outside.
        readers: Who reads it; None among them: somebody outside.
        cost: Of converting it, at least 0.
    """

    maker: N | None
    readers: Sequence[N | None]
    cost: float

    def nodes(self) -> list[N]:
        """Those of its maker and readers that may be inside."""
        return [node for node in (self.maker, *self.readers) if node is not None]

    def meets_outside(self) -> bool:
        """Whether somebody outside makes or reads it, and somebody else may be inside."""
        return (self.maker is None or None in self.readers) and bool(self.nodes())


def bytes_of(value: ir.Value) -> int:
    """The bytes of a value, open dimensions taken as 64."""
    if value.shape is None:
        size = _ASSUMED**_RANK
    else:
        size = math.prod(d if isinstance(d, int) and d >= 0 else _ASSUMED for d in value.shape)
    bits = 32 if value.dtype is None else int(value.dtype.bitwidth)
    return int(-(-size * bits // 8))


def cheapest_inside(
    costs: Mapping[N, tuple[float, float]], crossings: Iterable[Crossing[N]]
) -> set[N]:
    """The nodes that are inside in the cheapest division; of equal ones, in the largest.

    Args:
        costs: What each node costs inside and outside; math.inf on the side where it cannot be.
        crossings: The values between them.
    """
    # What hangs together by values is cut by itself: most graphs fall into small pieces.
    groups = nx.utils.UnionFind(costs)
    values = [(crossing, crossing.nodes()) for crossing in crossings]
    for _, nodes in values:
        groups.union(*nodes)
    parts: dict[N, list[Crossing[N]]] = {}
    for crossing, nodes in values:
        if nodes:
            parts.setdefault(groups[nodes[0]], []).append(crossing)
    return {
        node
        for part in groups.to_sets()
        for node in _cut(
            {node: costs[node] for node in part}, parts.get(groups[next(iter(part))], [])
        )
    }


def _cut(costs: Mapping[N, tuple[float, float]], crossings: Sequence[Crossing[N]]) -> set[N]:
    """The inside nodes of one part."""
    if len(costs) == 1:
        ((node, (inside, outside)),) = costs.items()
        inside += sum(crossing.cost for crossing in crossings if crossing.meets_outside())
        return {node} if _rounded(inside) <= _rounded(outside) else set()
    network = nx.DiGraph()
    for node, (inside, outside) in costs.items():
        _add(network, node, _SINK, inside)
        _add(network, _SOURCE, node, outside)
    for index, crossing in enumerate(crossings):
        maker = _SINK if crossing.maker is None else crossing.maker
        readers = [_SINK if reader is None else reader for reader in crossing.readers]
        inner = [reader for reader in crossing.readers if reader is not None]
        if crossing.maker is not None:
            for start, end, cost in _through(maker, ("out", index), readers, crossing.cost):
                _add(network, start, end, cost)
        for start, end, cost in _through(maker, ("in", index), inner, crossing.cost):
            _add(network, end, start, cost)
    rest = nx.algorithms.flow.preflow_push(network, _SOURCE, _SINK)
    return set(costs) - _leading_to_sink(rest)


def _through(
    maker: object, between: object, readers: Sequence[object], cost: float
) -> Iterator[tuple[object, object, float]]:
    """The edges of a value, by a place of its own where several read it."""
    if len(readers) == 1:
        yield maker, readers[0], cost
    elif readers:
        yield maker, between, cost
        for reader in readers:
            yield between, reader, math.inf


def _add(network: nx.DiGraph, start: object, end: object, cost: float) -> None:
    """Widen an edge; networkx takes one without a capacity for one that cannot be cut."""
    width = network.get_edge_data(start, end, {"capacity": 0}).get("capacity", math.inf)
    width += _rounded(cost)
    network.add_edge(start, end)
    if math.isfinite(width):
        network.edges[start, end]["capacity"] = width


def _leading_to_sink(rest: nx.DiGraph) -> set[Any]:
    """The places from which more could still flow to the sink."""
    found, waiting = {_SINK}, [_SINK]
    while waiting:
        place = waiting.pop()
        for before in rest.predecessors(place):
            edge = rest[before][place]
            if before not in found and edge["flow"] < edge["capacity"]:
                found.add(before)
                waiting.append(before)
    return found


def _rounded(cost: float) -> float:
    return cost if math.isinf(cost) else round(cost * _UNIT)

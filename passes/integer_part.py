"""Which convolutions had better not compute in integers, for what the border with floats costs.

Part of `choose_kernels`: a minimum cut, so that several leave together where none gains alone.
What hands on integers between them (`integer_links`) lies on the side where it saves conversions,
and takes about as long on either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from qcompiler.ir.border import Crossing, cheapest_inside
from qcompiler.ir.graph import rectified
from qcompiler.ir.sites import Costs, Site
from qcompiler.passes.integer_links import Link

__all__ = ["MARGIN", "IntegerPart"]

MARGIN = 1.05
"""Times repeat to about 5%: less is no reason to choose anything."""


class IntegerPart:
    """The convolutions that compute in integers, and what its border costs.

    Args:
        convs: Site and costs of those that may leave it.
        planned: All planned convolutions, in order.
        border: Microseconds of a Q or DQ of so many elements.
        links: What may hand on integers.
        elements: Of the values that links read and make, as far as known.
    """

    def __init__(
        self,
        convs: Mapping[ir.Node, tuple[Site, Costs]],
        planned: Sequence[ir.Node],
        border: Callable[[int], float],
        links: Mapping[ir.Node, Link] | None = None,
        elements: Mapping[ir.Value, int] | None = None,
    ) -> None:
        self.convs, self.border, self.links = convs, border, links or {}
        self.planned = frozenset(planned)
        self.integer = {*planned, *self.links}
        self.maker = {rectified(node.outputs[0]): node for node in planned}
        self.maker |= {value: node for node, link in self.links.items() for value in link.results}
        self.elements = dict(elements or {}) | {
            value: count
            for node, (site, costs) in convs.items()
            for value, count in _elements(node, site, costs)
        }

    def losing(self) -> dict[ir.Node, tuple[float, float]]:
        """Those that had better stay float: microseconds as integers, and as floats."""
        costs = {
            node: (pair[1].mean("ort"), pair[1].mean("float") * MARGIN)
            if (pair := self.convs.get(node))
            else (0.0, math.inf)
            for node in self.planned
        }
        costs |= dict.fromkeys(self.links, (0.0, 0.0))
        crossings = [
            Crossing(self.maker.get(value), self._readers(value), self.border(count))
            for value, count in self.elements.items()
        ]
        inside = cheapest_inside(costs, crossings)
        self.integer = {node for node in self.integer if node in inside}
        return {node: self._weigh(node) for node in self.convs if node not in inside}

    def _weigh(self, node: ir.Node) -> tuple[float, float]:
        """What `node`, now float, and the borders it touches cost as integers, and as floats."""
        costs = self.convs[node][1]
        touched = [value for value in (node.inputs[0], rectified(node.outputs[0])) if value]
        outside = costs.mean("float") + sum(map(self._border, touched))
        self.integer.add(node)
        inside = costs.mean("ort") + sum(map(self._border, touched))
        self.integer.remove(node)
        return inside, outside

    def _readers(self, value: ir.Value) -> list[ir.Node | None]:
        """Who may read a value as integers; None for all other readers."""
        found = [use.node if self._may_read(use.node, use.idx) else None for use in value.uses()]
        return list(dict.fromkeys([*found, None] if value.is_graph_output() else found))

    def _may_read(self, node: ir.Node, index: int) -> bool:
        link = self.links.get(node)
        if link is not None:
            return node.inputs[index] in link.operands
        return index == 0 and node in self.planned

    def _border(self, value: ir.Value) -> float:
        """A Q where floats meet an integer reader, a DQ where integers meet a float reader."""
        is_integer = self.maker.get(value) in self.integer
        readers = {node in self.integer for node in self._readers(value)}
        return self.border(self.elements[value]) if (not is_integer) in readers else 0.0


def _elements(node: ir.Node, site: Site, costs: Costs) -> list[tuple[ir.Value, int]]:
    shape = costs.points[0][1]
    data = node.inputs[0]
    assert data is not None
    return [
        (data, math.prod(shape)),
        (rectified(node.outputs[0]), math.prod(site.result(shape))),
    ]

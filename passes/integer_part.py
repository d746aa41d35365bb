"""Which convolutions had better not compute in integers, for what the border with floats costs.

Part of `choose_kernels`: a minimum cut, so that several leave together where none gains alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from qcompiler.ir.border import Crossing, cheapest_inside
from qcompiler.ir.graph import rectified
from qcompiler.ir.sites import Costs, Site

__all__ = ["MARGIN", "IntegerPart"]

MARGIN = 1.05
"""Times repeat to about 5%: less is no reason to choose anything."""


class IntegerPart:
    """The convolutions that compute in integers, and what its border costs.

    Args:
        convs: Site and costs of those that may leave it.
        planned: All planned convolutions, in order.
        border: Microseconds of a Q or DQ of so many elements.
    """

    def __init__(
        self,
        convs: Mapping[ir.Node, tuple[Site, Costs]],
        planned: Sequence[ir.Node],
        border: Callable[[int], float],
    ) -> None:
        self.convs, self.border = convs, border
        self.planned = frozenset(planned)
        self.integer = set(planned)
        self.maker = {rectified(node.outputs[0]): node for node in planned}
        self.elements = {
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
            for node in self.integer
        }
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
        """The planned convolutions that read a value as data; None for all other readers."""
        readers = [use.node if use.idx == 0 else None for use in value.uses()]
        found = [node if node in self.planned else None for node in readers]
        return list(dict.fromkeys([*found, None] if value.is_graph_output() else found))

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

"""Which convolutions had better not compute in integers, for what the border with floats costs.

Part of `choose_kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

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
        self.integer = dict.fromkeys(planned)
        self.maker = {rectified(node.outputs[0]): node for node in planned}
        self.elements = {
            value: count
            for node, (site, costs) in convs.items()
            for value, count in _elements(node, site, costs)
        }

    def losing(self) -> dict[ir.Node, tuple[float, float]]:
        """Those that had better stay float: microseconds as integers, and as floats."""
        found: dict[ir.Node, tuple[float, float]] = {}
        while True:
            weighed = {n: self._weigh(n) for n in self.convs if n in self.integer}
            losing = {n: pair for n, pair in weighed.items() if pair[0] > pair[1] * MARGIN}
            if not losing:
                return found
            worst = max(losing, key=lambda n: losing[n][0] - losing[n][1])
            found[worst] = losing[worst]
            del self.integer[worst]

    def _weigh(self, node: ir.Node) -> tuple[float, float]:
        """What `node` and the borders it touches cost, as integers and as floats."""
        costs = self.convs[node][1]
        touched = [value for value in (node.inputs[0], rectified(node.outputs[0])) if value]
        inside = costs.mean("ort") + sum(map(self._border, touched))
        del self.integer[node]
        outside = costs.mean("float") + sum(map(self._border, touched))
        self.integer[node] = None
        return inside, outside

    def _border(self, value: ir.Value) -> float:
        """A Q where floats meet an integer reader, a DQ where integers meet a float reader."""
        is_integer = self.maker.get(value) in self.integer
        readers = {use.node in self.integer and use.idx == 0 for use in value.uses()}
        if value.is_graph_output():
            readers.add(False)
        return self.border(self.elements[value]) if (not is_integer) in readers else 0.0


def _elements(node: ir.Node, site: Site, costs: Costs) -> list[tuple[ir.Value, int]]:
    shape = costs.points[0][1]
    data = node.inputs[0]
    assert data is not None
    return [
        (data, math.prod(shape)),
        (rectified(node.outputs[0]), math.prod(site.result(shape))),
    ]

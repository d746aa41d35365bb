"""How a graph hangs together: its flow as networkx sees it, dominators, convex regions.

A node that owns branches or a loop stands for all that is inside: it reads what its bodies read of
the values around them.  Constants are no flow.  Everything is linear in the nodes asked about, but
for a logarithm in the dominators.
"""

from __future__ import annotations

import enum
import functools
import heapq
from collections.abc import Iterable, Mapping, Sequence

import networkx as nx
import onnx_ir as ir

from qcompiler.ir.graph import bodies, every_graph

__all__ = ["End", "GraphView", "Place"]


class End(enum.Enum):
    """Where values come from and go to that no node of the graph makes or reads."""

    SOURCE = "source"
    SINK = "sink"


Place = ir.Node | End


class GraphView:
    """One graph, as it is when the view is made.

    Attributes:
        nodes: Its nodes, in their order, which must be topological.
    """

    def __init__(self, graph: ir.Graph | ir.Function) -> None:
        self.nodes = tuple(graph)
        self._graph = graph
        self._order = {node: index for index, node in enumerate(self.nodes)}
        self._owner: dict[ir.Graph | ir.Function | None, ir.Node] = {
            body: node for node in self.nodes for body in _bodies(node)
        }

    def makers(self, node: ir.Node) -> list[Place]:
        """Who makes what `node` and its bodies read; SOURCE for inputs and values from outside."""
        within = _bodies(node)
        if not within:
            return self._makers_of(node.inputs)
        read = list(node.inputs)
        for body in within:
            read += [*body.outputs, *(value for inner in body for value in inner.inputs)]
        return self._makers_of(v for v in read if v is not None and v.graph not in self._owner)

    def _makers_of(self, values: Iterable[ir.Value | None]) -> list[Place]:
        found: dict[Place, None] = {}
        for value in values:
            if value is None or (value.is_initializer() and not value.is_graph_input()):
                continue
            maker = value.producer() if value.graph is self._graph else None
            found[maker or End.SOURCE] = None
        return list(found)

    def readers(self, value: ir.Value) -> list[Place]:
        """Nodes of this graph that read a value, in bodies too; SINK for an output."""
        users = (use.node for use in value.uses())
        found: list[Place] = [
            user if user.graph is self._graph else self._owner[user.graph] for user in users
        ]
        return list(dict.fromkeys([*found, End.SINK] if value.is_graph_output() else found))

    def targets(self, node: ir.Node) -> list[Place]:
        """Who reads any result of `node`."""
        return list(dict.fromkeys(place for v in node.outputs for place in self.readers(v)))

    def flow(self) -> nx.DiGraph:
        """The graph with an edge from each maker to each reader, and both ends.

        A node that reads only constants hangs from SOURCE; one that nothing reads leads to SINK.
        """
        flow = nx.DiGraph()
        flow.add_nodes_from([End.SOURCE, *self.nodes, End.SINK])
        for node in self.nodes:
            flow.add_edges_from((maker, node) for maker in self.makers(node) or [End.SOURCE])
            flow.add_edges_from((node, reader) for reader in self.targets(node) or [End.SINK])
        return flow

    def dominators(self) -> dict[ir.Node, Place]:
        """For each node the nearest other that every way to it from the inputs leads through."""
        tree = _Tree(End.SOURCE)
        for node in self.nodes:
            tree.add(node, self.makers(node) or [End.SOURCE])
        return {node: tree.parent[node] for node in self.nodes}

    def post_dominators(self) -> dict[ir.Node, Place]:
        """For each node the nearest other that every way from it to the outputs leads through."""
        tree = _Tree(End.SINK)
        for node in reversed(self.nodes):
            tree.add(node, self.targets(node) or [End.SINK])
        return {node: tree.parent[node] for node in self.nodes}

    def is_convex(self, region: Iterable[ir.Node]) -> bool:
        """Whether no way leaves the region and comes back: only then can it become one node."""
        return self.way_back(region) is None

    def way_back(
        self, region: Iterable[ir.Node], reads: Iterable[ir.Value | None] | None = None
    ) -> ir.Node | None:
        """A node outside that a region flows into and that flows into it; None if it is convex.

        Asked of the thousands of regions of a graph: it looks at nothing but what stands behind
        the first node of the region and flows into it.

        Args:
            region: Nodes of this graph.
            reads: What one node in their place would read, if not all that they do.
        """
        inside = set(region)
        if len(inside) < 2:
            return None
        first = min(self._order[node] for node in inside)
        waiting = [node for node in self._before(inside, reads) if self._order[node] > first]
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            makers = self.makers(node)
            if not inside.isdisjoint(makers):
                return node
            behind = {m for m in makers if isinstance(m, ir.Node) and self._order[m] > first}
            waiting += behind - seen
            seen |= behind
        return None

    def place_of(
        self, region: Iterable[ir.Node], reads: Iterable[ir.Value | None] | None = None
    ) -> ir.Node | None:
        """The first or last node of a region, if one node for all of it could stand there.

        None if others would have to move: what it reads is made behind readers of what it makes.
        The arguments are those of `way_back`.
        """
        inside = set(region)
        nodes = sorted(inside, key=self._order.__getitem__)
        if len(nodes) == 1:
            return nodes[0]
        first, last = self._order[nodes[0]], self._order[nodes[-1]]
        if all(self._order[maker] < first for maker in self._before(inside, reads)):
            return nodes[0]
        after = {place for node in nodes for place in self.targets(node)} - inside
        late = all(self._order[reader] > last for reader in after if isinstance(reader, ir.Node))
        return nodes[-1] if late else None

    def _before(
        self, inside: set[ir.Node], reads: Iterable[ir.Value | None] | None
    ) -> list[ir.Node]:
        """Who else makes what the nodes inside read, or what is said to be read."""
        if reads is not None:
            makers = self._makers_of(reads)
        else:
            makers = [maker for node in inside for maker in self.makers(node)]
        outside = (m for m in makers if isinstance(m, ir.Node) and m not in inside)
        return list(dict.fromkeys(outside))

    def convex_hull(self, region: Iterable[ir.Node]) -> list[ir.Node]:
        """The region and every node on a way from one of its nodes to another, in order."""
        inside = set(region)
        if not inside:
            return []
        places = [self._order[node] for node in inside]
        window = self.nodes[min(places) : max(places) + 1]
        below, above = set(inside), set(inside)
        for node in window:
            if node in below:
                below.update(place for place in self.targets(node) if isinstance(place, ir.Node))
        for node in reversed(window):
            if node in above:
                above.update(place for place in self.makers(node) if isinstance(place, ir.Node))
        return [node for node in window if node in below and node in above]

    def joined(self, value: ir.Value, most: int) -> list[ir.Node]:
        """The nodes that `value` flows through up to the first that all ways from it lead to.

        Args:
            value: Of this graph; what reads it may have changed since the view was made, if
                `replaced` was told.
            most: So many nodes are worth looking at.

        Returns:
            Nodes in order, the last the one where the ways join; none if they leave the graph
            before that, or if there would be more than `most`.
        """
        found: list[ir.Node] = []
        waiting: list[tuple[int, ir.Node]] = []
        seen = set[Place]()
        readers = self.readers(value)
        while len(found) < most:
            for place in readers:
                if not isinstance(place, ir.Node):
                    return []
                if place not in seen:
                    heapq.heappush(waiting, (self._order[place], place))
            seen.update(readers)
            if not waiting:
                return []
            _, node = heapq.heappop(waiting)
            found.append(node)
            if not waiting:
                return found
            readers = self.targets(node)
            if not readers:
                return []
        return []

    def replaced(self, old: ir.Node, new: ir.Node) -> None:
        """Take note that a node now stands where `old` stood."""
        self._order[new] = self._order[old]


class _Tree:
    """A tree that grows leaf by leaf and finds nearest common ancestors in logarithmic time.

    Beside its parent, each node knows an ancestor further up (Myers, "An applicative random-access
    stack", 1983).
    """

    def __init__(self, root: Place) -> None:
        self.parent, self._far, self._depth = {root: root}, {root: root}, {root: 0}

    def add(self, node: Place, above: Sequence[Place]) -> None:
        """Hang `node` below the nearest common ancestor of `above`."""
        parent = functools.reduce(self._meet, above)
        far = self._far[parent]
        steps = self._depth[parent] - self._depth[far]
        even = steps == self._depth[far] - self._depth[self._far[far]]
        self.parent[node], self._depth[node] = parent, self._depth[parent] + 1
        self._far[node] = self._far[far] if even else parent

    def _meet(self, a: Place, b: Place) -> Place:
        if self._depth[a] < self._depth[b]:
            a, b = b, a
        while self._depth[a] > self._depth[b]:
            fits = self._depth[self._far[a]] >= self._depth[b]
            a = self._far[a] if fits else self.parent[a]
        while a != b:
            apart = self._far[a] != self._far[b]
            table: Mapping[Place, Place] = self._far if apart else self.parent
            a, b = table[a], table[b]
        return a


def _bodies(node: ir.Node) -> list[ir.Graph]:
    """The graphs inside a node, and those inside of them."""
    return [graph for body in bodies(node) for graph in every_graph(body)]

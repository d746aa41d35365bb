"""Graph views on graphs small enough to know the answer."""

import time

import networkx as nx
import onnx_ir as ir
import pytest
from golden import model_of
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.ir.analysis import End, GraphView

F = "float[4]"
DIAMOND = (
    f"g ({F} x) => ({F} y) {{ a = Relu (x) b = Neg (a) c = Abs (a) d = Add (b, c) y = Exp (d) }}"
)
SIDE_EXIT = f"g ({F} x) => ({F} y, {F} b) {{ a = Relu (x) b = Neg (a) y = Exp (b) }}"
CYCLE = f"g ({F} x) => ({F} y) {{ a = Relu (x) b = Neg (a) c = Abs (b) y = Add (a, c) }}"
APART = (
    f"g ({F} x) => ({F} y) {{ a = Relu (x) b = Neg (a) c = Abs (x) d = Exp (c) y = Add (b, d) }}"
)
BRANCH = f"""
g ({F} x, bool f) => ({F} y) {{
  a = Relu (x) b = Neg (a)
  c = If (f) <then_branch = t () => ({F} p) {{ p = Abs (b) }},
              else_branch = e () => ({F} q) {{ r = Exp (x) q = Add (r, b) }}>
  y = Sqrt (c)
}}
"""


class Named:
    """A view whose nodes go by the name of what they make."""

    def __init__(self, text):
        graph = model_of(text).graph
        self.view = GraphView(graph)
        self.node = {node.outputs[0].name: node for node in graph}

    def names(self, places):
        if isinstance(places, dict):
            return {self.name(key): self.name(place) for key, place in places.items()}
        return [self.name(place) for place in places]

    def name(self, place):
        return place.value if isinstance(place, End) else place.outputs[0].name

    def region(self, letters):
        return [self.node[letter] for letter in letters]


@pytest.mark.parametrize(
    ("text", "above", "below"),
    [
        (DIAMOND, "a source b a c a d a y d", "a d b d c d d y y sink"),
        (SIDE_EXIT, "a source b a y b", "a b b sink y sink"),
        (CYCLE, "a source b a c b y a", "a y b c c y y sink"),
        (BRANCH, "a source b a c source y c", "a b b c c y y sink"),
    ],
)
def test_dominators(text, above, below):
    named = Named(text)
    for found, expected in (
        (named.view.dominators(), above),
        (named.view.post_dominators(), below),
    ):
        words = expected.split()
        assert named.names(found) == dict(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize(
    ("text", "region", "hull"),
    [
        (DIAMOND, "abcd", "abcd"),
        (DIAMOND, "ad", "abcd"),
        (DIAMOND, "abd", "abcd"),
        (DIAMOND, "bc", "bc"),
        (DIAMOND, "", ""),
        (SIDE_EXIT, "ay", "aby"),
        (CYCLE, "ay", "abcy"),
        (CYCLE, "ab", "ab"),
        (BRANCH, "ay", "abcy"),
        (BRANCH, "bc", "bc"),
    ],
)
def test_convex_regions(text, region, hull):
    named = Named(text)
    found = named.view.convex_hull(reversed(named.region(region)))
    assert named.names(found) == list(hull)
    assert named.view.is_convex(named.region(region)) == (region == hull)


@pytest.mark.parametrize(
    ("text", "region", "reads", "back", "place"),
    [
        (DIAMOND, "ab", None, None, "a"),
        (DIAMOND, "ad", None, "c", None),
        (DIAMOND, "bd", None, None, "d"),  # c is made behind b
        (DIAMOND, "abcd", None, None, "a"),
        (DIAMOND, "ad", "x", None, "a"),
        (APART, "ad", None, None, None),  # c is made behind b, which reads a
        (BRANCH, "ay", None, "b", None),
    ],
)
def test_the_way_back_and_the_place_of_a_region(text, region, reads, back, place):
    named = Named(text)
    values = None if reads is None else [named.node["a"].inputs[0]]
    found = named.view.way_back(named.region(region), values)
    assert (found and named.name(found)) == back
    if back is None:
        found = named.view.place_of(named.region(region), values)
        assert (found and named.name(found)) == place


@pytest.mark.parametrize(
    ("text", "value", "most", "joined"),
    [
        (DIAMOND, "a", 4, "bcd"),
        (DIAMOND, "a", 3, "bcd"),
        (DIAMOND, "a", 2, ""),
        (DIAMOND, "b", 1, "d"),
        (DIAMOND, "y", 4, ""),
        (SIDE_EXIT, "a", 4, "b"),
        (SIDE_EXIT, "b", 4, ""),
        (CYCLE, "a", 4, "bcy"),
        (BRANCH, "b", 4, "c"),
    ],
)
def test_where_the_ways_from_a_value_join(text, value, most, joined):
    named = Named(text)
    found = named.view.joined(named.node[value].outputs[0], most)
    assert named.names(found) == list(joined)


def test_a_dead_end_joins_nothing():
    named = Named(f"g ({F} x) => ({F} y) {{ a = Relu (x) b = Neg (a) y = Abs (a) }}")
    assert named.view.joined(named.node["a"].outputs[0], 4) == []


def test_branches_belong_to_their_node():
    named = Named(BRANCH)
    assert named.names(named.view.makers(named.node["c"])) == ["source", "b"]
    assert named.names(named.view.readers(named.node["b"].outputs[0])) == ["c"]
    assert named.names(named.view.targets(named.node["y"])) == ["sink"]
    inner = GraphView(named.node["c"].attributes["else_branch"].as_graph())
    assert [len(inner.makers(node)) for node in inner.nodes] == [1, 2]
    assert End.SOURCE in inner.makers(inner.nodes[1])


def test_constants_are_no_flow():
    model = model_of(f"g ({F} x) => ({F} y) {{ y = Add (x, w) }}", {"w": [1.0] * 4})
    (node,) = model.graph
    assert GraphView(model.graph).makers(node) == [End.SOURCE]


@st.composite
def graphs(draw):
    """Nodes that read one or two values before them each."""
    values = [ir.Value(name="x")]
    for index in range(draw(st.integers(1, 12))):
        read = draw(st.lists(st.sampled_from(values), min_size=1, max_size=2))
        values.append(ir.node("Op", read, name=f"n{index}").outputs[0])
    outputs = draw(st.lists(st.sampled_from(values[1:]), min_size=1, unique=True))
    return ir.Graph(values[:1], outputs, nodes=[value.producer() for value in values[1:]])


def _read_outside(region):
    return [v for node in region for v in node.inputs if v.producer() not in region]


@given(graphs(), st.data())
def test_dominators_and_hulls_agree_with_networkx(graph, data):
    view = GraphView(graph)
    flow = view.flow()
    for end, found, network in (
        (End.SOURCE, view.dominators(), flow),
        (End.SINK, view.post_dominators(), flow.reverse()),
    ):
        expected = nx.immediate_dominators(network, end)
        for node in view.nodes:
            assert found[node] is expected.get(node, end)
    below = view.post_dominators()
    for node in view.nodes:
        joined = view.joined(node.outputs[0], len(view.nodes))
        assert below[node] is (joined[-1] if joined else End.SINK)
    region = data.draw(st.sets(st.sampled_from(view.nodes)))
    between = {
        node
        for node in view.nodes
        if any(nx.has_path(flow, a, node) for a in region)
        and any(nx.has_path(flow, node, b) for b in region)
    }
    assert set(view.convex_hull(region)) == between
    assert view.is_convex(region) == (between == region)
    assert view.way_back(region) in between - region or between == region
    if region and between == region and (place := view.place_of(region)) is not None:
        new = ir.node(
            "Whole", _read_outside(region), num_outputs=sum(len(n.outputs) for n in region)
        )
        old = [value for node in region for value in node.outputs]
        ir.convenience.replace_nodes_and_values(graph, place, region, [new], old, new.outputs)
        made = set(graph.inputs)
        for node in graph:
            assert made.issuperset(node.inputs)
            made.update(node.outputs)


def test_ten_thousand_nodes_take_less_than_a_second_each():
    """Two long ways with a joint after every step, where plain dominators take quadratic time."""
    x = ir.Value(name="x")
    a = b = x
    nodes = []
    for _ in range(3333):
        pair = [ir.node("Relu", [a]), ir.node("Neg", [b])]
        a, b = (node.outputs[0] for node in pair)
        nodes += [*pair, ir.node("Add", [a, b])]
    view = GraphView(ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes))
    tasks = (
        view.dominators,
        view.post_dominators,
        lambda: view.convex_hull([nodes[0], nodes[-1]]),
        lambda: [view.joined(node.outputs[0], 4) for node in nodes],
        lambda: [view.is_convex(nodes[i : i + 6]) for i in range(len(nodes))],
    )
    for task in tasks:
        start = time.process_time()
        task()
        assert time.process_time() - start < 1

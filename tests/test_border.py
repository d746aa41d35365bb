"""The cheapest border on graphs small enough to know the answer."""

import itertools
import math
import time

import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.ir.border import Crossing, bytes_of, cheapest_inside


def test_the_border_is_where_the_fewest_bytes_cross():
    # a is in integers, d in floats, the others may be either; b makes the smallest tensor.
    costs = {"a": (0, math.inf), "b": (0, 0), "c": (0, 0), "d": (math.inf, 0)}
    crossings = [Crossing("a", ["b"], 64), Crossing("b", ["c"], 4), Crossing("c", ["d"], 16)]
    assert cheapest_inside(costs, crossings) == {"a", "b"}


def test_a_value_is_converted_once_for_all_its_readers():
    costs = {"a": (0, math.inf), "b": (3, 0), "c": (3, 0)}
    assert cheapest_inside(costs, [Crossing("a", ["b", "c"], 5)]) == {"a"}
    assert cheapest_inside(costs, [Crossing("a", ["b", "c"], 7)]) == {"a", "b", "c"}
    assert cheapest_inside(costs, [Crossing("a", ["b"], 2), Crossing("a", ["c"], 5)]) == {"a", "c"}


def test_inputs_and_outputs_are_outside():
    assert cheapest_inside({"a": (1, 6)}, [Crossing(None, ["a"], 2), Crossing("a", [None], 2)]) == {
        "a"
    }
    assert not cheapest_inside({"a": (1, 6)}, [Crossing(None, ["a"], 4), Crossing("a", [None], 2)])
    assert cheapest_inside({"a": (1, 6)}, [Crossing("a", [], 9)]) == {"a"}
    assert cheapest_inside({"a": (1, 1), "b": (2, 1)}, []) == {"a"}


@st.composite
def divisions(draw):
    nodes = range(draw(st.integers(1, 6)))
    price = st.integers(0, 9)
    costs = {node: (draw(price), draw(price)) for node in nodes}
    place = st.one_of(st.none(), st.sampled_from(nodes))
    crossings = [
        Crossing(draw(place), draw(st.lists(place, max_size=3, unique=True)), draw(price))
        for _ in range(draw(st.integers(0, 8)))
    ]
    return costs, [c for c in crossings if c.maker is None or c.maker not in c.readers]


@given(divisions())
@settings(deadline=None)
def test_no_division_is_cheaper(division):
    costs, crossings = division

    def total(inside):
        own = sum(pair[node not in inside] for node, pair in costs.items())
        apart = (any((c.maker in inside) != (r in inside) for r in c.readers) for c in crossings)
        return own + sum(c.cost for c, pays in zip(crossings, apart, strict=True) if pays)

    found = cheapest_inside(costs, crossings)
    every = itertools.chain.from_iterable(
        itertools.combinations(costs, count) for count in range(len(costs) + 1)
    )
    best = min(every, key=lambda inside: (total(inside), -len(inside)))
    assert (total(found), len(found)) == (total(best), len(best))


def test_bytes_of_values():
    def sized(shape, dtype=ir.DataType.FLOAT):
        return ir.Value(shape=shape and ir.Shape(shape), type=dtype and ir.TensorType(dtype))

    assert bytes_of(sized([2, 3])) == 24
    assert bytes_of(sized(["n", 3], ir.DataType.INT8)) == 64 * 3
    assert bytes_of(sized([-1, 3], ir.DataType.INT4)) == 64 * 3 // 2
    assert bytes_of(sized(None, None)) == 64**4 * 4


def test_a_long_chain_is_divided_in_a_second():
    costs = {index: (index * 7 % 31, index * 5 % 29) for index in range(2000)}
    crossings = [Crossing(index, [index + 1], index * 3 % 17) for index in range(1999)]
    start = time.process_time()
    inside = cheapest_inside(costs, crossings)
    assert time.process_time() - start < 1
    assert 0 < len(inside) < 2000

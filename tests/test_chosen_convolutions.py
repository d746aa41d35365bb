"""Which convolutions become integers: the borders they save weigh in."""

from __future__ import annotations

import numpy as np
import pytest
from choosing import CHAIN, KERNELS, choosing, choosing_convs, planned

from qcompiler.ir.decisions import decision_of, plan_of


def floats(model):
    return [plan_of(node) is None for node in model.graph if node.op_type == "Conv"]


def test_a_convolution_between_others_stays_integer_for_the_borders_it_saves():
    model = planned(CHAIN, KERNELS)
    middle = {"v": 30.0}

    # Alone the middle one would lose 10 us; floats around it would cost two borders of 10.
    chosen = choosing_convs(
        lambda name: {"ort": middle.get(name, 20.0), "float": 20.0 if name == "v" else 45.0}
    )
    assert not chosen(model).modified
    assert floats(model) == [False] * 3
    middle["v"] = 50.0
    assert chosen(model).modified
    assert floats(model) == [False, True, False]
    why = decision_of([node for node in model.graph if node.op_type == "Conv"][1]).why
    # Its own 20 us and the two borders, a DQ before and a Q after it.
    assert why.startswith("float is faster here: 40 us against ORT's int8 50 us")


def test_when_one_leaves_the_integer_part_its_neighbours_are_weighed_again():
    model = planned(CHAIN, KERNELS)
    # Each loses a little to float and gains it back by the borders, until one has left.
    ort = dict(zip("uvw", (80.0, 52.0, 48.0), strict=True))
    choosing_convs(lambda name: {"ort": ort[name], "float": 45.0})(model)
    assert floats(model) == [True, True, True]


def test_a_small_one_leaves_though_a_large_one_loses_more_within_the_noise():
    model = planned(CHAIN, KERNELS)
    times = {"u": (9000.0, 8900.0), "v": (100.0, 400.0), "w": (80.0, 40.0)}
    choosing_convs(lambda name: dict(zip(("ort", "float"), times[name], strict=True)))(model)
    assert floats(model) == [False, False, True]


def test_the_result_that_integers_and_floats_read_has_one_border():
    text = CHAIN.replace("y = Exp (d)", "e = Sigmoid (c) y = Add (d, e)")
    model = planned(text, KERNELS)
    floating = {"w": 25.0}
    choosing_convs(lambda name: {"ort": 20.0, "float": floating.get(name, 45.0)})(model)
    # c has a DQ for the Sigmoid anyway, so the last one saves its own border by leaving.
    assert floats(model) == [False, False, True]


def test_several_leave_together_where_none_gains_alone():
    model = planned(CHAIN, KERNELS)
    # One that leaves takes its border along; all three save both.
    choosing({"ort": 20.0, "float": 25.0})(model)
    assert floats(model) == [True] * 3


@pytest.mark.parametrize(("between", "stays"), [("HardSwish", True), ("Tanh", False)])
def test_what_hands_on_integers_saves_the_borders_of_both_sides(between, stays):
    text = CHAIN.replace("b = Relu (a)", f"b = {between} (a)").replace("d = Conv", "z = Conv")
    text = text.replace("z = Conv <pads = [1,1,1,1]> (c, w) y = Exp (d)", "y = Exp (c)")
    model = planned(text, KERNELS)
    # Two times 20 us and two borders of 10, or four, against 73.5 us with the margin.
    choosing({"ort": 20.0, "float": 35.0})(model)
    assert floats(model) == [not stays] * 2


def test_convolutions_are_asked_about_with_their_attributes():
    asked = []

    def times(site):
        asked.append(site)
        return {"ort": 1.0, "float": 2.0}

    text = """
    g (float[n,4,h,w] x) => (float[n,8,p,q] y)
    { a = Conv <group = 2, strides = [2,1], pads = [1,0,1,0]> (x, k) y = Exp (a) }
    """
    model = planned(text, {"k": np.ones((8, 2, 3, 1), np.float32)})
    choosing(times, shapes={"x": (1, 4, 9, 5)})(model)
    (site,) = asked
    assert site.name == "Conv 8x2x3x1 group=2 dilations=1x1 pads=1x0x1x0 strides=2x1"
    assert site.inputs == ((1, 4, 9, 5),)
    assert site.result((1, 4, 9, 5)) == (1, 8, 5, 5)

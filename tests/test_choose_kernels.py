from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from choosing import CHAIN, KERNELS, MATMUL, STATIC, W, choosing, only, planned
from golden import assert_step, model_of
from test_assign_precision import PLAN

from qcompiler.ir.decisions import decision_of, left_to_ort, plan_of
from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.ir.sites import Choice, Site
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.fuse_regions import FuseRegions
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.round_to_nearest import RoundToNearest


def test_a_matmul_that_gains_nothing_stays_as_it_was():
    model = planned(MATMUL, W)
    choose = choosing({"kernel": 56.0, "ort": 80.0, "float": 41.0})
    assert choose(model).modified
    node = only(model)
    assert plan_of(node) is None
    decision = decision_of(node)
    assert (decision.action, decision.expected) == ("float", True)
    assert decision.why == (
        "float is faster here: 41 us against our kernel 56 us, ORT's int8 80 us "
        "(timed at 1x64, 16x64, 128x64)"
    )
    assert [choice.candidate for choice in choose.choices] == ["float"]
    assert not choose(model).modified


@pytest.mark.parametrize("rival", ["float", "ort"])
@pytest.mark.parametrize(
    "time",
    [53.5, 60.0, [30.0, 57.0]],
    ids=["within the noise", "slower", "slower with two threads"],
)
def test_our_kernel_stays_unless_another_is_clearly_faster(rival, time):
    model = planned(MATMUL, W)
    times = {"kernel": 56.0, "ort": 80.0, "float": 80.0} | {rival: time}
    choose = choosing(times)
    assert not choose(model).modified
    assert plan_of(only(model)) is not None
    assert [choice.candidate for choice in choose.choices] == ["kernel"]


def test_what_ort_does_faster_is_left_to_its_function_body():
    model = planned(MATMUL, W)
    choosing({"kernel": 56.0, "ort": 40.0, "float": 80.0})(model)
    assert left_to_ort(only(model)) is not None
    for rewrite in (InsertQDQ(), RoundToNearest(), FoldQDQ(), FuseRegions(lambda region: None)):
        rewrite(model)
    decision = decision_of(only(model, "QMatMulW8A8"))
    assert (decision.action, decision.expected) == ("body", True)
    assert decision.why.startswith("ORT's int8 is kept: 40 us against our kernel 56 us")


def test_without_a_kernel_the_function_body_is_what_a_matmul_gets_anyway():
    model = planned(MATMUL, W)
    choosing({"ort": 40.0, "float": 80.0}, kernels=False)(model)
    assert left_to_ort(only(model)) is None
    assert plan_of(only(model)) is not None


@pytest.mark.parametrize(
    ("text", "shapes", "rows"),
    [
        (MATMUL, None, [1, 16, 128]),
        (STATIC, None, [6]),
        (MATMUL, {"x": (7, 64)}, [7]),
        (MATMUL.replace("m,64", "-1,64"), None, [1, 16, 128]),
        (STATIC, {"x": (9, 9, 64)}, [6]),
    ],
)
def test_the_shapes_that_matter(text, shapes, rows):
    asked = []

    def times(site):
        asked.append(site)
        return {"kernel": 1.0, "ort": 2.0, "float": 3.0}

    choosing(times, shapes=shapes)(planned(text, W))
    assert asked == [Site("MatMul", (64, 48), tuple((row, 64) for row in rows), (), True)]


def test_what_costs_nobody_knows_is_quantized_as_planned():
    model = planned(MATMUL, W)
    choose = choosing(None)
    assert not choose(model).modified
    assert choose.choices[0].why == "its cost is not known here: quantized as planned"
    assert plan_of(only(model)) is not None


def test_four_bits_are_not_chosen_for_speed():
    model = planned(MATMUL, W, "x86-int4")
    choose = choosing({"ort": 80.0, "float": 1.0})
    assert not choose(model).modified
    assert choose.choices == []


def test_forced_ops_stay_float_with_the_reason():
    model = planned(MATMUL, W)
    choose = choosing({"kernel": 1.0, "ort": 2.0, "float": 3.0}, forced={"MatMul": "it was slower"})
    choose(model)
    assert decision_of(only(model)).why == "it was slower"
    assert plan_of(only(model)) is None


def test_missing_samples_are_said_before_anything_is_timed():
    def never(sites):
        raise AssertionError("timed")

    choose = choosing({})
    choose.costs, choose.observed = never, False
    with pytest.raises(CalibrationError, match=r"ranges are needed by .* --calib DIR"):
        choose(planned(CHAIN, KERNELS))
    choose = choosing({"float": 1.0, "ort": 2.0, "kernel": 3.0})
    choose.observed = False
    choose(planned(MATMUL, W))  # whose scales are dynamic


def test_choices_are_made_again():
    name = only(planned(MATMUL, W)).name
    made = [Choice(name, "MatMul 64x48", "float", "as then")]
    model = planned(MATMUL, W)
    choose = choosing({"kernel": 1.0, "ort": 2.0, "float": 3.0}, made=made)
    choose(model)
    assert decision_of(only(model)).why == "as then"
    assert choose.choices == made


def test_choices_of_nodes_with_one_name_are_made_again():
    text = (
        "g (float[2,64] x, bool f) => (float[2,n] y) { y = If (f) <"
        "then_branch = t () => (float[2,48] p) { p = MatMul (x, w) }, "
        "else_branch = e () => (float[2,32] q) { q = MatMul (x, v) }> }"
    )
    model = planned(text, W | {"v": np.ones((64, 32), np.float32)})
    products = [node for node in model.graph.all_nodes() if node.op_type == "MatMul"]
    for product in products:
        product.name = "product"
    made = [Choice("product", "MatMul 64x48", "float", "then"),
            Choice("product", "MatMul 64x32", "kernel", "else")]  # fmt: skip
    choosing(None, made=made)(model)
    assert [plan_of(product) is None for product in products] == [True, False]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, r"another model or .*: for node '.*' \(MatMul 64x48\) they hold nothing"),
        ({"site": "MatMul 64x64"}, "they hold MatMul 64x64"),
        ({"site": "MatMul 64x48", "more": True}, "node 'other' is not to be quantized here"),
    ],
)
def test_choices_of_another_model_are_refused(made, message):
    model = planned(MATMUL, W)
    name = only(model).name
    choices = []
    if made:
        choices.append(Choice(name, made["site"], "kernel", ""))
    if made.get("more"):
        choices.append(Choice("other", "MatMul 1x1", "kernel", ""))
    with pytest.raises((OptionError, ir.passes.PassError)) as error:
        choosing(None, made=choices)(model)
    assert re.search(message, str(error.value.__cause__ or error.value))


PAIR = """inputs x
v4 = MatMul  (x, v3)
y = Neg  (v4)
z = MatMul  (x, v5)
outputs y, z"""


def assert_chooses(text, before, after, times):
    """`times` are those of products with 48 columns; others never gain by staying float."""

    def of(site):
        return times if site.weight[1] == 48 else {"kernel": 1.0, "ort": 2.0, "float": 3.0}

    model = model_of(text, W | {"v": np.ones((64, 64), np.float32)})
    feeds = {"x": np.ones((6, 64), np.float32)}
    choose = choosing(of)
    assert_step("choose-kernels", model, before, after, feeds, choose=choose, notes=True)


@pytest.mark.parametrize(
    ("times", "note"),
    [
        (
            {"kernel": 56.0, "ort": 80.0, "float": 41.0},
            "# float: float is faster here: 41 us against our kernel 56 us, ORT's int8 80 us "
            "(timed at 6x64)",
        ),
        (
            {"kernel": 56.0, "ort": 40.0, "float": 80.0},
            f"{PLAN}\n# left to ORT: ORT's int8 is kept: 40 us against our kernel 56 us, "
            "float 80 us (timed at 6x64)",
        ),
        ({"kernel": 56.0, "ort": 80.0, "float": 55.0}, PLAN),
    ],
    ids=["float", "ORT's int8", "within the noise"],
)
def test_golden_one_of_two_products_of_a_shared_input(times, note):
    after = f"""inputs x
    v4 = MatMul  (x, v3)
    {note}
    y = Neg  (v4)
    z = MatMul  (x, v5)
    {PLAN}
    outputs y, z"""
    text = "g (float[6,64] x) => (float[6,48] y, float[6,64] z) "
    text += "{ p = MatMul (x, w) y = Neg (p) z = MatMul (x, v) }"
    assert_chooses(text, PAIR, after, times)


def test_golden_a_product_that_leaves_the_graph_and_is_read():
    before = """inputs x
    p = MatMul  (x, v3)
    y = MatMul  (p, v4)
    outputs p, y"""
    after = f"""inputs x
    p = MatMul  (x, v3)
    {PLAN}
    y = MatMul  (p, v4)
    # float: float is faster here: 41 us against our kernel 56 us, ORT's int8 80 us (timed at 6x64)
    outputs p, y"""
    text = "g (float[6,64] x) => (float[6,64] p, float[6,48] y) { p = MatMul (x, v) "
    times = {"kernel": 56.0, "ort": 80.0, "float": 41.0}
    assert_chooses(text + "y = MatMul (p, w) }", before, after, times)

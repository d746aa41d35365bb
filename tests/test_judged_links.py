"""keep-sensitive: ops between layers, and products of activations, are judged too."""

import re

import numpy as np
import pytest
from calibrated import facts, output_sqnr, planned
from golden import model_of
from sensitive_models import CHAIN_WEIGHTS, FEEDS, OBSERVE, RNG, RUN

from qcompiler.ir.decisions import decision_of, is_kept_float, operand_plan_of, plan_of
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.join_integers import JoinIntegers
from qcompiler.passes.keep_sensitive import KeepSensitive
from qcompiler.passes.node_rules import NodeRule
from qcompiler.targets.catalog import TARGETS

BETWEEN = (
    "g (float[1,4,8,8] x) => (float[1,8,4,4] z) "
    "{ c = Conv (x, a) u = Add (c, high) v = Add (u, low) d = Conv (v, k0) z = Neg (d) }"
)
BETWEEN_WEIGHTS = CHAIN_WEIGHTS | {"high": np.float32(1e4), "low": np.float32(-1e4)}


def test_what_is_rounded_between_two_layers_counts():
    """Up by much and down again, in integers: nothing is left, though both layers are good."""
    alone, joined = (planned(BETWEEN, BETWEEN_WEIGHTS) for _ in range(2))
    JoinIntegers()(joined)
    assert output_sqnr(alone, FEEDS[0], OBSERVE) > 25
    assert output_sqnr(joined, FEEDS[0], OBSERVE) < 5
    model, heard = planned(BETWEEN, BETWEEN_WEIGHTS), []
    told = lambda *what: heard.append(what[0])  # noqa: E731
    assert KeepSensitive(RUN, OBSERVE, progress=lambda: told)(model).modified
    JoinIntegers()(model)
    assert output_sqnr(model, FEEDS[0], OBSERVE) > 25
    assert [plan_of(node) is not None for node in model.graph] == [1, 0, 0, 1, 0]
    floats = [decision_of(node).why for node in model.graph if is_kept_float(node)]
    said = "kept float: in integers alone with 1 more it leaves the worst output -"
    assert len(floats) == 2 and all(why.startswith(said) for why in floats)
    assert re.match(r"run 1 of .* 2 layers and 2 between them quantized: -", heard[0])
    assert re.match(r"run 2 of .* 2 layers quantized: 3", heard[1])


def test_few_runs_look_at_all_together():
    model = planned(BETWEEN, BETWEEN_WEIGHTS)
    KeepSensitive(RUN, OBSERVE, KeepSensitive.Options(runs=3))(model)
    JoinIntegers()(model)
    assert not any(plan_of(node) for node in model.graph)
    assert output_sqnr(model, FEEDS[0], OBSERVE) > 25


@pytest.mark.parametrize(("activation", "runs"), [("static", 60), ("dynamic", 60), ("dynamic", 3)])
def test_a_product_of_activations_is_judged_where_it_was_asked_for(activation, runs):
    """One channel is most of the range of what it reads, and nothing of what it makes."""
    outlier = np.where(np.arange(8) == 3, 1e4, 1).astype(np.float32)
    weights = {"w": RNG.standard_normal((8, 8), dtype=np.float32) * outlier}
    feeds = [
        {
            "x": RNG.standard_normal((1, 8, 8), dtype=np.float32),
            "p": RNG.standard_normal((1, 8, 4), dtype=np.float32) / outlier[:, None] ** 2,
        }
        for _ in range(2)
    ]
    text = (
        "g (float[1,8,8] x, float[1,8,4] p) => (float[1,8,4] z) "
        "{ q = MatMul (x, w) s = MatMul (q, p) z = Neg (s) }"
    )
    model = model_of(text, weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    options = AssignPrecision.Options(products=True)
    rules = (NodeRule(match="node_0", activation=activation),)
    AssignPrecision(TARGETS["x86-int8"].scheme, options, rules)(model)
    assert operand_plan_of(model.graph[1])
    run, observe = facts(feeds)
    assert KeepSensitive(run, observe, KeepSensitive.Options(runs=runs))(model).modified
    assert plan_of(model.graph[0]) and not operand_plan_of(model.graph[1])
    why = decision_of(model.graph[1]).why
    assert re.match(r"kept float: in integers alone it leaves the worst output -?\d\.\d dB, ", why)
    assert output_sqnr(model, feeds[0], observe) > 25

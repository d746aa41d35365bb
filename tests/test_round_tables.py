"""round-tables: embeddings of 8 and 4 bits, where a rule of the recipe asks for them."""

import numpy as np
import pytest
from golden import assert_rewrites, model_of, run, sqnr

import qcompiler
from qcompiler.ir.decisions import decision_of, plan_of
from qcompiler.ir.errors import ModelError, OptionError
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.round_tables import RoundTables
from qcompiler.recipe import Recipe
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((40, 64), dtype=np.float32)
LOOKUP = "g (int64[n] i) => (float[n,64] y) { y = Gather (t, i) }"
TIED = (
    "g (int64[n] i) => (float[n,40] y) { x = Gather (t, i) h = Relu (x) "
    "u = Transpose <perm = [1, 0]> (t) y = MatMul (h, u) }"
)
FEEDS = {"i": np.array([3, 0, 39, 3])}


def planned(text, rule, table=TABLE, target="x86-int8"):
    model = model_of(text, {"t": table})
    for node, name in zip(model.graph, ("look", "act", "turn", "head"), strict=False):
        node.name = name
    rewrite = AssignPrecision(TARGETS[target].scheme, rules=Recipe(nodes=(rule,)).nodes)
    rewrite(model)
    return model


@pytest.mark.parametrize(
    ("rule", "attributes", "floor"),
    [
        ({"precision": "int8"}, "{'axis': '0'}", 40),
        ({"precision": "int4"}, "{'axis': '1', 'block_size': '32'}", 17),
        ({"precision": "int4", "group_size": 16}, "{'axis': '1', 'block_size': '16'}", 18),
    ],
)
def test_a_table_is_rounded(rule, attributes, floor):
    model = planned(LOOKUP, {"op": "Gather", **rule})
    after = f"""inputs i
        v4 = DequantizeLinear {attributes} (v2, v3)
        y = Gather  (v4, i)
        outputs y"""
    assert_rewrites(RoundTables(), model, after, FEEDS, exact=False, floor_db=floor)
    assert plan_of(model.graph[-1]) is None


@pytest.mark.parametrize(
    ("text", "rule", "why"),
    [
        (LOOKUP, {"precision": "fp8"}, "tables are int8, int4 or float"),
        (LOOKUP.replace("(t, i)", "<axis = 1> (t, i)"), {"precision": "int8"}, "only rows of the "),
        (LOOKUP, {"precision": "int4", "group_size": 128}, "rows of 64 are multiples of none of"),
        (LOOKUP, {"group_size": 32}, "unless a rule of the recipe names its precision"),
        (LOOKUP, {"precision": "int8", "group_size": 32}, "int8 tables have a scale per row"),
        (LOOKUP, {"precision": "int8", "activation": "static"}, "multiplied by nothing"),
    ],
)
def test_what_tables_cannot_be(text, rule, why):
    with pytest.raises(OptionError, match=why):
        planned(text, {"op": "Gather", **rule})


def test_a_table_of_three_dimensions_stays():
    text = "g (int64[n] i) => (float[n,8,64] y) { y = Gather (t, i) }"
    with pytest.raises(OptionError, match="only tables that are matrices of FLOAT"):
        planned(text, {"op": "Gather", "precision": "int8"}, TABLE.reshape(5, 8, 64))


def test_without_a_rule_a_table_stays_float():
    model = planned(TIED, {"op": "MatMul", "precision": "int8"})
    assert not RoundTables()(model).modified
    assert "stays float unless a rule" in decision_of(model.graph[0]).why


def test_rows_below_the_smallest_scale_are_said():
    small = TABLE.copy()
    small[7] *= np.float32(1e-40)
    model = planned(LOOKUP, {"op": "Gather", "precision": "int8"}, small)
    RoundTables()(model)
    assert "weights of 1 scales are below the smallest" in decision_of(model.graph[-1]).why


def test_nan():
    broken = TABLE.copy()
    broken[1, 2] = np.nan
    model = planned(LOOKUP, {"op": "Gather", "precision": "int8"}, broken)
    with pytest.raises(ModelError, match="table 't' of 'look' holds 1 NaN or Inf"):
        RoundTables()(model)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_tied_table_end_to_end(tmp_path, precision):
    """The embedding in 8 or 4 bits, the last layer as the target has it, the file smaller."""
    model = model_of(TIED, {"t": TABLE})
    exact = run(model, FEEDS)[0]
    recipe = Recipe(nodes=({"op": "Gather", "precision": precision},))
    made = qcompiler.compile(model, "arm-int8", tmp_path / "b", recipe=recipe)
    whys = {d.node: d.why for d in made.decisions if "looked up as they are stored" in d.why}
    assert whys
    found = qcompiler.load(made.bundle).run(None, FEEDS)[0]
    assert sqnr(exact, found) > (30 if precision == "int8" else 15)
    again = Recipe.read(made.bundle)
    assert again.nodes == recipe.nodes

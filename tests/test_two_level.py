"""Scales of two levels: their numbers, how they are rounded on, folded, and written for ORT."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import assert_rewrites, model_of, run, sqnr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import qcompiler
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import constant, new_initializer
from qcompiler.ir.two_level import on_two_levels, split_scale
from qcompiler.ir.types import PerGroup, QuantType
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.hqq import HQQ, hqq
from qcompiler.passes.node_rules import NodeRule
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.passes.weight_grid import rounded_on, weight_grid
from qcompiler.pipeline import Pipeline
from qcompiler.targets.catalog import TARGETS

K, N = 96, 24
RNG = np.random.default_rng(0)
W = RNG.standard_t(4, (K, N)).astype(np.float32)
FEEDS = {"x": RNG.standard_normal((7, K), dtype=np.float32)}
TEXT = f"g (float[m,{K}] x) => (float[m,{N}] y) {{ y = MatMul (x, w) }}"
TYPE = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 32), two_level=True)
RULE = {"op": "MatMul", "scales": "int8", "group_size": 32}
OPTIONS = ort.SessionOptions()
OPTIONS.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")


@settings(max_examples=50, deadline=None)
@given(arrays.arrays(np.float32, (3, 4), elements=st.floats(2.0**-30, 2.0**30, width=32)),
       arrays.arrays(np.bool_, (3, 4)))  # fmt: skip
def test_scales_are_near_keep_their_signs_and_split_exactly(sizes, negative):
    scale = np.where(negative, -sizes, sizes)
    stored = on_two_levels(scale)
    groups, column = split_scale(stored)
    np.testing.assert_array_equal(groups * column, stored)
    assert (np.sign(stored) == np.sign(scale)).all() and np.abs(groups.astype(int)).min() >= 1
    step = np.abs(scale).max(axis=0) / 127
    assert (np.abs(stored - scale) <= step * np.where(np.abs(groups) == 1, 1.01, 0.51)).all()


@pytest.mark.parametrize("range", ["max", "mse"])
def test_weights_are_rounded_on_the_scales_that_are_stored(range):
    floats = QuantType(ir.DataType.INT4, granularity=PerGroup(0, 32))
    for make in (lambda t: rounded_on(W, t, weight_grid(W, t, range)),
                 lambda t: hqq(W, t, HQQ.Options(range=range))):  # fmt: skip
        two, one = make(TYPE), make(floats)
        np.testing.assert_array_equal(on_two_levels(two.scale), two.scale)
        assert sqnr(W, two.floats(TYPE)) > sqnr(W, one.floats(floats)) - 0.1


def planned(target):
    model = model_of(TEXT, {"w": W})
    AssignPrecision(TARGETS[target].scheme, rules=[NodeRule(**RULE)])(model)
    return model


def test_becomes_two_dequantizes_and_one_op():
    model = planned("cuda-int4")
    after = """
        inputs x
        v4 = DequantizeLinear {'axis': '1'} (v2, v3)
        v6 = DequantizeLinear {'axis': '0', 'block_size': '32'} (v5, v4)
        y = MatMul  (x, v6)
        outputs y
    """
    model = assert_rewrites(RoundToNearest(), model, after, FEEDS, exact=False, floor_db=18)
    after = """
        inputs x
        y = qcompiler.QMatMulW4S8A16 {'block_size': '32'} (x, v2, v3, v4)
        outputs y
    """
    model = assert_rewrites(FoldQDQ(), model, after, FEEDS, exact=False, floor_db=30)
    assert [value.dtype.name for value in model.graph[0].inputs[1:]] == ["INT4", "INT8", "FLOAT"]


def test_scales_that_are_shared_or_computed_are_left():
    """A near miss: what the inner one dequantizes is an input of the model."""
    text = (
        f"g (float[m,{K}] x, int8[3,{N}] s) => (float[m,{N}] y) {{ t = DequantizeLinear <axis = 1> "
        "(s, c) d = DequantizeLinear <axis = 0, block_size = 32> (q, t) y = MatMul (x, d) }"
    )
    rounded = rounded_on(W, TYPE, weight_grid(W, TYPE))
    model = model_of(text, {"c": split_scale(rounded.scale)[1], "q": rounded.stored})
    assert not FoldQDQ()(model).modified


@pytest.mark.parametrize("target", ["x86-int4", "arm-int4", "cuda-int4"])
def test_a_bundle_is_as_with_float_scales_and_fast_in_onnx_runtime(target, tmp_path):
    facts = {"timing": False}
    recipes = [qcompiler.Recipe(nodes=[rule]) for rule in (RULE, {**RULE, "scales": "float"})]
    results = []
    for name, recipe in zip("ab", recipes, strict=True):
        bundle = qcompiler.compile(
            model_of(TEXT, {"w": W}), target, tmp_path / name, recipe=recipe, **facts
        ).bundle
        options = ort.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        options.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        session = qcompiler.load(
            bundle, native=False, providers=["CPUExecutionProvider"], session_options=options
        )
        results.append(session.run(None, FEEDS)[0])
        ops = {node.op_type for node in ir.load(tmp_path / f"{name}.onnx").graph}
        assert "MatMulNBits" in ops and "DequantizeLinear" not in ops
    assert sqnr(FEEDS["x"] @ W, results[0]) > sqnr(FEEDS["x"] @ W, results[1]) - 0.3 > 15


def test_a_file_for_onnx_runtime_has_the_product_of_both(tmp_path):
    recipe = qcompiler.Recipe(nodes=[RULE])
    file = qcompiler.compile(
        model_of(TEXT, {"w": W}), "cuda-int4", tmp_path / "m.onnx", recipe=recipe, emit="ort"
    ).bundle
    assert "MatMulNBits" in {node.op_type for node in ir.load(file).graph}
    rounded = rounded_on(W, TYPE, weight_grid(W, TYPE, "max")).floats(TYPE)
    assert sqnr(FEEDS["x"] @ rounded, ort.InferenceSession(file).run(None, FEEDS)[0]) > 100


@pytest.mark.parametrize(
    ("rule", "target", "message"),
    [
        ({"precision": "int8"}, "x86-int4", "only scales of int4 groups without integer zero"),
        ({"zero_points": "integer"}, "cuda-int4", "only scales of int4 groups without integer"),
    ],
)
def test_what_has_no_two_levels(rule, target, message):
    rules = [NodeRule(op="MatMul", scales="int8", **rule)]
    rewrite, model = AssignPrecision(TARGETS[target].scheme, rules=rules), model_of(TEXT, {"w": W})
    with pytest.raises(OptionError, match=message):
        rewrite(model)
    with pytest.raises(OptionError, match="unknown scales 'int4'; did you mean 'int8'"):
        NodeRule(op="MatMul", scales="int4")


def test_scales_per_column_have_no_op_of_two_levels():
    model = model_of(TEXT, {"w": W})
    for step in Pipeline.default("x86-int8"):
        if step.name == "fold-qdq":
            break
        model = step.apply(model).model
    (weight,) = (
        node for node in model.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].dtype is ir.DataType.INT8
        and constant(node.inputs[0]) is not None
    )  # fmt: skip
    inputs = [
        new_initializer(model.graph, "levels", RNG.integers(1, 128, N).astype(np.int8)),
        new_initializer(model.graph, "steps", np.full(N, 1e-4, np.float32)),
    ]
    scale = ir.node("DequantizeLinear", inputs, {"axis": -1})
    scale.outputs[0].name, scale.outputs[0].dtype = "scale", ir.DataType.FLOAT
    scale.outputs[0].shape = ir.Shape([N])
    model.graph.insert_before(model.graph[0], scale)
    weight.replace_input_with(1, scale.outputs[0])
    expected = run(model, FEEDS, plainly=True)[0]
    FoldQDQ()(model)
    assert not any(node.domain for node in model.graph)
    np.testing.assert_array_equal(run(model, FEEDS, plainly=True)[0], expected)

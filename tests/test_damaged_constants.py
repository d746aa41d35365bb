"""NaN and infinity in weights and constants: what is refused, what is said, what may be meant."""

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MATMUL, W
from golden import model_of

import qcompiler
from qcompiler.ir.errors import ModelError

NAN, INF = np.float32(np.nan), np.float32(np.inf)
BIAS = W[0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.nan, "weight 'w', which '.*' reads, holds 1 NaN: the model is damaged"),
        (np.inf, "'w' of '.*' holds 1 NaN or Inf; repair the model, or keep the node float"),
    ],
)
def test_weights_that_are_not_finite(tmp_path, bad, message):
    weight = W.copy()
    weight[0, 0] = bad
    with pytest.raises(ModelError, match=message):
        qcompiler.compile(model_of(MATMUL, {"w": weight}), "arm-int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_in_a_weight_that_is_not_quantized(tmp_path):
    bias = np.array([0, np.nan], np.float32)
    model = model_of("g (float[n,2] x) => (float[n,2] y) { y = Add (x, b) }", {"b": bias})
    with pytest.raises(ModelError, match="weight 'b', which 'node' reads, holds 1 NaN"):
        qcompiler.compile(model, "arm-int8", tmp_path / "b")
    model = model_of("g (float[n,2] x) => (float[n,2] y) { y = Max (x, b) }", {"b": bias[1]})
    qcompiler.compile(model, "arm-int8", tmp_path / "b")  # a single one may be meant


def with_constant(text, array):
    """A model in which `c` is a Constant node of this tensor."""
    model = model_of(f"g (float[n,64] x) => (float[n,8] y) {{ {text} }}", {"w": W})
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "Constant":
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
    return model


def spoiled(array, value):
    copy = array.copy()
    copy.flat[3] = value
    return copy


C = "c = Constant <value = float {0.0}> ()"
PRODUCT = f"{C} y = MatMul (x, c)"
ADDED = f"{C} a = MatMul (x, w) y = Add (a, c)"
SCALED = f"{C} a = MatMul (x, w) e = Identity (c) y = Mul (e, a)"
CHOSEN = f"{C} a = MatMul (x, w) n = IsNaN (a) y = Where (n, c, a)"
CLIPPED = f"{C} a = MatMul (x, w) y = Clip (a, c)"


@pytest.mark.parametrize(
    ("text", "array", "message"),
    [
        (PRODUCT, spoiled(W, NAN), "constant 'c', which 'node_1' reads, holds 1 NaN: the model is"),
        (ADDED, spoiled(BIAS, NAN), "constant 'c', which 'node_2' reads, holds 1 NaN"),
        (CHOSEN, spoiled(BIAS, NAN), "constant 'c', which 'node_3' reads, holds 1 NaN"),
        (ADDED, NAN, "constant 'c', which 'node_2' reads, holds 1 NaN"),
        (SCALED, NAN, "constant 'c', which 'node_3' reads, holds 1 NaN"),
        (SCALED, np.full(8, NAN), "constant 'c', which 'node_3' reads, holds 8 NaN"),
    ],
)
def test_nan_in_constant_nodes(tmp_path, text, array, message):
    with pytest.raises(ModelError, match=message):
        qcompiler.compile(with_constant(text, array), "arm-int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_in_a_scale(tmp_path):
    text = "g (float[n,64] x) => (float[n,8] y) { f = DequantizeLinear (q, s) y = MatMul (x, f) }"
    model = model_of(text, {"q": np.ones((64, 8), np.int8), "s": NAN})
    with pytest.raises(ModelError, match="weight 's', which 'node' reads, holds 1 NaN"):
        qcompiler.compile(model, "x86-int8", tmp_path / "out")


def test_nan_inside_a_branch_and_a_function(tmp_path):
    head = '<ir_version: 10, opset_import: ["" : 21, "my" : 1]>\n'
    branch = (
        "g (float[n,8] x, bool b) => (float[n,8] y) { y = If (b) <"
        f"then_branch = t () => (float[n,8] p) {{ {C} p = Add (x, c) }}, "
        "else_branch = e () => (float[n,8] q) { q = Neg (x) }> }"
    )
    function = (
        "g (float[n,8] x) => (float[n,8] y) { y = my.f (x) }\n"
        f'<domain: "my", opset_import: ["" : 21]> f (x) => (y) {{ {C} y = Mul (x, c) }}'
    )
    for text in (branch, function):
        model = model_of(text, {}, head=head)
        for node in (*model.graph.all_nodes(), *(n for f in model.functions.values() for n in f)):
            if node.op_type == "Constant":
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(NAN))
        with pytest.raises(ModelError, match="constant 'c', which .* reads, holds 1 NaN"):
            qcompiler.compile(model, "arm-int8", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "array"),
    [
        (CHOSEN, NAN), (CHOSEN, np.full(8, NAN)), (CHOSEN, -INF), (CLIPPED, -INF), (ADDED, -INF),
        (ADDED, spoiled(BIAS, -INF)),
    ],
)  # fmt: skip
def test_what_may_be_meant_is_not_mentioned(tmp_path, text, array):
    report = qcompiler.compile(with_constant(text, array), "arm-int8", tmp_path / "out")
    assert report.notes == ()
    x = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    (got,) = qcompiler.load(report.bundle, native=False).run(None, {"x": x})
    expected = x @ W + (array if text is ADDED else 0)
    assert (np.isinf(got) == np.isinf(expected)).all() and not np.isnan(got).any()


@pytest.mark.parametrize(
    ("text", "array", "what"),
    [
        (SCALED, INF, "the constant 'c' of 'node_3' (1): what"),
        (PRODUCT, spoiled(W, -INF), "the constant 'c' of 'node_1' (1): what"),
    ],
)
def test_infinity_that_is_multiplied_is_a_warning(tmp_path, text, array, what):
    recipe = qcompiler.Recipe(keep_float=("MatMul",))
    model = with_constant(text, array)
    report = qcompiler.compile(model, "arm-int8", tmp_path / "out", recipe=recipe)
    (note,) = report.notes
    assert note.startswith(f"infinite values in {what} is made of them is infinite or NaN")
    assert note in report.warnings


def test_few_infinite_weights_are_named(tmp_path):
    rows = " ".join(f"a{i + 1} = Mul (a{i}, s{i})" for i in range(5))
    model = model_of(
        f"g (float[n,8] a0) => (float[n,8] y) {{ {rows} y = Neg (a5) }}",
        {
            f"s{i}": np.array([1, INF], np.float32)[:, None] * np.ones(8, np.float32)
            for i in range(5)
        },
    )
    (note,) = qcompiler.compile(model, "arm-int8", tmp_path / "out").notes
    assert "'s0' of 'node' (8), the weight 's1' of 'node_1' (8), " in note
    assert "'s2' of 'node_2' (8) and 2 more: what is made" in note

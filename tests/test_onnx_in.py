"""Models as exporters write them: any opset, any form.  Canonicalized, they answer as before."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden import sqnr
from onnx import helper, numpy_helper
from opset_models import X, assert_survives, normals, proto_of, run

import qcompiler
from qcompiler.ir.errors import ModelError
from qcompiler.passes.canonicalize import Canonicalize

normal = normals()


def test_nodes_without_names_and_with_the_same(tmp_path):
    text = "g (float[2,3,4] x) => (float[2,3,4] y) { a = Neg (x) b = Exp (a) y = Abs (b) }"
    proto = proto_of(21, text, ir_version=10)
    proto.graph.node[0].name = proto.graph.node[1].name = "same"
    onnx.save(proto, tmp_path / "m.onnx")  # ORT itself refuses it
    report = qcompiler.compile(tmp_path / "m.onnx", "arm-int8", tmp_path / "b")
    names = [decision.node for decision in report.decisions]
    assert all(names) and len(set(names)) == 3
    np.testing.assert_allclose(
        run(report.bundle / "model.onnx", {"x": X})[0], np.exp(-X), rtol=1e-5
    )


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_sizes_of_zero_and_any(rows, tmp_path):
    text = (
        "g (float[m,k,4] x) => (float[a,b] y) "
        "{ s = Constant <value_ints = [-1, 4]> () r = Reshape (x, s) p = MatMul (r, w) "
        "e = Constant <value_ints = [0]> () z = Unsqueeze (p, e) y = Squeeze (z, e) }"
    )
    proto = proto_of(13, text, {"w": normal(4, 5)})
    assert_survives(proto, {"x": normal(rows, 2, 4)}, tmp_path)


def test_infers_the_shapes_a_model_does_not_say(tmp_path):
    text = "g (float[m,4] x) => (y) { p = MatMul (x, w) r = Relu (p) y = Neg (r) }"
    model = ir.from_proto(proto_of(21, text, {"w": normal(4, 300)}, ir_version=10))
    Canonicalize()(model)
    assert {str(node.outputs[0].shape) for node in model.graph} == {"[m,300]"}


def test_a_shape_said_wrongly_gives_way():
    text = "g (float[m,4] x) => (float[m,300] y) <float[7,7] p> { p = MatMul (x, w) y = Relu (p) }"
    proto = proto_of(21, text, {"w": normal(4, 300)}, ir_version=10)
    model = ir.from_proto(proto)
    Canonicalize()(model)
    assert str(model.graph[0].outputs[0].shape) == "[m,300]"


def test_sizes_are_inferred_before_constants_are_folded(tmp_path):
    text = (
        "g (float[4,4] x) => (float[4,2,2] y) { p = Relu (x) s = Shape (p) "
        "i = Constant <value_ints = [0]> () m = Gather (s, i) "
        "t = Constant <value_ints = [2, 2]> () u = Concat <axis = 0> (m, t) y = Reshape (p, u) }"
    )
    saved = assert_survives(proto_of(21, text, ir_version=10), {"x": normal(4, 4)}, tmp_path)
    assert [node.op_type for node in saved.graph] == ["Relu", "Reshape"]


def test_a_wrong_rank_beside_an_identity(tmp_path):
    text = (
        "g (float[m,4] x) => (float[m,4] y) <float[7] p, float[1,2,3] q> "
        "{ p = Relu (x) q = Identity (p) y = Neg (q) }"
    )
    model = ir.from_proto(proto_of(21, text, ir_version=10))
    Canonicalize()(model)
    assert [(n.op_type, str(n.outputs[0].shape)) for n in model.graph] == [
        ("Relu", "[m,4]"),
        ("Neg", "[m,4]"),
    ]


@pytest.mark.parametrize(("op", "left"), [("Bernoulli", 2), ("my.draw", 2), ("Neg", 1)])
def test_results_that_are_drawn_are_drawn_twice(op, left):
    text = f"g (float[4] x) => (float[4] y) {{ a = {op} (x) b = {op} (x) y = Sub (a, b) }}"
    model = ir.from_proto(proto_of(21, text, imports=', "my" : 1', ir_version=10))
    Canonicalize()(model)
    assert len(model.graph) == left + 1


def test_what_only_the_model_knows_of_a_custom_op_stays():
    text = (
        "g (float[m,4] x) => (float[m,n] y) <float[m,8] p> "
        "{ p = my.op (x) r = Relu (p) y = Neg (r) }"
    )
    model = ir.from_proto(proto_of(21, text, ir_version=10, imports=', "my" : 1'))
    Canonicalize()(model)
    assert [str(node.outputs[0].shape) for node in model.graph][:2] == ["[m,8]", "[m,8]"]
    assert model.graph[0].domain == "my" and model.graph.opset_imports["my"] == 1


def test_functions_that_call_functions_are_inlined(tmp_path):
    text = (
        "g (float[2,3,4] x) => (float[2,3,4] y) { y = my.outer <by = 3.0> (x) } "
        '<domain: "my", opset_import: ["" : 17, "my" : 1]> outer <by> (a) => (b) '
        "{ t = my.inner <by: float = @by> (a) b = my.inner <by: float = @by> (t) } "
        '<domain: "my", opset_import: ["" : 17]> inner <by> (a) => (b) '
        "{ c = Constant <value_float: float = @by> () b = Mul (a, c) }"
    )
    saved = assert_survives(proto_of(17, text, imports=', "my" : 1'), {"x": X}, tmp_path)
    assert not saved.functions and [node.op_type for node in saved.graph] == ["Mul", "Mul"]


def test_a_function_of_another_opset(tmp_path):
    text = (
        "g (float[2,3,4] x) => (float[2,3,4] y) { y = my.f (x) } "
        '<domain: "my", opset_import: ["" : 18]> f (a) => (b) { b = Relu (a) }'
    )
    proto = proto_of(21, text, imports=', "my" : 1', ir_version=10)
    assert_survives(proto, {"x": X}, tmp_path)
    proto.functions[0].node[0].op_type = "Identity"  # which opset 21 has changed
    with pytest.raises(ModelError, match="version 21 in the model but version 18"):
        Canonicalize()(ir.from_proto(proto))


NESTED = (
    "g (float[m,64] x, int64 n, bool c) => (float[m,64] y) "
    "{ y = Loop (n, c, x) <body = l (int64 i, bool go, float[m,64] state) => "
    "(bool more, float[m,64] next) { more = Identity (go) h = If (c) "
    "<then_branch = a () => (float[m,64] p) { k = MatMul (state, w) p = Tanh (k) }, "
    "else_branch = e () => (float[m,64] q) { q = Add (state, x) }> "
    "z = MatMul (h, w) next = Clip (z, lo, hi) }> }"
)


@pytest.mark.parametrize("condition", [True, False])
def test_bodies_within_bodies(condition, tmp_path):
    """Weights inside the bodies, values of the outer graph, an opset to raise: and compiled too."""
    proto = proto_of(11, NESTED)
    loop = proto.graph.node[0].attribute[0].g
    weight = normal(64, 64) / 16
    loop.initializer.append(numpy_helper.from_array(np.float32(-0.9), "lo"))
    loop.initializer.append(numpy_helper.from_array(np.float32(0.9), "hi"))
    loop.initializer.append(numpy_helper.from_array(weight, "w"))
    feeds = {"x": normal(5, 64), "n": np.array(3), "c": np.array(condition)}
    saved = assert_survives(proto, feeds, tmp_path)
    inside = [v for graph in saved.graph.subgraphs() for v in graph.initializers.values()]
    assert all(value.const_value.nbytes < weight.nbytes for value in inside)
    report = qcompiler.compile(tmp_path / "model.onnx", "x86-int8", tmp_path / "b")
    (expected,) = run(proto, feeds)
    for native in (True, False):
        (got,) = qcompiler.load(report.bundle, native=native).run(None, feeds)
        assert sqnr(expected, got) > 25


def test_texts(tmp_path):
    text = "g (string[2] x) => (string[1,2] y) { t = Unsqueeze <axes = [0]> (x) y = Identity (t) }"
    assert_survives(proto_of(11, text), {"x": np.array(["a", "ü"], object)}, tmp_path)


def test_sequences(tmp_path):
    text = (
        "g (float[2,3] x, float[4,3] z) => (float[6,3] y, seq(float[a,b]) s) "
        "{ s = SequenceConstruct (x, z) y = ConcatFromSequence <axis = 0> (s) }"
    )
    assert_survives(proto_of(11, text), {"x": normal(2, 3), "z": normal(4, 3)}, tmp_path)


def test_optional_types(tmp_path):
    text = (
        "g (float[2,3] x) => (float[2,3] y, bool h) "
        "{ o = Optional (x) h = OptionalHasElement (o) y = OptionalGetElement (o) }"
    )
    assert_survives(proto_of(16, text), {"x": normal(2, 3)}, tmp_path)


def test_a_function_of_an_older_opset(tmp_path):
    body = [
        helper.make_node("Relu", ["a"], ["t"]),
        helper.make_node("Add", ["a", "t"], ["b"]),
    ]
    old = helper.make_function("my", "Old", ["a"], ["b"], body, [helper.make_opsetid("", 13)])
    values = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2, 3]) for n in "xy"]
    call = helper.make_node("Old", ["x"], ["y"], domain="my")
    model = helper.make_model(
        helper.make_graph([call], "g", values[:1], values[1:]), functions=[old], ir_version=9,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("my", 1)],
    )  # fmt: skip
    onnx.save(model, tmp_path / "m.onnx")
    report = qcompiler.compile(tmp_path / "m.onnx", "arm-int8", tmp_path / "b")
    x = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(qcompiler.load(report.bundle).run(None, {"x": x})[0], 2 * x)


def test_a_result_whose_shape_is_said_wrongly(tmp_path):
    text = "g (float[b,64] x) => (float[b,63] y) { y = MatMul (x, w) }"
    onnx.save(proto_of(21, text, {"w": normal(64, 64)}, ir_version=10), tmp_path / "m.onnx")
    report = qcompiler.compile(tmp_path / "m.onnx", "arm-int8", tmp_path / "b")
    x = np.ones((2, 64), np.float32)
    assert qcompiler.load(report.bundle).run(None, {"x": x})[0].shape == (2, 64)


def test_nodes_out_of_order():
    model = ir.from_proto(
        proto_of(21, "g (float[2] x) => (float[2] y) { a = Neg (x) y = Exp (a) }", ir_version=10)
    )
    first, second = model.graph
    model.graph.remove(first)
    model.graph.insert_after(second, first)
    Canonicalize()(model)
    assert [node.op_type for node in model.graph] == ["Neg", "Exp"]

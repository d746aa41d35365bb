"""Models as exporters write them: any opset, any form.  Canonicalized, they answer as before."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import sqnr
from onnx import TensorProto, helper, numpy_helper, parser

import qcompiler
from qcompiler.frontend import load_model
from qcompiler.ir.errors import ModelError
from qcompiler.model_file import save_model
from qcompiler.passes.canonicalize import OPSET, Canonicalize
from qcompiler.session_options import new_session_options

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def proto_of(opset, text, weights=None, *, ir_version=8, imports=""):
    proto = parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["" : {opset}{imports}]> {text}'
    )
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return proto


def run(proto, feeds):
    options = new_session_options()
    options.log_severity_level = 4
    source = proto if isinstance(proto, Path) else proto.SerializeToString()
    return ort.InferenceSession(source, options).run(None, feeds)


def assert_survives(proto, feeds, folder):
    """Load, canonicalize, save, run: the same results.  Returns the saved model."""
    onnx.save(proto, folder / "model.onnx")
    model = Canonicalize()(load_model(folder / "model.onnx")).model
    assert model.graph.opset_imports[""] >= OPSET
    save_model(model, folder / "canonical.onnx")
    for got, want in zip(run(folder / "canonical.onnx", feeds), run(proto, feeds), strict=True):
        if isinstance(want, np.ndarray) and want.dtype.kind == "f":
            # ORT's kernels of two opsets may round differently, by a unit in the last place.
            np.testing.assert_allclose(got, want, rtol=3e-7, atol=1e-7)
        else:
            np.testing.assert_equal(got, want)
    return ir.load(folder / "canonical.onnx")


X, M = normal(2, 3, 4), normal(2, 1, 4)
C, TRUE = normal(3), np.array(True)
IMAGE = normal(1, 1, 4, 4)
UP, MIXED = np.array([1, 1, 2, 2], np.float32), np.array([1, 1, 0.6, 1.6], np.float32)
BN = "float[3] s, float[3] b, float[3] m, float[3] v"
BN_FEEDS = {"x": X, "s": normal(3), "b": normal(3), "m": normal(3), "v": np.abs(normal(3))}
SIZES = np.array([1, 1, 7, 3])
NONE = np.zeros(0, np.float32)

# opset at which the meaning changed: models one opset before it, and at it
BOUNDARIES = [
    (8, "g (float[2,3,4] x, SBN) => (float[2,3,4] y) "
     "{ y = BatchNormalization <spatial = 1> (x, s, b, m, v) }", BN_FEEDS),
    (13, "g (float[2,3,4] x, SBN) => (float[2,3,4] y) "
     "{ y = BatchNormalization (x, s, b, m, v) }", BN_FEEDS),
    (6, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Dropout <ratio = 0.4> (x) }", {"x": X}),
    (11, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Dropout <ratio = 0.4> (x) }", {"x": X}),
    (7, "g (float[n,1,4,4] x) => (float[n,1,8,8] y) "
     "{ y = Upsample <mode = \"linear\", scales = [1.0, 1.0, 2.0, 2.0]> (x) }", {"x": IMAGE}),
    (9, "g (float[n,1,4,4] x) => (float[n,1,h,w] y) { y = Upsample <mode = \"linear\"> (x, up) }",
     {"x": IMAGE}),
    (9, "g (float[n,1,4,4] x, float[4] f) => (float[n,1,h,w] y) { y = Upsample (x, f) }",
     {"x": IMAGE, "f": UP}),
    (10, "g (float[n,1,4,4] x) => (float[n,1,h,w] y) { y = Resize <mode = \"linear\"> (x, mixed) }",
     {"x": IMAGE}),
    (10, "g (float[n,1,4,4] x) => (float[n,1,h,w] y) { y = Resize (x, mixed) }", {"x": IMAGE}),
    (11, "g (float[n,1,4,4] x) => (float[n,1,h,w] y) "
     "{ y = Resize <mode = \"cubic\"> (x, none, none, sizes) }", {"x": IMAGE}),
    (9, "g (float[2,3] x) => (float[2,3] y) { y = ThresholdedRelu <alpha = 0.4> (x) }",
     {"x": normal(2, 3)}),
    (10, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Clip <min = -0.5> (x) }", {"x": X}),
    (10, "g (float[2,3,4] x) => (float[2,3,6] y) "
     "{ y = Pad <pads = [0,0,1,0,0,1], value = 2.5> (x) }", {"x": X}),
    (9, "g (float[2,3,4] x) => (float[2,2,2] y) "
     "{ y = Slice <axes = [1,2], starts = [1,1], ends = [3,-1]> (x) }", {"x": X}),
    (9, "g (float[2,3,4] x) => (float[2,3,2] y, int64[2,3,2] i) { y, i = TopK <k = 2> (x) }",
     {"x": X}),
    (12, "g (float[a,b,4] x) => (float[a,b,4] y) { y = Softmax (x) }", {"x": X}),
    (12, "g (float[a,b,4] x) => (float[a,b,4] y) { y = LogSoftmax <axis = 0> (x) }", {"x": X}),
    (12, "g (float[a,b,4] x) => (float[a,b,4] y) { y = Hardmax (x) }", {"x": X}),
    (12, "g (float[2,1,4] x) => (float[2,1,4] y) "
     "{ t = Squeeze <axes = [1]> (x) y = Unsqueeze <axes = [1]> (t) }", {"x": M}),
    (12, "g (float[2,3,4] x) => (float[2,4] y) "
     "{ y = ReduceSum <axes = [1], keepdims = 0> (x) }", {"x": X}),
    (12, "g (float[2,3,4] x) => (float[2,3,1] y, float[2,3,3] z) "
     "{ y, z = Split <axis = 2, split = [1,3]> (x) }", {"x": X}),
    (17, "g (float[2,3,4] x) => (float[2,3,1] y) { y = ReduceMean <axes = [-1]> (x) }", {"x": X}),
    (17, "g (float[2,3,4] x) => (float[2,3,2] y, float[2,3,2] z) { y, z = Split <axis = 2> (x) }",
     {"x": X}),
    (17, "g (float[2,3,4] x, float[4] s) => (float[2,3,4] y) { y = LayerNormalization (x, s) }",
     {"x": X, "s": normal(4)}),
    (19, "g (float[1,1,4,4] x, float[1,2,2,2] p) => (float[1,1,2,2] y) "
     "{ y = GridSample <mode = \"bicubic\"> (x, p) }", {"x": IMAGE, "p": normal(1, 2, 2, 2)}),
    (19, "g (float[1,8,1] x) => (float[1,8,2] y) { y = DFT (x) }", {"x": normal(1, 8, 1)}),
    (20, "g (float[1,c,4] x, float[2] s, float[2] b) => (float[1,c,4] y) "
     "{ y = GroupNormalization <num_groups = 2, epsilon = 0.1> (x, s, b) }",
     {"x": normal(1, 4, 4), "s": normal(2), "b": normal(2)}),
]  # fmt: skip
CONSTANTS = {"up": UP, "mixed": MIXED, "none": NONE, "sizes": SIZES}


@pytest.mark.parametrize(("opset", "text", "feeds"), BOUNDARIES, ids=lambda v: str(v)[-50:])
def test_keeps_the_meaning_an_op_had(opset, text, feeds, tmp_path):
    weights = {name: array for name, array in CONSTANTS.items() if name in text}
    proto = proto_of(max(opset, 7), text.replace("SBN", BN), weights)
    assert_survives(proto, feeds, tmp_path)


def test_nearest_neighbours_of_changing_scales(tmp_path):
    """Before opset 11 one axis took the point below and another the point above."""
    text = "g (float[n,1,4,4] x, float[4] f) => (float[n,1,h,w] y) { y = Resize (x, f) }"
    assert_survives(proto_of(10, text), {"x": IMAGE, "f": MIXED}, tmp_path)


def test_a_scan_over_a_batch(tmp_path):
    text = (
        "g (float[3,2] s, float[3,5,2] x) => (float[3,2] y, float[3,5,2] z) "
        "{ y, z = Scan <num_scan_inputs = 1, body = b (float[2] a, float[2] n) => "
        '(float[2] t, float[2] u) { t = Add (a, n) u = Neg (t) }> ("", s, x) }'
    )
    assert_survives(proto_of(8, text), {"s": normal(3, 2), "x": normal(3, 5, 2)}, tmp_path)


def test_a_scan_of_ragged_sequences_is_refused(tmp_path):
    text = (
        "g (int64[3] l, float[3,2] s, float[3,5,2] x) => (float[3,2] y) "
        "{ y = Scan <num_scan_inputs = 1, body = b (float[2] a, float[2] n) => (float[2] t) "
        "{ t = Add (a, n) }> (l, s, x) }"
    )
    with pytest.raises(ModelError, match="Scan of opset 8 with sequence_lens.*newer opset"):
        Canonicalize()(ir.from_proto(proto_of(8, text)))


def test_old_ir_lists_weights_as_inputs(tmp_path):
    text = "g (float[2,4] x, float[4,3] w, float[3] c) => (float[2,3] y) { y = Gemm (x, w, c) }"
    proto = proto_of(7, text, {"w": normal(4, 3), "c": C}, ir_version=3)
    saved = assert_survives(proto, {"x": normal(2, 4)}, tmp_path)
    assert [value.name for value in saved.graph.inputs] == ["x"]
    assert [node.op_type for node in saved.graph] == ["MatMul", "Add"]


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


def test_a_shared_weight_stays_shared(tmp_path):
    text = "g (float[m,16] x) => (float[m,16] y) { p = MatMul (x, w) y = MatMul (p, w) }"
    proto = proto_of(21, text, {"w": normal(16, 16)}, ir_version=10)
    onnx.save(proto, tmp_path / "m.onnx")
    report = qcompiler.compile(tmp_path / "m.onnx", "arm-int8", tmp_path / "b")
    stored = ir.load(report.bundle / "model.onnx").graph.initializers.values()
    assert sum(value.const_value.nbytes >= 256 for value in stored) == 1


@pytest.mark.parametrize("rank", [1, 2])
def test_sparse_initializers(rank, tmp_path):
    flat = np.array([1, 5, 10])
    indices = flat if rank == 1 else np.stack(np.unravel_index(flat, (4, 3)), axis=1)
    proto = proto_of(13, "g (float[2,4] x) => (float[2,3] y) { y = MatMul (x, w) }")
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(np.array([1, 2, 3], np.float32), "w"),
            numpy_helper.from_array(indices, "i"),
            [4, 3],
        )
    )
    assert_survives(proto, {"x": normal(2, 4)}, tmp_path)


def test_a_sparse_constant(tmp_path):
    proto = proto_of(13, "g (float[2,4] x) => (float[2,4] y) { y = Add (x, c) }")
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("v", TensorProto.FLOAT, [2], [1.5, -2]),
        helper.make_tensor("i", TensorProto.INT64, [2], [0, 7]),
        [2, 4],
    )
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    assert_survives(proto, {"x": normal(2, 4)}, tmp_path)


@pytest.mark.parametrize(("dims", "index"), [([1 << 20, 1 << 20], 0), ([4, 3], 12), ([4, 3], -1)])
def test_a_sparse_tensor_that_cannot_be(dims, index, tmp_path):
    proto = proto_of(13, "g (float[2,4] x) => (float[2,3] y) { y = MatMul (x, w) }")
    sparse = proto.graph.sparse_initializer.add(dims=dims)
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([index]), "i"))
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="not a readable ONNX model"):
        load_model(tmp_path / "m.onnx")


def test_constants_of_every_form(tmp_path):
    text = (
        "g (float[2,3,4] x) => (float[2,12] y) { f = Constant <value_float = 2.5> () "
        "v = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> () "
        "s = Constant <value_ints = [2, -1]> () a = Mul (x, f) b = Add (a, v) y = Reshape (b, s) }"
    )
    saved = assert_survives(proto_of(13, text), {"x": X}, tmp_path)
    assert "Constant" not in [node.op_type for node in saved.graph]


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


def test_training_mode_stays():
    text = (
        "g (float[2,3,4] x, SBN) => (float[2,3,4] y, float[3] r, float[3] w) "
        "{ y, r, w = BatchNormalization <training_mode = 1> (x, s, b, m, v) }"
    ).replace("SBN", BN)
    model = ir.from_proto(proto_of(14, text))
    Canonicalize()(model)
    (node,) = model.graph
    assert len(node.outputs) == 3 and node.attributes.get_int("training_mode") == 1
    text = "g (float[2,3] x) => (float[2,3] y) { y = Dropout (x, r, t) }"
    model = ir.from_proto(proto_of(13, text, {"r": np.float32(0.5), "t": np.array(True)}))
    Canonicalize()(model)
    assert [node.op_type for node in model.graph] == ["Dropout"]


def test_custom_domains_are_left_alone(tmp_path):
    text = (
        "g (float[2,4] x) => (float[2,4] y) "
        "{ t = com.microsoft.CDist (x, c) u = Unsqueeze <axes = [0]> (t) "
        "y = Squeeze <axes = [0]> (u) }"
    )
    proto = proto_of(11, text, {"c": normal(4, 4)}, imports=', "com.microsoft" : 1')
    saved = assert_survives(proto, {"x": normal(2, 4)}, tmp_path)
    assert saved.graph[0].op_identifier()[:2] == ("com.microsoft", "CDist")


def test_an_attribute_that_a_rule_would_lose(tmp_path):
    text = (
        "g (float[2] x) => (float[2] y) "
        "{ q = CastLike <saturate = 0> (x, like) y = Cast <to = 1> (q) }"
    )
    proto = proto_of(19, text, ir_version=9)
    proto.graph.initializer.append(helper.make_tensor("like", TensorProto.FLOAT8E4M3FN, [1], [1.0]))
    assert_survives(proto, {"x": np.array([1, 1e6], np.float32)}, tmp_path)


def external(proto, folder):
    """Save with every tensor, however small, in another file, and load again."""
    onnx.save(
        proto,
        folder / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    return load_model(folder / "model.onnx")


def test_canonicalizing_reads_no_weight(tmp_path):
    text = (
        "g (float[m,64] x) => (float[m,64] y) "
        "{ p = Gemm <transB = 1> (x, w, b) t = Transpose (v) y = MatMul (p, t) }"
    )
    proto = proto_of(13, text, {"w": normal(64, 64), "b": normal(64), "v": normal(64, 64)})
    model = external(proto, tmp_path)
    originals = {name: value.const_value for name, value in model.graph.initializers.items()}
    Canonicalize()(model)
    weights = [
        node.inputs[1].const_value.numpy() for node in model.graph if "MatMul" in node.op_type
    ]
    for name, weight in zip("wv", weights, strict=True):
        # Turned, but still the pages of the file.
        assert np.shares_memory(weight, originals[name].numpy())


def test_sizes_that_lie_in_another_file(tmp_path):
    text = "g (float[n,1,4,4] x) => (float[n,1,h,w] y) { y = Upsample (x, up) }"
    model = external(proto_of(9, text, {"up": UP}), tmp_path)
    Canonicalize()(model)
    assert str(model.graph.outputs[0].producer().outputs[0].shape) == "[n,1,8,8]"


def test_a_sum_of_large_files_is_not_opened(tmp_path, monkeypatch):
    proto = proto_of(21, "g (float[m,64] x) => (float[m,64] y) { y = MatMul (x, w) }",
                     {"w": normal(64, 64)}, ir_version=10)  # fmt: skip
    onnx.save(proto, tmp_path / "m.onnx")
    size = (tmp_path / "m.onnx").stat().st_size
    monkeypatch.setattr("qcompiler.job._LOAD_CHECK_LIMIT", size)
    monkeypatch.setattr("qcompiler.job.load", lambda *args, **kwargs: pytest.fail("opened"))
    qcompiler.compile(tmp_path / "m.onnx", "arm-int8", tmp_path / "b")


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

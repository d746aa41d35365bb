"""Ops whose meaning an opset changed: canonicalized, models of before and after answer the same."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from opset_models import UP, X, assert_survives, normals, proto_of

from qcompiler.ir.errors import ModelError
from qcompiler.passes.canonicalize import Canonicalize

normal = normals()

M = normal(2, 1, 4)
IMAGE = normal(1, 1, 4, 4)
MIXED = np.array([1, 1, 0.6, 1.6], np.float32)
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


@pytest.mark.parametrize(
    ("opset", "text", "feeds"),
    BOUNDARIES,
    ids=lambda v: "" if isinstance(v, dict) else str(v)[-50:],
)
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

"""normalize-qdq: each rewrite in text, and its numbers in stock ORT.

All are equal bit for bit, but for Gemm: its last float bits differ, so that a tie may move.
"""

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_rewrites, model_of, run, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.normalize_qdq import NormalizeQDQ

RNG = np.random.default_rng(0)
INT4 = ir.DataType.INT4.numpy()
W = {
    "s": np.float32(0.03), "z": np.uint8(120), "s1": np.array([0.03], np.float32),
    "z1": np.array([120], np.uint8), "t": np.float32(0.07), "u": np.uint8(3),
    "low": np.uint8(0), "zi": np.int8(-8), "zero8": np.int8(0), "least": np.int8(-128),
    "w": RNG.integers(-127, 128, (6, 4)).astype(np.int8), "wz": np.zeros(4, np.int8),
    "ws": RNG.uniform(0.01, 0.03, 4).astype(np.float32),
    "wu": RNG.integers(0, 256, (6, 4)).astype(np.uint8), "wt": np.ones((4, 6), np.int8),
    "wuz": RNG.integers(100, 150, 4).astype(np.uint8), "middle": np.full(4, 128, np.uint8),
    "wf": RNG.standard_normal((6, 4)).astype(np.float32),
    "b": RNG.integers(-90, 90, 4).astype(np.int32), "bf": np.ones(4, np.float32),
    "bs": np.full(4, 0.001, np.float32), "bz": np.zeros(4, np.int32),
    "to24": np.array([2, 12]), "to3": np.array([2, 2, 3]), "axis0": np.array([0]),
    "first": np.array([0]), "third": np.array([3]), "axis1": np.array([1]), "ids": np.array([1, 0]),
    "k": RNG.integers(-127, 128, (4, 2, 3, 3)).astype(np.int8),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "twice": np.array([1, 1, 2, 2], np.float32),
    "wide": np.array([3, 2, 6]), "zf": np.float32(0), "one": np.float32(1),
    "halves": np.array([3, 3]), "six": np.float32(6), "t6": np.float32(6 / 255),
}  # fmt: skip
QDQ = "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
FLOATS = {"x": RNG.standard_normal((2, 6)).astype(np.float32)}
IMAGE = {"x": RNG.standard_normal((1, 2, 8, 8)).astype(np.float32)}


def named(text, weights=W):
    model = model_of(text, weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    return model


def assert_normalizes(text, after, feeds, weights=W):
    model = named(text, weights)
    expected = run(model, feeds, plainly=True)
    assert_rewrites(NormalizeQDQ(), model, after)
    verify(model, Stage.FLOAT, "normalize-qdq")
    for got, want in zip(run(model, feeds, plainly=True), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    run(model, feeds)
    return model


def assert_stays(text, feeds, why=None):
    model = named(text)
    before = text_of(model)
    assert not NormalizeQDQ()(model).modified
    assert text_of(model) == before
    run(model, feeds)
    if why is not None:
        assert any(why in decision_of(node).why for node in model.graph)


def test_a_float_model_is_left_alone():
    model = named(
        "g (float[2,6] x) => (float[2,4] y) "
        "{ m = MatMul (x, wf) n = MatMul (x, wf) y = Add (m, n) }"
    )
    assert not NormalizeQDQ()(model).modified


PLAIN_WEIGHT = """inputs x
    v4 = DequantizeLinear {'axis': '1'} (v2, v3)
    y = MatMul  (x, v4)
    outputs y"""


@pytest.mark.parametrize(
    "weight",
    [
        "f = DequantizeLinear <axis = 1> (w, ws, wz)",
        "f = DequantizeLinear <axis = -1> (w, ws)",
        "q = QuantizeLinear <axis = 1> (wf, ws, wz) f = DequantizeLinear <axis = 1> (q, ws, wz)",
        "q = QuantizeLinear <axis = 1, output_dtype = 3> (wf, ws) "
        "f = DequantizeLinear <axis = 1> (q, ws)",
        "f = DequantizeLinear <axis = 1> (wu, ws, middle)",
        "g = DequantizeLinear <axis = 0> (wt, ws, wz) f = Transpose (g)",
    ],
)
def test_symmetric_weights_have_one_form(weight):
    text = f"g (float[2,6] x) => (float[2,4] y) {{ {weight} y = MatMul (x, f) }}"
    model = assert_normalizes(text, PLAIN_WEIGHT, FLOATS)
    (widened, _) = model.graph
    assert widened.inputs[0].dtype is ir.DataType.INT8


def test_weights_are_rounded_half_to_even():
    weights = {
        "wf": np.array([[0.5, 1.5], [2.5, -0.5], [300, -300]], np.float32),
        "s": np.float32(1),
        "z8": np.int8(0),
    }
    model = named(
        "g (float[1,3] x) => (float[1,2] y) "
        "{ q = QuantizeLinear (wf, s, z8) f = DequantizeLinear (q, s, z8) y = MatMul (x, f) }",
        weights,
    )
    NormalizeQDQ()(model)
    stored = next(iter(model.graph)).inputs[0].const_value.numpy()
    np.testing.assert_array_equal(stored, [[0, 2], [2, 0], [127, -128]])


def test_asymmetric_weights_keep_their_zero_points():
    model = named(
        "g (float[2,6] x) => (float[2,4] y) "
        "{ f = DequantizeLinear <axis = 1> (wu, ws, wuz) y = MatMul (x, f) }"
    )
    expected = run(model, FLOATS, plainly=True)
    assert NormalizeQDQ()(model).modified
    assert not NormalizeQDQ()(model).modified
    np.testing.assert_array_equal(run(model, FLOATS, plainly=True), expected)
    stored, _, zero = (value.const_value.numpy() for value in next(iter(model.graph)).inputs)
    np.testing.assert_array_equal(stored, W["wu"].astype(int) - 128)
    np.testing.assert_array_equal(zero, W["wuz"].astype(int) - 128)


def test_blocks_are_turned_with_their_weight():
    weights = {
        "w4": RNG.integers(-8, 8, (8, 32)).astype(INT4),
        "s4": RNG.uniform(0.1, 1, (8, 2)).astype(np.float32),
    }
    assert_normalizes(
        "g (float[2,32] x) => (float[2,8] y) "
        "{ f = DequantizeLinear <axis = 1, block_size = 16> (w4, s4) "
        "t = Transpose <perm = [1, 0]> (f) y = MatMul (x, t) }",
        """inputs x
        v4 = DequantizeLinear {'axis': '0', 'block_size': '16'} (v2, v3)
        y = MatMul  (x, v4)
        outputs y""",
        {"x": RNG.standard_normal((2, 32)).astype(np.float32)},
        weights,
    )


def test_gemm_over_quantized_weights_is_a_matmul():
    assert_normalizes(
        f"g (float[2,6] x) => (float[2,4] y) {{ {QDQ} "
        "f = DequantizeLinear <axis = 0> (wt, ws) c = DequantizeLinear <axis = 0> (b, bs, bz) "
        "y = Gemm <transB = 1> (d, f, c) }",
        """inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v5 = DequantizeLinear  (v4, v2, v3)
        v8 = DequantizeLinear {'axis': '0'} (v6, v7)
        v11 = DequantizeLinear {'axis': '1'} (v9, v10)
        v12 = MatMul  (v5, v11)
        y = Add  (v12, v8)
        outputs y""",
        FLOATS,
    )


def test_gemm_with_alpha_stays():
    assert_stays(
        "g (float[2,6] x) => (float[2,4] y) "
        "{ f = DequantizeLinear <axis = 1> (w, ws) y = Gemm <alpha = 0.5> (x, f) }",
        FLOATS,
        "alpha or beta",
    )


MOVES = {
    "Reshape (d, to3)": ("[2,2,3]", "Reshape  (v4, v5)"),
    "Transpose (d)": ("[6,2]", "Transpose  (v4)"),
    "Unsqueeze (d, axis0)": ("[1,2,6]", "Unsqueeze  (v4, v5)"),
    "Flatten (d)": ("[2,6]", "Flatten  (v4)"),
    "Identity (d)": ("[2,6]", "Identity  (v4)"),
    "Slice (d, first, third, axis1)": ("[2,3]", "Slice  (v4, v5, v6, v7)"),
    "Gather <axis = 1> (d, ids)": ("[2,2]", "Gather {'axis': '1'} (v4, v5)"),
    "Expand (d, wide)": ("[3,2,6]", "Expand  (v4, v5)"),
    "Concat <axis = 0> (d, d)": ("[4,6]", "Concat {'axis': '0'} (v4, v4)"),
}  # fmt: skip


@pytest.mark.parametrize("move", MOVES)
def test_a_move_of_dequantized_values_moves_integers(move):
    shape, line = MOVES[move]
    last = max(int(word.strip("v,()")) for word in line.split() if word.strip("(").startswith("v"))
    assert_normalizes(
        f"g (float[2,6] x) => (float{shape} y) {{ {QDQ} m = {move} y = Exp (m) }}",
        f"""inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v{last + 1} = {line}
        v{last + 2} = DequantizeLinear  (v{last + 1}, v2, v3)
        y = Exp  (v{last + 2})
        outputs y""",
        FLOATS,
    )


IMAGE_MOVES = {
    "MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (d)": "[1,2,8,8]",
    'Resize <mode = "nearest"> (d, , twice)': "[1,2,16,16]",
    "Pad (d, pads)": "[1,2,10,10]",
    "Pad (d, pads, zf)": "[1,2,10,10]",
    'Pad <mode = "reflect"> (d, pads)': "[1,2,10,10]",
}


@pytest.mark.parametrize("move", IMAGE_MOVES)
def test_a_move_of_images_moves_integers(move):
    text = (
        f"g (float[1,2,8,8] x) => (float{IMAGE_MOVES[move]} y) {{ {QDQ} m = {move} y = Neg (m) }}"
    )
    model = named(text)
    expected = run(model, IMAGE, plainly=True)
    assert NormalizeQDQ()(model).modified
    assert not NormalizeQDQ()(model).modified
    assert [n.op_type for n in model.graph] == [
        "QuantizeLinear", move.split()[0], "DequantizeLinear", "Neg",
    ]  # fmt: skip
    np.testing.assert_array_equal(run(model, IMAGE, plainly=True), expected)
    np.testing.assert_array_equal(run(model, IMAGE), expected)


def test_both_halves_of_a_split_are_integers():
    assert_normalizes(
        "g (float[2,6] x) => (float[2,3] y, float[2,3] e) "
        f"{{ {QDQ} m, n = Split <axis = 1, num_outputs = 2> (d) y = Exp (m) e = Neg (n) }}",
        """inputs x
        v5 = QuantizeLinear  (x, v3, v4)
        v6, v7 = Split {'axis': '1', 'num_outputs': '2'} (v5)
        v8 = DequantizeLinear  (v6, v3, v4)
        v9 = DequantizeLinear  (v7, v3, v4)
        y = Exp  (v8)
        e = Neg  (v9)
        outputs y, e""",
        FLOATS,
    )


def test_a_move_between_two_pairs_is_between_integers():
    """As ORT's quantizer writes it: every op has its pair, this one for nothing."""
    assert_normalizes(
        f"g (float[2,6] x) => (float[2,2,3] y) {{ {QDQ} m = Reshape (d, to3) "
        "r = QuantizeLinear (m, s, z) e = DequantizeLinear (r, s, z) y = Exp (e) }",
        """inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v6 = Reshape  (v4, v5)
        v7 = DequantizeLinear  (v6, v2, v3)
        y = Exp  (v7)
        outputs y""",
        FLOATS,
    )


def test_the_result_of_a_move_may_leave_the_graph():
    assert_normalizes(
        "g (float[2,6] x) => (float[6,2] y, float[2,6] e) "
        f"{{ {QDQ} y = Transpose (d) e = Exp (d) }}",
        """inputs x
        v5 = QuantizeLinear  (x, v3, v4)
        v6 = DequantizeLinear  (v5, v3, v4)
        v7 = Transpose  (v5)
        y = DequantizeLinear  (v7, v3, v4)
        e = Exp  (v6)
        outputs y, e""",
        FLOATS,
    )


def test_a_shape_is_that_of_the_integers():
    assert_normalizes(
        f"g (float[2,6] x) => (float[2,6] y, int64[2] l) {{ {QDQ} y = Exp (d) l = Shape (d) }}",
        """inputs x
        v5 = QuantizeLinear  (x, v3, v4)
        v6 = DequantizeLinear  (v5, v3, v4)
        y = Exp  (v6)
        l = Shape  (v5)
        outputs y, l""",
        FLOATS,
    )


def test_embeddings_gather_integers():
    weights = W | {"table": RNG.integers(-127, 128, (9, 4)).astype(np.int8)}
    assert_normalizes(
        "g (int64[3] i) => (float[3,4] y) "
        "{ d = DequantizeLinear (table, s, zero8) g = Gather (d, i) y = Exp (g) }",
        """inputs i
        v3 = Gather  (v2, i)
        v6 = DequantizeLinear  (v3, v4, v5)
        y = Exp  (v6)
        outputs y""",
        {"i": np.array([8, 0, 3])},
        weights,
    )


def test_a_table_of_floats_is_stored_as_what_is_looked_up():
    weights = W | {"table": RNG.standard_normal((9, 4)).astype(np.float32)}
    assert_normalizes(
        "g (int64[3] i) => (float[3,4] y) { g = Gather (table, i) q = QuantizeLinear (g, s, z) "
        "d = DequantizeLinear (q, s, z) y = Exp (d) }",
        """inputs i
        v3 = Gather  (v2, i)
        v6 = DequantizeLinear  (v3, v4, v5)
        y = Exp  (v6)
        outputs y""",
        {"i": np.array([8, 0, 3])},
        weights,
    )


SAME_OF_ANOTHER_SCALE = QDQ + "r = QuantizeLinear (x, t, u) f = DequantizeLinear (r, t, u) "
NEAR_MISSES = {
    "different scales":
        SAME_OF_ANOTHER_SCALE + "m = Concat <axis = 1> (d, f) y = Exp (m)",
    "it interpolates": "i = Unsqueeze (x, axis0) " + QDQ.replace("(x,", "(i,")
        + 'm = Resize <mode = "linear"> (d, , grow) y = Exp (m)',
    "another value than 0": QDQ + "m = Pad (d, sides, one) y = Exp (m)",
    "the axis of its scales does not survive":
        "d = DequantizeLinear <axis = 1> (table, scales) g = Gather <axis = 1> (d, ids) "
        "y = MatMul (x, g)",
    "the indices of its maxima": "i = Reshape (x, image) " + QDQ.replace("(x,", "(i,")
        + "m, n = MaxPool <kernel_shape = [1, 1]> (d) o = Cast <to = 1> (n) y = Add (m, o)",
}  # fmt: skip


@pytest.mark.parametrize("why", NEAR_MISSES)
def test_what_cannot_move_says_why(why):
    weights = W | {
        "grow": np.array([1, 2, 2], np.float32), "sides": np.array([0, 1, 0, 1]),
        "table": np.ones((6, 6), np.int8), "scales": np.full(6, 0.5, np.float32),
        "image": np.array([1, 1, 2, 6]),
    }  # fmt: skip
    model = named(f"g (float[2,6] x) => (float y) {{ {NEAR_MISSES[why]} }}", weights)
    expected = run(model, FLOATS, plainly=True)
    NormalizeQDQ()(model)
    assert any(why in decision_of(node).why for node in model.graph)
    np.testing.assert_array_equal(run(model, FLOATS, plainly=True), expected)


CONV = QDQ + "f = DequantizeLinear (k, s) c = Conv (d, f) "


def test_a_quantize_goes_up_to_the_op_it_belongs_to():
    assert_normalizes(
        f"g (float[1,2,8,8] x) => (uint8[4,9] y) {{ {CONV} "
        "m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c) l = Reshape (m, flat) "
        "y = QuantizeLinear (l, t, u) }",
        """inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v5 = DequantizeLinear  (v4, v2, v3)
        v7 = DequantizeLinear  (v6, v2)
        v8 = Conv  (v5, v7)
        v11 = QuantizeLinear  (v8, v9, v10)
        v12 = MaxPool {'kernel_shape': '(2, 2)', 'strides': '(2, 2)'} (v11)
        y = Reshape  (v12, v13)
        outputs y""",
        IMAGE,
        W | {"flat": np.array([4, 9])},
    )


def test_a_quantize_goes_up_every_branch_of_a_concat():
    assert_normalizes(
        f"g (float[1,2,8,8] x) => (uint8[1,8,6,6] y) {{ {CONV} h = DequantizeLinear (k, t) "
        "e = Conv (d, h) m = Concat <axis = 1> (c, e) y = QuantizeLinear (m, t, u) }",
        """inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v5 = DequantizeLinear  (v4, v2, v3)
        v7 = DequantizeLinear  (v6, v2)
        v8 = Conv  (v5, v7)
        v10 = DequantizeLinear  (v6, v9)
        v11 = Conv  (v5, v10)
        v13 = QuantizeLinear  (v8, v9, v12)
        v14 = QuantizeLinear  (v11, v9, v12)
        y = Concat {'axis': '1'} (v13, v14)
        outputs y""",
        IMAGE,
    )


@pytest.mark.parametrize(
    "body",
    [
        # nothing before it is quantized
        "m = Reshape (x, to3) y = QuantizeLinear (m, s, z)",
        # what it moves is read in float too
        "m = Reshape (x, to3) y = QuantizeLinear (m, s, z) e = Exp (m)",
    ],
)
def test_a_quantize_of_floats_stays(body):
    outputs = "uint8[2,2,3] y" + ", float[2,2,3] e" * ("e =" in body)
    assert_stays(f"g (float[2,6] x) => ({outputs}) {{ {body} }}", FLOATS)


def test_equal_pairs_back_to_back_cancel():
    assert_normalizes(
        f"g (float[2,6] x) => (float[2,6] y) {{ {QDQ} r = QuantizeLinear (d, s1, z1) "
        "e = DequantizeLinear (r, s1, z1) y = Exp (e) }",
        """inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v5 = DequantizeLinear  (v4, v2, v3)
        y = Exp  (v5)
        outputs y""",
        FLOATS,
    )


@pytest.mark.parametrize("parameters", ["t, z", "s, u"])
def test_a_requantization_stays_and_says_so(parameters):
    assert_stays(
        f"g (float[2,6] x) => (float[2,6] y) {{ {QDQ} r = QuantizeLinear (d, {parameters}) "
        f"e = DequantizeLinear (r, {parameters}) y = Exp (e) }}",
        FLOATS,
        "requantize",
    )


@pytest.mark.parametrize(
    ("clamp", "scale", "zero", "goes"),
    [
        ("Relu (c)", "t", "low", True),
        ("Relu (c)", "t", "least", True),
        ("Relu (c)", "t", "u", False),
        ("Clip (c, zf, six)", "t6", "low", True),
        ("Clip (c, zf)", "t", "low", True),
        ("Clip (c, zf, six)", "t", "low", False),
    ],
)
def test_a_clamp_goes_where_saturation_does_it(clamp, scale, zero, goes):
    kind = "int8" if zero == "least" else "uint8"
    model = named(
        f"g (float[1,2,8,8] x) => ({kind}[1,4,6,6] y) "
        f"{{ {CONV} r = {clamp} y = QuantizeLinear (r, {scale}, {zero}) }}"
    )
    expected = run(model, IMAGE, plainly=True)
    NormalizeQDQ()(model)
    assert ("Relu" in text_of(model) or "Clip" in text_of(model)) != goes
    np.testing.assert_array_equal(run(model, IMAGE, plainly=True), expected)


def test_a_clamp_that_is_read_in_float_stays():
    assert_stays(
        "g (float[2,6] x) => (uint8[2,6] y, float[2,6] e) "
        "{ r = Relu (x) y = QuantizeLinear (r, t, low) e = Exp (r) }",
        FLOATS,
    )


def test_a_relu_of_what_has_no_negatives_goes():
    assert_normalizes(
        "g (float[2,6] x) => (float[2,6] y) { q = QuantizeLinear (x, s, low) "
        "d = DequantizeLinear (q, s, low) r = Relu (d) y = Exp (r) }",
        """inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v5 = DequantizeLinear  (v4, v2, v3)
        y = Exp  (v5)
        outputs y""",
        FLOATS,
    )


SIGNED = "q = QuantizeLinear (x, s, zi) {} d = DequantizeLinear ({}, s, zi) "


def kinds(model):
    """The types of what every Q writes and every DQ reads."""
    ends = {"QuantizeLinear": lambda n: n.outputs[0], "DequantizeLinear": lambda n: n.inputs[0]}
    return {ends[n.op_type](n).dtype.name for n in model.graph if n.op_type in ends}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (SIGNED.format("", "q") + "y = Exp (d)", {"UINT8"}),
        (SIGNED.format("m = Transpose (q)", "m") + "y = Exp (d)", {"UINT8"}),
        (SIGNED.format("m = Pad (q, sides, zi)", "m") + "y = Exp (d)", {"UINT8"}),
        (SIGNED.format("", "q") + "e = DequantizeLinear (row, t) y = Add (d, e)", {"UINT8"}),
        (SIGNED.format("", "q") + "e = DequantizeLinear (w, t) y = MatMul (d, e)",
         {"UINT8", "INT8"}),
        ("q = QuantizeLinear (x, s) m = Concat <axis = 0> (q, q) "
         "d = DequantizeLinear (m, s) y = Exp (d)", {"UINT8"}),
    ],
)  # fmt: skip
def test_activations_are_unsigned(body, expected):
    weights = W | {"sides": np.array([0, 1, 0, 1]), "row": np.arange(6).astype(np.int8)}
    model = named(f"g (float[2,6] x) => (float y) {{ {body} }}", weights)
    wanted = run(model, FLOATS, plainly=True)
    NormalizeQDQ()(model)
    assert not NormalizeQDQ()(model).modified
    assert kinds(model) == expected
    np.testing.assert_array_equal(run(model, FLOATS, plainly=True), wanted)


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        # seen from outside
        ("(float[2,6] x) => (float[2,6] y, int8[2,6] q)", SIGNED.format("", "q") + "y = Exp (d)"),
        ("(int8[2,6] q) => (float[2,6] y)", "d = DequantizeLinear (q, s, zi) y = Exp (d)"),
        # computed with
        ("(float[2,6] x) => (float[2,6] y, int32[2,2] i)",
         SIGNED.format("", "q") + "p = Transpose (q) i = MatMulInteger (q, p) y = Exp (d)"),
    ],
)  # fmt: skip
def test_integers_that_something_else_sees_stay_signed(signature, body):
    model = named(f"g {signature} {{ {body} }}")
    before = run(
        model, {name: np.ones((2, 6), "i1") for name in "q" if "(int8" in signature} or FLOATS
    )
    NormalizeQDQ()(model)
    assert kinds(model) == {"INT8"}
    after = run(
        model, {name: np.ones((2, 6), "i1") for name in "q" if "(int8" in signature} or FLOATS
    )
    np.testing.assert_array_equal(after[0], before[0])


def test_equal_pairs_of_one_value_are_one():
    assert_normalizes(
        "g (float[2,6] x) => (float[2,6] y, float[2,6] e) { q = QuantizeLinear (x, s, z) "
        "r = QuantizeLinear (x, s1, z1) d = DequantizeLinear (q, s, z) "
        "f = DequantizeLinear (r, s1, z1) y = Exp (d) e = Neg (f) }",
        """inputs x
        v5 = QuantizeLinear  (x, v3, v4)
        v6 = DequantizeLinear  (v5, v3, v4)
        y = Exp  (v6)
        e = Neg  (v6)
        outputs y, e""",
        FLOATS,
    )


def test_branches_see_integers_from_outside():
    text = (
        f"g (float[2,6] x, bool c) => (float[6,2] y) {{ {QDQ} y = If (c) <then_branch = a () => "
        "(float[6,2] p) { k = Constant <value_float = 2.0> () m = Transpose (d) p = Mul (m, k) }, "
        "else_branch = o () => (float[6,2] n) { n = Transpose (d) }> }"
    )
    model = named(text)
    feeds = [FLOATS | {"c": np.array(flag)} for flag in (True, False)]
    expected = [run(model, feed, plainly=True) for feed in feeds]
    assert NormalizeQDQ()(model).modified
    verify(model, Stage.FLOAT, "normalize-qdq")
    for feed, want in zip(feeds, expected, strict=True):
        np.testing.assert_array_equal(run(model, feed, plainly=True), want)

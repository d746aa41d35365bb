"""normalize-qdq: Q and DQ past ops that only move data; equal bit for bit in stock ORT."""

import numpy as np
import pytest
from golden import run
from imported import CONV, FLOATS, IMAGE, QDQ, RNG, W, assert_normalizes, assert_stays, named

from qcompiler.ir.decisions import decision_of
from qcompiler.passes.normalize_qdq import NormalizeQDQ

MOVES = {
    "Reshape (d, to3)": ("[2,2,3]", "Reshape  (v4, v5)"),
    "Transpose (d)": ("[6,2]", "Transpose  (v4)"),
    "Unsqueeze (d, axis0)": ("[1,2,6]", "Unsqueeze  (v4, v5)"),
    "Flatten (d)": ("[2,6]", "Flatten  (v4)"),
    "Identity (d)": ("[2,6]", "Identity  (v4)"),
    "Slice (d, first, third, axis1)": ("[2,3]", "Slice  (v4, v5, v6, v7)"),
    "Gather <axis = 1> (d, ids)": ("[2,2]", "Gather {'axis': '1'} (v4, v5)"),
    "Expand (d, wide)": ("[3,2,6]", "Expand  (v4, v5)"),
    "Tile (d, halves)": ("[6,18]", "Tile  (v4, v5)"),
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
    "SpaceToDepth <blocksize = 2> (d)": "[1,8,4,4]",
    "DepthToSpace <blocksize = 1> (d)": "[1,2,8,8]",
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


def test_the_last_weight_is_turned_though_an_embedding_shares_it():
    weights = W | {"table": RNG.integers(-127, 128, (9, 6)).astype(np.int8)}
    assert_normalizes(
        "g (float[2,6] x, int64[2] i) => (float[2,9] y, float[2,6] e) "
        "{ r = Gather (table, i) e = DequantizeLinear (r, s, zero8) h = Transpose (table) "
        "f = DequantizeLinear (h, s, zero8) a = Add (x, e) y = MatMul (a, f) }",
        """inputs x, i
        v5 = Gather  (v4, i)
        e = DequantizeLinear  (v5, v6, v7)
        v9 = DequantizeLinear  (v8, v6)
        v10 = Add  (x, e)
        y = MatMul  (v10, v9)
        outputs y, e""",
        FLOATS | {"i": np.array([8, 3])},
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
    "its scale may be negative": "i = Reshape (x, image) q = QuantizeLinear (i, below, z) "
        "d = DequantizeLinear (q, below, z) m = MaxPool <kernel_shape = [2, 2]> (d) y = Exp (m)",
}  # fmt: skip


@pytest.mark.parametrize("why", NEAR_MISSES)
def test_what_cannot_move_says_why(why):
    weights = W | {
        "grow": np.array([1, 2, 2], np.float32), "sides": np.array([0, 1, 0, 1]),
        "table": np.ones((6, 6), np.int8), "scales": np.full(6, 0.5, np.float32),
        "image": np.array([1, 1, 2, 6]), "below": np.float32(-0.03),
    }  # fmt: skip
    model = named(f"g (float[2,6] x) => (float y) {{ {NEAR_MISSES[why]} }}", weights)
    expected = run(model, FLOATS, plainly=True)
    NormalizeQDQ()(model)
    assert any(why in decision_of(node).why for node in model.graph)
    np.testing.assert_array_equal(run(model, FLOATS, plainly=True), expected)


def test_indices_of_maxima_may_be_a_result():
    text = (
        "g (float[1,2,8,8] x) => (float y, int64 n) { q = QuantizeLinear (x, s, z) "
        "d = DequantizeLinear (q, s, z) m, n = MaxPool <kernel_shape = [2, 2]> (d) y = Exp (m) }"
    )
    model = named(text)
    expected = run(model, IMAGE, plainly=True)
    NormalizeQDQ()(model)
    assert any("the indices of its maxima" in decision_of(node).why for node in model.graph)
    for got, want in zip(run(model, IMAGE, plainly=True), expected, strict=True):
        np.testing.assert_array_equal(got, want)


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

"""fuse-attention: what is found, what is not and why, and that the numbers stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from conftest import DIGITS
from golden import assert_step, model_of, run

import qcompiler
from qcompiler.ir.decisions import decisions
from qcompiler.ir.errors import CalibrationError
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.fuse_attention import FuseAttention
from qcompiler.recipe import Recipe

HEADS = "g (float[b,2,s,16] q, float[b,2,t,16] k, float[b,2,t,16] v, float[b,1,s,t] m) "
TOKENS = "g (float[b,s,2,16] q, float[b,t,2,16] k, float[b,t,2,16] v, float[b,1,s,t] m) "
RESULT = {"h": "=> (float[b,2,s,16] y)", "s": "=> (float[b,s,2,16] y)"}
CORE = "{ turned = Transpose <perm = [0, 1, 3, 2]> (k) "


def graph(body: str, result: str = "h", heads: str = HEADS, **weights: np.ndarray) -> ir.Model:
    numbers = {"half": np.float32(0.5), "four": np.float32([[4.0]]), "zero": np.float32(0)}
    model = model_of(f"{heads}{RESULT[result]} {body}", numbers | weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    return model


def feeds_of(model: ir.Model) -> dict[str, np.ndarray]:
    rng, sizes = np.random.default_rng(1), {"b": 2, "s": 5, "t": 7, "o": 3}
    return {
        str(value.name): rng.standard_normal(
            [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape or ()]
        ).astype(np.float32)
        for value in model.graph.inputs
    }


def fused(model: ir.Model) -> list[str]:
    """The ops after fusing, which changes no number and is done in one go."""
    feeds = feeds_of(model)
    before = run(model, feeds)
    assert FuseAttention(lambda region: None)(model).modified
    verify(model, Stage.KERNEL, "fuse-attention")
    for got, want in zip(run(model, feeds), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not FuseAttention(lambda region: None)(model).modified
    return [node.op_type for node in model.graph]


SWAP = "Transpose <perm = [0, 2, 1, 3]>"
SOFT = "p = Softmax <axis = -1> (scores) "
GUARD = "nan = IsNaN (p) w = Where (nan, zero, p) "
DETOUR = (
    "shape = Shape (k) one = Slice (shape, i0, i2) rows = Slice (shape, i2, i3) "
    "cols = Slice (shape, i3, i4) to3 = Concat <axis = 0> (any, rows, cols) "
    "flat = Reshape (k, to3) swapped = Transpose <perm = [0, 2, 1]> (flat) "
    "to4 = Concat <axis = 0> (one, cols, rows) turned = Reshape (swapped, to4) "
)
INTS = {"i0": [0], "i2": [2], "i3": [3], "i4": [4], "any": [-1]}


@pytest.mark.parametrize(
    ("body", "result", "heads", "op"),
    [
        (CORE + "scores = MatMul (q, turned) " + SOFT + "y = MatMul (p, v) }",
         "h", HEADS, "Attention_D16_hhhh"),
        (CORE + "x = MatMul (q, turned) z = Mul (half, x) scores = Add (m, z) " + SOFT + GUARD
         + "y = MatMul (w, v) }", "h", HEADS, "MaskedAttention_D16_hhhh_zero"),
        (CORE + "x = MatMul (q, turned) z = Div (x, four) scores = Add (z, m) " + SOFT
         + f"c = MatMul (p, v) y = {SWAP} (c) }}", "s", HEADS, "MaskedAttention_D16_hhhs"),
        (f"{{ qh = {SWAP} (q) qs = Mul (qh, half) kt = Transpose <perm = [0, 2, 3, 1]> (k) "
         f"ks = Mul (kt, half) scores = MatMul (qs, ks) {SOFT} vh = {SWAP} (v) "
         f"c = MatMul (p, vh) y = {SWAP} (c) }}", "s", TOKENS, "Attention_D16_ssss"),
        (f"{{ qd = Div (q, four) qh = {SWAP} (qd) kh = {SWAP} (k) "
         f"kt = Transpose <perm = [0, 1, 3, 2]> (kh) scores = MatMul (qh, kt) {SOFT} "
         f"vh = {SWAP} (v) y = MatMul (p, vh) }}", "h", TOKENS, "Attention_D16_sssh"),
        ("{ " + DETOUR + "scores = MatMul (q, turned) " + SOFT + "y = MatMul (p, v) }",
         "h", HEADS, "Attention_D16_hhhh"),
        (CORE + "x = MatMul (q, turned) scores = Add (x, row) " + SOFT + "y = MatMul (p, v) }",
         "h", HEADS, "MaskedAttention_D16_hhhh"),
    ],
)  # fmt: skip
def test_finds(body, result, heads, op):
    weights = {name: np.array(value, np.int64) for name, value in INTS.items()}
    weights["row"] = np.zeros((1, 1), np.float32)
    assert fused(graph(body, result, heads, **weights)) == [op]


def test_a_scale_of_values_stays_outside():
    body = CORE + "scores = MatMul (q, turned) " + SOFT + "s = Mul (v, half) y = MatMul (p, s) }"
    assert fused(graph(body)) == ["Mul", "Attention_D16_hhhh"]


def test_leaves_what_others_read():
    text = HEADS + "=> (float[b,2,s,16] y, float[b,2,16,t] turned) " + CORE + (
        "scores = MatMul (q, turned) " + SOFT + "y = MatMul (p, v) }"
    )  # fmt: skip
    assert fused(model_of(text)) == ["Transpose", "Attention_D16_hhhh"]


TWO = "=> (float[b,2,s,16] y, float[b,2,s,t] {}) "
PLAIN = "scores = MatMul (q, turned) " + SOFT + "y = MatMul (p, v) }"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (HEADS + TWO.format("p") + CORE + PLAIN, "p is read elsewhere"),
        (HEADS + TWO.format("scores") + CORE + PLAIN, "read only there"),
        (HEADS + TWO.format("z") + CORE + "scores = MatMul (q, turned) " + SOFT
         + "y = MatMul (p, v) z = Neg (p) }", "p is read elsewhere"),
        (HEADS + RESULT["h"] + CORE + "scores = MatMul (q, turned) p = Softmax <axis = 2> (scores) "
         "y = MatMul (p, v) }", "last of four dimensions"),
        (HEADS + RESULT["h"] + CORE + "x = MatMul (q, turned) scores = Mul (x, m) " + SOFT
         + "y = MatMul (p, v) }", "read only there"),
        (HEADS + RESULT["h"] + CORE + "scores = MatMul (q, turned) " + SOFT + "n = Relu (p) "
         "y = MatMul (n, v) }", "read by Relu"),
        (HEADS + RESULT["h"] + CORE + "scores = MatMul (q, turned) " + SOFT + "nan = IsNaN (p) "
         "w = Where (nan, half, p) y = MatMul (w, v) }", "p is read elsewhere"),
        ("g (float[b,2,s,16] q, float[b,2,16,t] turned, float[b,2,t,16] v) " + RESULT["h"] + "{ "
         + PLAIN, "transposed keys"),
        ("g (float[b,2,s,16] q, float[b,2,t,16] k, float[b,2,t,8] v) => (float[b,2,s,8] y)" + CORE
         + PLAIN, "one known size"),
        ("g (float[b,2,s,d] q, float[b,2,t,d] k, float[b,2,t,d] v) => (float[b,2,s,d] y)" + CORE
         + PLAIN, "one known size"),
        ("g (double[b,2,s,16] q, double[b,2,t,16] k, double[b,2,t,16] v) => (double[b,2,s,16] y)"
         + CORE + PLAIN, "not FLOAT"),
        ("g (float[b,s,16] q, float[b,t,16] k, float[b,t,16] v) => (float[b,s,16] y)"
         "{ turned = Transpose <perm = [0, 2, 1]> (k) " + PLAIN, "last of four dimensions"),
        (HEADS + RESULT["h"] + "{ kt = Transpose <perm = [0, 1, 3, 2]> (k) to3 = Concat <axis = 0> "
         "(any, n1, n2) flat = Reshape (kt, to3) swapped = Transpose <perm = [0, 2, 1]> (flat) "
         "sh = Shape (kt) turned = Reshape (swapped, sh) " + PLAIN, "transposed keys"),
    ],
)  # fmt: skip
def test_leaves_near_misses_with_a_reason(text, reason):
    numbers = {"half": np.float32(0.5), "any": np.int64([-1]), "n1": np.int64([8]),
               "n2": np.int64([32])}  # fmt: skip
    model = model_of(text, numbers)
    before = [node.op_type for node in model.graph]
    assert not FuseAttention(lambda region: None)(model).modified
    assert [node.op_type for node in model.graph] == before
    (why,) = [d.why for d in decisions(model) if d.op == "Softmax"]
    assert reason in why


def test_says_why_there_is_no_kernel():
    model = graph(CORE + PLAIN)
    assert not FuseAttention(lambda region: f"no kernel for {region.name}")(model).modified
    (why,) = [d.why for d in decisions(model) if d.op == "Softmax"]
    assert why == "no kernel for Attention_D16_hhhh"


def test_the_example_keeps_its_numbers():
    model = Canonicalize()(ir.load(DIGITS / "digits.onnx")).model
    feeds = {"image": np.random.default_rng(0).random((3, 1, 20, 20), np.float32)}
    before = run(model, feeds)
    assert FuseAttention(lambda region: None)(model).modified
    verify(model, Stage.KERNEL, "fuse-attention")
    assert sum(node.op_type == "Attention_D16_ssss" for node in model.graph) == 2
    for got, want in zip(run(model, feeds), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def assert_attends(text: str, before: str, after: str, *, notes: bool = False) -> None:
    model = model_of(text, {"half": np.float32(0.5)})
    checks = {"exact": False, "floor_db": 110, "notes": notes}
    assert_step("fuse-attention", model, before, after, feeds_of(model), **checks)


def test_golden_an_attention_with_scale_and_mask():
    assert_attends(
        f"{HEADS}{RESULT['s']} {CORE} x = MatMul (q, turned) z = Mul (half, x) "
        f"scores = Add (m, z) {SOFT} c = MatMul (p, v) y = {SWAP} (c) }}",
        """inputs q, k, v, m
        v5 = Transpose {'perm': '(0, 1, 3, 2)'} (k)
        v6 = MatMul  (q, v5)
        v8 = Mul  (v7, v6)
        v9 = Add  (m, v8)
        v10 = Softmax {'axis': '-1'} (v9)
        v11 = MatMul  (v10, v)
        y = Transpose {'perm': '(0, 2, 1, 3)'} (v11)
        outputs y""",
        """inputs q, k, v, m
        y = qcompiler.region.MaskedAttention_D16_hhhs  (q, k, v, v5, m)
        # body, unexpected: scores, softmax and context in one
        outputs y""",
        notes=True,
    )


def test_golden_keys_that_another_reads_transposed():
    assert_attends(
        f"{HEADS} => (float[b,2,s,16] y, float[b,2,16,t] z) {CORE} z = Neg (turned) {PLAIN}",
        """inputs q, k, v, m
        v6 = Transpose {'perm': '(0, 1, 3, 2)'} (k)
        z = Neg  (v6)
        v7 = MatMul  (q, v6)
        v8 = Softmax {'axis': '-1'} (v7)
        y = MatMul  (v8, v)
        outputs y, z""",
        """inputs q, k, v, m
        v6 = Transpose {'perm': '(0, 1, 3, 2)'} (k)
        z = Neg  (v6)
        y = qcompiler.region.Attention_D16_hhhh  (q, k, v, v7)
        outputs y, z""",
    )


def test_golden_weights_that_leave_the_graph():
    assert_attends(
        f"{HEADS}{TWO.format('p')} {CORE} {PLAIN}",
        """inputs q, k, v, m
        v6 = Transpose {'perm': '(0, 1, 3, 2)'} (k)
        v7 = MatMul  (q, v6)
        p = Softmax {'axis': '-1'} (v7)
        y = MatMul  (p, v)
        outputs y, p""",
        """inputs q, k, v, m
        v6 = Transpose {'perm': '(0, 1, 3, 2)'} (k)
        v7 = MatMul  (q, v6)
        # float: its second operand is an activation: no quantized form yet
        p = Softmax {'axis': '-1'} (v7)
        # float: not fused as attention: p is read elsewhere
        y = MatMul  (p, v)
        # float: its second operand is an activation: no quantized form yet
        outputs y, p""",
        notes=True,
    )


def test_golden_an_activation_between_softmax_and_values():
    assert_attends(
        f"{HEADS}{RESULT['h']} {CORE} scores = MatMul (q, turned) {SOFT} n = Relu (p) "
        "y = MatMul (n, v) }",
        """inputs q, k, v, m
        v5 = Transpose {'perm': '(0, 1, 3, 2)'} (k)
        v6 = MatMul  (q, v5)
        v7 = Softmax {'axis': '-1'} (v6)
        v8 = Relu  (v7)
        y = MatMul  (v8, v)
        outputs y""",
        """inputs q, k, v, m
        v5 = Transpose {'perm': '(0, 1, 3, 2)'} (k)
        v6 = MatMul  (q, v5)
        # float: its second operand is an activation: no quantized form yet
        v7 = Softmax {'axis': '-1'} (v6)
        # float: not fused as attention: p is read by Relu, not MatMul
        v8 = Relu  (v7)
        y = MatMul  (v8, v)
        # float: its second operand is an activation: no quantized form yet
        outputs y""",
        notes=True,
    )


def test_products_in_8_bits_need_samples_and_are_named(tmp_path):
    text = f"{HEADS}{RESULT['h']} {CORE} scores = MatMul (q, turned) {SOFT} y = MatMul (p, v) }}"
    recipe = Recipe(passes={"assign-precision": {"products": True}})
    model = model_of(text, {})
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    wanted = r"needed by node_1, node_3: give samples .* or leave out products of assign-precision$"
    with pytest.raises(CalibrationError, match=wanted):
        qcompiler.compile(model, "x86-int8", tmp_path / "b", recipe=recipe, timing=False)

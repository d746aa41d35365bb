"""fuse-attention: several heads of q that read one of k and v, whose copies are not made."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of, run

from qcompiler.ir.sizes import sizes_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.fuse_attention import FuseAttention
from qcompiler.passes.use_ort_attention import UseOrtAttention

INPUTS = "g (float[b,6,s,16] q, float[b,2,t,16] k, float[b,2,t,16] v, float[b,1,s,t] m) "
BY_TOKEN = "g (float[b,6,s,16] q, float[b,t,2,16] k, float[b,t,2,16] v, float[b,1,s,t] m) "
RESULT = "=> (float[b,6,s,16] y) "
SIZES = (
    "batch = Shape <start = 0, end = 1> (q) keys = Shape <start = 3, end = 4> (m) "
    "apart = Concat <axis = 0> (batch, two, three, keys, depth) "
    "together = Concat <axis = 0> (batch, six, keys, depth) "
)
REPEATED_K = "k1 = Unsqueeze (k, two) k2 = Expand (k1, apart) kk = Reshape (k2, together) "
REPEATED_V = "v1 = Unsqueeze (v, two) v2 = Expand (v1, apart) vv = Reshape (v2, together) "


def text_of(before: str, k: str = "kk", v: str = "vv", inputs: str = INPUTS) -> str:
    """A graph of attention over `k` and `v`, which are made `before`."""
    return (
        f"{inputs}{RESULT} {{ {before} kt = Transpose <perm = [0, 1, 3, 2]> ({k}) "
        "raw = MatMul (q, kt) scaled = Mul (raw, quarter) scores = Add (scaled, m) "
        f"p = Softmax <axis = -1> (scores) y = MatMul (p, {v}) }}"
    )


def graph(text: str) -> ir.Model:
    numbers = {name: np.int64([number]) for name, number in
               {"zero": 0, "one": 1, "two": 2, "three": 3, "five": 5, "six": 6, "depth": 16,
                "minus": -1, "seven": 7,
                "ten": 10}.items()}  # fmt: skip
    numbers |= {"first": np.int64(0), "second": np.int64(2)}
    model = model_of(text, numbers | {"quarter": np.float32(0.25)})
    return Canonicalize()(model).model


def fused(text: str) -> list[str]:
    """The ops of the attention after fusing, which changes no number, and what it reads."""
    model, rng = graph(text), np.random.default_rng(0)
    sizes = {"b": 2, "s": 5, "t": 7, "o": 1}
    feeds = {
        str(value.name): rng.standard_normal(
            [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape or ()]
        ).astype(np.float32)
        for value in model.graph.inputs
    }
    (before,) = run(model, feeds)
    assert FuseAttention(lambda region: None)(model).modified
    verify(model, Stage.KERNEL, "fuse-attention")
    (after,) = run(model, feeds)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    return [node.op_type for node in model.graph]


def test_copies_of_heads_are_not_made():
    assert fused(text_of(SIZES + REPEATED_K + REPEATED_V)) == ["MaskedAttention_D16_hhhh_g3"]


def test_nor_where_sizes_are_computed_from_shapes():
    """As TorchScript does, which shape inference does not follow."""
    where = (
        "all = Shape (k) b0 = Gather (all, first) batch = Unsqueeze (b0, zero) "
        "t0 = Gather (all, second) keys = Unsqueeze (t0, zero) "
        "given = Concat <axis = 0> (batch, two, three, keys, depth) flat = Reshape (given, minus) "
        "ones = ConstantOfShape <value = int64[1] {1}> (five) negative = Mul (ones, minus) "
        "is_same = Equal (flat, negative) apart = Where (is_same, ones, flat) "
        "together = Concat <axis = 0> (batch, six, keys, depth) "
    )
    assert fused(text_of(where + REPEATED_K + REPEATED_V)) == ["MaskedAttention_D16_hhhh_g3"]


def test_nor_are_heads_put_first_for_them():
    copies = (REPEATED_K + REPEATED_V).replace("(k,", "(k0,").replace("(v,", "(v0,")
    swap = "Transpose <perm = [0, 2, 1, 3]>"
    text = text_of(f"{SIZES} k0 = {swap} (k) v0 = {swap} (v) {copies}", inputs=BY_TOKEN)
    assert fused(text) == ["MaskedAttention_D16_hssh_g3"]


def test_one_head_may_be_read_by_all():
    sizes = SIZES.replace("two, three", "one, six")
    inputs = INPUTS.replace("[b,2,t,16]", "[b,1,t,16]")
    text = text_of(sizes + REPEATED_K + REPEATED_V, inputs=inputs)
    assert fused(text) == ["MaskedAttention_D16_hhhh_g6"]


def test_copies_of_k_alone_stay_copies():
    inputs = INPUTS.replace("[b,2,t,16] v", "[b,6,t,16] v")
    ops = fused(text_of(SIZES + REPEATED_K, v="v", inputs=inputs))
    assert "Expand" in ops
    assert ops[-1] == "MaskedAttention_D16_hhhh"


@pytest.mark.parametrize(
    ("axis", "apart"),
    [
        pytest.param("one", "batch, three, two, keys, depth", id="heads in turn, 0 1 0 1 0 1"),
        pytest.param("three", "batch, two, keys, three, depth", id="tokens and heads mixed"),
    ],
)
def test_copies_in_another_order_stay_copies(axis, apart):
    sizes = SIZES.replace("batch, two, three, keys, depth", apart)
    copies = (REPEATED_K + REPEATED_V).replace(", two)", f", {axis})")
    ops = fused(text_of(sizes + copies))
    assert ops.count("Expand") == 2
    assert ops[-1] == "MaskedAttention_D16_hhhh"


@pytest.mark.parametrize(
    ("inputs", "apart", "together"),
    [
        pytest.param("float[b,2,1,16], float[b,1,s,7]",
                     "apart = Concat <axis = 0> (two, three, seven, one) ",
                     "batch, six, seven, depth", id="those of the last dimensions alone"),
        pytest.param("float[1,2,t,16], float[b,o,s,t]",
                     "only = Shape <start = 1, end = 2> (m) "
                     "some = Concat <axis = 0> (batch, one, one, one, one) "
                     "more = Concat <axis = 0> (one, one, three, one, only) "
                     "left = Unsqueeze (some, one) right = Unsqueeze (more, one) "
                     "rows = Concat <axis = 1> (left, right) flat = Reshape (rows, minus) "
                     "apart = Slice (flat, five, ten) ",
                     "one, six, keys, depth", id="columns side by side"),
    ],
)  # fmt: skip
def test_sizes_are_no_others_than_they_seem(inputs, apart, together):
    """Else copies of a token, or of a whole batch, would be taken for those of heads."""
    kv, mask = inputs.split(", ")
    given = f"g (float[b,6,s,16] q, {kv} k, {kv} v, {mask} m) "
    sizes = SIZES.split("apart")[0] + f"{apart} together = Concat <axis = 0> ({together}) "
    ops = fused(text_of(sizes + REPEATED_K + REPEATED_V, inputs=given))
    assert ops.count("Expand") == 2
    assert ops[-1] == "MaskedAttention_D16_hhhh"


def test_onnx_runtimes_own_attention_reads_the_copies():
    model = graph(text_of(SIZES + REPEATED_K + REPEATED_V))
    assert UseOrtAttention()(model).modified
    ops = [node.op_type for node in model.graph]
    assert ops.count("Expand") == 3, "of keys, of values, and of the mask"


@pytest.mark.parametrize(("to", "sizes"), [(6, [6]), (7, [6]), (9, None), (10, None)])
def test_casts_are_followed_to_types_that_have_all_sizes(to, sizes):
    text = (
        f"g (float[b,6] x) => (float[b] y) {{ n = Shape <start = 1> (x) y = Cast <to = {to}> (n) }}"
    )
    assert sizes_of(model_of(text).graph.outputs[0]) == sizes


def test_constants_that_are_no_integers_are_no_sizes():
    text = "g (float[b,6] x) => (float[1] y) { y = ConstantOfShape <value = float[1] {0.5}> (one) }"
    model = model_of(text, {"one": np.int64([1])})
    assert sizes_of(model.graph.outputs[0]) is None

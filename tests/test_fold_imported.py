"""fold-qdq on what others quantized: what is folded, what is left and why, and the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_rewrites, model_of, run, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.fold_qdq import FoldQDQ

RNG = np.random.default_rng(3)
F4 = np.float32
STEP = 0.05
MATRIX = {
    "xs": F4(0.03), "xz": np.uint8(120), "xz8": np.int8(-8), "zero": np.uint8(0),
    "w": RNG.integers(-127, 128, (64, 8)).astype(np.int8), "ws": RNG.uniform(0.5, 1, 8).astype(F4),
    "wt": RNG.integers(-127, 128, (8, 64)).astype(np.int8),
    "wone": F4(0.5), "wz0": np.zeros(8, np.int8), "wz": RNG.integers(-4, 5, 8).astype(np.int8),
    "wsmall": RNG.integers(-90, 90, (64, 8)).astype(np.int8),
    "wu": RNG.integers(20, 230, (64, 8)).astype(np.uint8), "wuz": np.full(8, 125, np.uint8),
    "wide": np.repeat(np.uint8([[0], [255]]), 32, 0) * np.ones((1, 8), np.uint8),
    "wk": np.ones(64, F4), "b": RNG.standard_normal(8).astype(F4),
    "bi": RNG.integers(-900, 900, 8).astype(np.int32), "bs": np.full(8, 0.02, F4),
    "ys": F4(STEP), "yz": np.uint8(128), "half": F4(0.5),
    "vs": F4(0.1), "vz": np.uint8(100),
}  # fmt: skip
X = {"x": RNG.standard_normal((3, 64)).astype(F4)}
STATIC = "q = QuantizeLinear (x, xs, xz) d = DequantizeLinear (q, xs, xz) "
DYNAMIC = "q, s, z = DynamicQuantizeLinear (x) d = DequantizeLinear (q, s, z) "
BY_COLUMN = "f = DequantizeLinear <axis = 1> (w, ws) "
HEAD = "g (float[3,64] x) => (float[3,8] y) "


def model(body: str, head: str = HEAD, **changes: Any) -> ir.Model:
    return model_of(f"{head}{{ {body} }}", MATRIX | changes)


def folded(body: str, feeds: Mapping[str, Any] = X, head: str = HEAD, steps: float = 0.0,
           **changes: Any) -> tuple[list[str], str]:  # fmt: skip
    """The ops after folding, and what is said of them; results differ by at most `steps` steps."""
    subject = model(body, head, **changes)
    before = run(subject, feeds)
    FoldQDQ()(subject)
    verify(subject, Stage.QUANTIZED, "fold-qdq")
    for got, want in zip(run(subject, feeds), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-4 + steps * STEP * 1.001)
    printed = text_of(subject)
    assert not FoldQDQ()(subject).modified
    assert text_of(subject) == printed
    ops = [node.op_type for node in subject.graph]
    return ops, "\n".join(decision_of(node).why for node in subject.graph)


@pytest.mark.parametrize(
    ("quantized", "first", "activations"),
    [
        (STATIC, "v4 = QuantizeLinear  (x, v2, v3)", "v4, v2, v3"),
        (DYNAMIC, "v2, v3, v4 = DynamicQuantizeLinear  (x)", "v2, v3, v4"),
    ],
)
def test_one_scale_and_a_matrix(quantized: str, first: str, activations: str) -> None:
    before = model(f"{quantized}{BY_COLUMN}y = MatMul (d, f)")
    product = f"y = qcompiler.QMatMulU8S8  ({activations}, v5, v6)"
    after = f"inputs x\n{first}\n{product}\noutputs y"
    # The sums are equal; ORT multiplies the scales in another order.
    assert_rewrites(FoldQDQ(), before, after, X, exact=False, floor_db=110)


@pytest.mark.parametrize(
    "weight",
    [
        "f = DequantizeLinear (w, wone)",
        "f = DequantizeLinear <axis = -1> (w, ws)",
        "f = DequantizeLinear <axis = 1> (w, ws, wz0)",
        "f = DequantizeLinear <axis = 1> (wsmall, ws, wz)",
        "f = DequantizeLinear <axis = 1> (wu, ws, wuz)",
    ],
)
@pytest.mark.parametrize("quantized", [STATIC, DYNAMIC])
def test_weights_of_every_kind(quantized: str, weight: str) -> None:
    ops, _ = folded(f"{quantized}{weight} y = MatMul (d, f)")
    assert ops[-1] == "QMatMulU8S8"
    assert len(ops) == 2


@pytest.mark.parametrize("zero", ["", ", xz8"])
def test_int8_activations_become_uint8_and_no_integer_changes(zero: str) -> None:
    """Ties and saturation included: 127.5 steps either way."""
    x = {"x": (np.arange(-96, 96).reshape(3, 64) * 0.5 * 3).astype(F4)}
    pair = f"q = QuantizeLinear <output_dtype = {0 if zero else 3}> (x, one{zero}) " \
           f"d = DequantizeLinear (q, one{zero}) "  # fmt: skip
    subject = model(f"{pair}{BY_COLUMN}y = MatMul (d, f)", one=F4(1.0))
    before = run(subject, x)
    FoldQDQ()(subject)
    assert [n.op_type for n in subject.graph] == ["QuantizeLinear", "QMatMulU8S8"]
    assert subject.graph[0].outputs[0].dtype is ir.DataType.UINT8
    np.testing.assert_allclose(run(subject, x)[0], before[0], rtol=3e-6)


def test_int8_that_something_else_reads_stays() -> None:
    subject = model(
        "q = QuantizeLinear (x, xs, xz8) d = DequantizeLinear (q, xs, xz8) y = Abs (d) r = Neg (q)",
        "g (float[3,64] x) => (float[3,64] y, int8[3,64] r) ",
    )
    assert not FoldQDQ()(subject).modified


@pytest.mark.parametrize(
    "gemm",
    [
        "y = Gemm <transB = 1> (d, h, b)",
        "y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (d, h, b)",
        "y = Gemm <transB = 1> (d, h)",
        "g = DequantizeLinear <axis = 0> (bi, bs) y = Gemm <transB = 1> (d, h, g)",
        "y = Gemm <alpha = 0.5> (d, f, b)",
        "c = Neg (b) y = Gemm (d, f, c)",
    ],
)
def test_gemm_becomes_a_product_and_a_sum(gemm: str) -> None:
    body = f"{STATIC}{BY_COLUMN}h = DequantizeLinear <axis = 0> (wt, ws) {gemm}"
    ops, _ = folded(body)
    sums = ["Add"] if ops[-1] == "Add" else []
    assert [op for op in ops if op != "Neg"] == ["QuantizeLinear", "QMatMulU8S8", *sums]


def test_an_int32_bias_after_a_product_is_added_as_floats() -> None:
    bias = "p = MatMul (d, f) g = DequantizeLinear <axis = 0> (bi, bs) y = Add (p, g)"
    assert folded(f"{STATIC}{BY_COLUMN}{bias}")[0] == ["QuantizeLinear", "QMatMulU8S8", "Add"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (STATIC + "f = DequantizeLinear (wide, wone, wz1) y = MatMul (d, f)", "do not fit int8"),
        (BY_COLUMN + "y = MatMul (x, f)", "ORT's own MatMulNBits"),
        (STATIC + BY_COLUMN + "t = Transpose (d) y = Gemm <transA = 1> (t, f)", "not quantized"),
        (STATIC + "t = Transpose (x) r = QuantizeLinear (t, vs, vz) "
         "e = DequantizeLinear (r, vs, vz) y = MatMul (d, e)",
         "both its operands are activations: ORT's own MatMulIntegerToFloat"),
    ],
)  # fmt: skip
def test_what_is_left_says_why(body: str, reason: str) -> None:
    head = HEAD if "(d, e)" not in body else "g (float[3,64] x) => (float[3,3] y) "
    ops, why = folded(body, head=head, wz1=np.uint8(100), steps=0.01)
    assert "QMatMulU8S8" not in ops
    assert reason in why


CONV = {
    "k": RNG.integers(-127, 128, (4, 2, 3, 3)).astype(np.int8), "ks": np.full(4, 0.02, F4),
    "ku": RNG.integers(0, 256, (4, 2, 3, 3)).astype(np.uint8), "kuz": np.uint8(131),
    "kz": np.int8([3, 3, 3, 3]), "kd": np.int8([1, -2, 3, 0]), "kone": F4(0.02),
    "ksmall": RNG.integers(-99, 99, (4, 2, 3, 3)).astype(np.int8),
    "cb": RNG.integers(-900, 900, 4).astype(np.int32), "cbs": np.full(4, 0.02 * 0.03, F4),
    "cf": RNG.standard_normal(4).astype(F4), "cbo": np.full(4, 0.01, F4), "one": F4(1),
    "zero_f": F4(0), "six": F4(6), "sixth": F4(6 / 255), "huge": np.full(4, 1e7, F4),
    "k1": RNG.integers(-127, 128, (4, 2, 3)).astype(np.int8),
    "k3": RNG.integers(-127, 128, (4, 2, 3, 3, 3)).astype(np.int8),
}  # fmt: skip
IMAGES = {"x": RNG.standard_normal((2, 2, 9, 9)).astype(F4)}
KERNEL = "f = DequantizeLinear <axis = 0> (k, ks) "
OUT = " r = QuantizeLinear (t, ys, yz) y = DequantizeLinear (r, ys, yz)"


def conv_head(rank: int = 4) -> str:
    names = ",".join("abcde"[:rank])
    sizes = ",".join(map(str, (2, 2, 9, 9, 9)[:rank]))
    return f"g (float[{sizes}] x) => (float[{names}] y) "


def folded_conv(
    body: str, rank: int = 4, steps: float = 1, **changes: Any
) -> tuple[list[str], str]:
    """ORT rounds its sums to y once, floats between a pair twice: one step at a tie."""
    feeds = {"x": RNG.standard_normal((2, 2, 9, 9, 9)[:rank]).astype(F4)}
    changes = CONV | {"ys": F4(STEP), "yz": np.uint8(128)} | changes
    return folded(STATIC + body, feeds, conv_head(rank), steps, **changes)


WHOLE = ["QuantizeLinear", "QConv", "DequantizeLinear"]


@pytest.mark.parametrize(
    "body",
    [
        KERNEL + "t = Conv (d, f)" + OUT,
        KERNEL + "g = DequantizeLinear <axis = 0> (cb, cbs) t = Conv (d, f, g)" + OUT,
        KERNEL + "g = DequantizeLinear <axis = 0> (cb, cbo) t = Conv (d, f, g)" + OUT,
        KERNEL + "t = Conv (d, f, cf)" + OUT,
        KERNEL + "t = Conv <group = 1, strides = [2,2], pads = [1,0,1,2]> (d, f)" + OUT,
        KERNEL + 't = Conv <auto_pad = "VALID"> (d, f)' + OUT,
        KERNEL + 't = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (d, f)' + OUT,
        KERNEL + 't = Conv <auto_pad = "SAME_LOWER", strides = [1,2]> (d, f)' + OUT,
        "f = DequantizeLinear (k, kone) t = Conv (d, f)" + OUT,
        "f = DequantizeLinear (ku, kone, kuz) t = Conv (d, f)" + OUT,
        "f = DequantizeLinear <axis = 0> (k, ks, kz) t = Conv (d, f)" + OUT,
        "f = DequantizeLinear <axis = 0> (ksmall, ks, kd) t = Conv (d, f)" + OUT,
    ],
)
def test_convolutions_of_every_kind(body: str) -> None:
    assert folded_conv(body)[0] == WHOLE


@pytest.mark.parametrize("rank", [3, 5])
def test_convolutions_of_one_and_three_dimensions(rank: int) -> None:
    kernel = f"f = DequantizeLinear <axis = 0> (k{rank - 2}, ks) t = Conv (d, f)"
    assert folded_conv(kernel + OUT, rank)[0] == WHOLE


@pytest.mark.parametrize(
    ("between", "step", "zero", "folds"),
    [
        ("t = Relu (c)", STEP, 0, True),
        ("t = Relu (c)", STEP, 1, False),
        ("t = Clip (c, zero_f)", STEP, 0, True),
        ("t = Clip (c, zero_f, six)", 6 / 255, 0, True),
        ("t = Clip (c, zero_f, six)", STEP, 0, False),
        ("t = Clip (c, , six)", 6 / 127, 128, True),
        ("e = Relu (c) t = Clip (e, , six)", 6 / 255, 0, True),
    ],
)
def test_what_saturation_does_needs_no_relu(
    between: str, step: float, zero: int, folds: bool
) -> None:
    changes = {"ys": F4(step), "yz": np.uint8(zero)}
    ops, why = folded_conv(KERNEL + "c = Conv (d, f) " + between + OUT, **changes)
    assert (ops == WHOLE) == folds
    assert folds or "cuts within the range" in why


def test_int8_around_a_convolution() -> None:
    body = KERNEL + "t = Conv (d, f)" + OUT
    assert folded_conv(body, xz=np.int8(-8), yz=np.int8(5))[0] == WHOLE


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (KERNEL + "y = Conv (d, f)", "its result is not quantized: ORT's ConvInteger is slower"),
        (KERNEL + "t = Conv (d, f, huge)" + OUT, "its bias does not fit int32"),
        ("f = DequantizeLinear <axis = 0> (ku, ks, kuz4) t = Conv (d, f)" + OUT, "do not fit int8"),
        ("f = DequantizeLinear <axis = 1> (k, two) t = Conv (d, f)" + OUT, "a scale per axis=1"),
        ("f = Neg (kfloat) t = Conv (d, f)" + OUT, "its weight is not quantized"),
    ],
)
def test_a_convolution_that_is_left_says_why(body: str, reason: str) -> None:
    changes = {"kuz4": np.uint8([130, 131, 132, 133]), "two": np.full(2, 0.02, F4),
               "kfloat": np.ones((4, 2, 3, 3), F4)}  # fmt: skip
    subject = model(STATIC + body, conv_head(), **(CONV | changes))
    FoldQDQ()(subject)
    (conv,) = (node for node in subject.graph if node.op_type == "Conv")
    assert reason in decision_of(conv).why


TABLE = {
    "t8": RNG.integers(-128, 128, (20, 8)).astype(np.int8), "ts": F4(0.1), "tz": np.int8(3),
    "tr": RNG.uniform(0.5, 1, 20).astype(F4), "trz": RNG.integers(-9, 9, 20).astype(np.int8),
    "tc": RNG.uniform(0.5, 1, 8).astype(F4), "tg": RNG.uniform(0.5, 1, (20, 2)).astype(F4),
    "tgr": RNG.uniform(0.5, 1, (5, 8)).astype(F4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("dequantize", "gathers"),
    [
        ("DequantizeLinear (t8, ts, tz)", 1),
        ("DequantizeLinear <axis = 1> (t8, tc)", 1),
        ("DequantizeLinear <axis = 0> (t8, tr)", 2),
        ("DequantizeLinear <axis = 0> (t8, tr, trz)", 3),
        ("DequantizeLinear <axis = 1, block_size = 4> (t8, tg)", 2),
    ],
)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 3)])
def test_embeddings_are_looked_up_as_they_are_stored(
    dequantize: str, gathers: int, shape: tuple[int, ...]
) -> None:
    head = f"g (int64[{','.join(map(str, shape))}] i) => (float[{'n,' * len(shape)}m] y) "
    feeds = {"i": RNG.integers(0, 20, shape)}
    subject = model(f"f = {dequantize} y = Gather (f, i)", head, **TABLE)
    before = run(subject, feeds)[0]
    FoldQDQ()(subject)
    assert [n.op_type for n in subject.graph] == ["Gather"] * gathers + ["DequantizeLinear"]
    np.testing.assert_array_equal(run(subject, feeds)[0], before)


def test_a_table_that_is_not_looked_up_by_row_stays() -> None:
    head = "g (int64[3] i) => (float[20,3] y) "
    subject = model("f = DequantizeLinear (t8, ts) y = Gather <axis = 1> (f, i)", head, **TABLE)
    assert not FoldQDQ()(subject).modified
    assert "does not look up rows" in decision_of(subject.graph[-1]).why


def test_constants_that_ort_would_dequantize_every_run_become_floats() -> None:
    body = "e = DequantizeLinear (g8, ts) y = LayerNormalization <axis = -1> (x, e)"
    subject = model(body, "g (float[3,64] x) => (float[3,64] y) ", **TABLE,
                    g8=np.arange(64).astype(np.int8))  # fmt: skip
    before = run(subject, X)[0]
    assert FoldQDQ()(subject).modified
    assert [node.op_type for node in subject.graph] == ["LayerNormalization"]
    assert "kept as floats" in decision_of(subject.graph[0]).why
    np.testing.assert_array_equal(run(subject, X)[0], before)

"""fold-qdq for GPUs: convolutions between floats become products of stored images."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from calibrated import facts
from golden import assert_rewrites, model_of, run, sqnr

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.region import HALF
from qcompiler.model_runs import ModelRuns
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.pipeline import Pipeline
from qcompiler.targets import cuda

RNG = np.random.default_rng(0)
F4 = np.float32
WEIGHTS = {
    "s": F4(0.03), "z": np.uint8(120), "t": F4(0.05), "one": F4(0.02),
    "k": RNG.integers(-128, 128, (5, 12, 3, 3)).astype(np.int8), "ks": np.full(5, 0.02, F4),
    "ku": RNG.integers(0, 256, (5, 12, 3, 3)).astype(np.uint8), "kuz": np.uint8(128),
    "kz": np.full(5, 3, np.int8), "m": RNG.integers(-9, 9, (5, 12, 1, 1)).astype(np.int8),
    "grouped": RNG.integers(-9, 9, (12, 6, 3, 3)).astype(np.int8), "gs": np.full(12, 0.02, F4),
    "depthwise": RNG.integers(-9, 9, (12, 1, 3, 3)).astype(np.int8),
    "narrow": RNG.integers(-9, 9, (5, 7, 3, 3)).astype(np.int8),
    "b": RNG.standard_normal(5).astype(F4), "bi": np.arange(5, dtype=np.int32),
    "bs": np.full(5, 0.1, F4),
}  # fmt: skip
HEAD = "g (float[2,12,9,8] x) => (float[a,b,c,d] y) "
PAIR = "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
KERNEL = "f = DequantizeLinear <axis = 0> (k, ks) "
ATTRIBUTES = "{'dilations': '(1, 2)', 'group': '1', 'strides': '(2, 1)'}"
FEEDS = {"x": RNG.standard_normal((2, 12, 9, 8)).astype(F4)}


def model(body: str, head: str = HEAD) -> Any:
    return model_of(head + "{ " + body + " }", WEIGHTS)


def test_a_convolution_becomes_a_product_of_an_image() -> None:
    subject = model(
        PAIR + KERNEL + "y = Conv <dilations = [1,2], pads = [1,0,1,2], strides = [2,1]> (d, f, b)"
    )
    assert_rewrites(
        FoldQDQ(images=True),
        subject,
        f"""
        inputs x
        v4 = qcompiler.QuantizeImage {{'pads': '(0, 1, 0, 0, 0, 1, 2, 4)'}} (x, v2, v3)
        v7 = qcompiler.QConvW8A8 {ATTRIBUTES} (v4, v2, v3, v5, v6)
        y = Add  (v7, v8)
        outputs y
        """,
        FEEDS,
        exact=False,  # the sums are; those of floats are not
        floor_db=120,
    )


@pytest.mark.parametrize(
    "body",
    [
        PAIR + KERNEL + "y = Conv (d, f)",
        PAIR + KERNEL + 'y = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (d, f)',
        PAIR + KERNEL + "g = DequantizeLinear <axis = 0> (bi, bs) y = Conv (d, f, g)",
        PAIR + "f = DequantizeLinear (k, one) y = Conv (d, f, b)",
        PAIR + "f = DequantizeLinear (ku, one, kuz) y = Conv (d, f)",
        "q = QuantizeLinear (x, s) d = DequantizeLinear (q, s) " + KERNEL + "y = Conv (d, f)",
        PAIR + KERNEL + "c = Conv (d, f, b) y = Relu (c)",
        PAIR + "f = DequantizeLinear <axis = 0> (grouped, gs) y = Conv <group = 2> (d, f)",
        PAIR + "f = DequantizeLinear <axis = 0> (depthwise, gs) y = Conv <group = 12> (d, f)",
    ],
)
def test_convolutions_of_every_kind(body: str) -> None:
    subject = model(body)
    expected = run(subject, FEEDS, plainly=True)
    FoldQDQ(images=True)(subject)
    ops = [node.op_type for node in subject.graph]
    assert ops[:2] == ["QuantizeImage", "QConvW8A8"]
    assert not {"QuantizeLinear", "Conv"}.intersection(ops)
    for got, wanted in zip(run(subject, FEEDS, plainly=True), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_an_image_is_shared_by_what_pads_it_alike() -> None:
    """And what else reads the pair keeps it."""
    subject = model(
        PAIR + KERNEL + "h = DequantizeLinear <axis = 0> (m, ks) c = Conv (d, f) e = Conv (d, h) "
        "w = Conv <pads = [1,1,1,1]> (d, f) n = Neg (d) y = GlobalAveragePool (c)",
        "g (float[2,12,9,8] x) => (float[a,b,c,d] y, float[e,f,g,h] e, float[i,j,k,l] w, "
        "float[2,12,9,8] n) ",
    )
    expected = run(subject, FEEDS, plainly=True)
    FoldQDQ(images=True)(subject)
    ops = [node.op_type for node in subject.graph]
    assert [ops.count(op) for op in ("QuantizeImage", "QConvW8A8", "QuantizeLinear")] == [2, 3, 1]
    for got, wanted in zip(run(subject, FEEDS, plainly=True), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("e = Concat <axis = 1> (x, x, x, x, x, x, x, x, x, x, x) q = QuantizeLinear (e, s, z) "
         "d = DequantizeLinear (q, s, z) f = DequantizeLinear <axis = 0> (many, ms) "
         "y = Conv <group = 132> (d, f)",
         "132 groups of 1 channels: kernels for GPUs would multiply each result's with 63 zeros"),
        (PAIR + "f = DequantizeLinear <axis = 0> (k, ks, kz) y = Conv (d, f)",
         "its weights have zero points"),
        (PAIR + KERNEL + "g = Exp (b) h = Mul (g, c) y = Conv (d, f, h)",
         "its bias is computed, or not FLOAT"),
        ("q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, t, z) " + KERNEL +
         "y = Conv (d, f)", "its activations are given as integers"),
        (PAIR + KERNEL + "y = Conv <pads = [0,-1,0,0]> (d, f)", "its pads are [0, -1, 0, 0]"),
        ("e = Slice (x, zero, seven, axis) q = QuantizeLinear (e, s, z) "
         "d = DequantizeLinear (q, s, z) f = DequantizeLinear <axis = 0> (narrow, ks) "
         "y = Conv (d, f)", "its 7 channels would be padded to 16, which is more work"),
        (KERNEL + "y = Conv (x, f)", "its activations are not quantized"),
    ],
)  # fmt: skip
def test_a_convolution_that_is_left_says_why(body: str, reason: str) -> None:
    more = {"many": np.ones((264, 1, 1, 1), np.int8), "ms": np.full(264, 0.02, F4)}
    more |= {"zero": np.int64([0]), "seven": np.int64([7]), "axis": np.int64([1])}
    head = "g (float[2,12,9,8] x, float[5] c) => (float[a,b,c,d] y) "
    subject = model_of(head + "{ " + body + " }", WEIGHTS | more)
    FoldQDQ(images=True)(subject)
    (conv,) = (node for node in subject.graph if node.op_type == "Conv")
    assert reason in decision_of(conv).why


def test_what_is_left_is_not_said_to_be_onnxruntimes() -> None:
    """Between pairs it would be QLinearConv on the CPU, which GPUs do not have."""
    subject = model(
        PAIR + "f = DequantizeLinear <axis = 0> (k, ks, kz) c = Conv (d, f) "
        "r = QuantizeLinear (c, s, z) y = DequantizeLinear (r, s, z)"
    )
    FoldQDQ(images=True)(subject)
    (conv,) = (node for node in subject.graph if node.op_type == "Conv")
    found = decision_of(conv)
    assert found.action == "float"
    assert found.why == "its weights have zero points: computes what was dequantized"


# --- the pipeline of cuda-int8 -----------------------------------------------------------------


def weight(*shape: int) -> Any:
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(F4)


NETWORK = """g (float[m,16,12,12] x) => (float[m,24,1,1] y) {
    c = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w1, b1)
    r = Relu (c)
    s = Conv <strides = [2,2]> (x, w2)
    d = Conv <pads = [1,1,1,1]> (r, w3, b3)
    e = Add (d, s)
    f = Relu (e)
    p = Conv <group = 24> (f, wide)
    h = Conv (p, w4)
    i = Sigmoid (h)
    j = Mul (h, i)
    y = GlobalAveragePool (j) }"""
LAYERS = {
    "w1": weight(24, 16, 3, 3), "b1": weight(24), "w2": weight(24, 16, 1, 1),
    "w3": weight(24, 24, 3, 3), "b3": weight(24), "wide": weight(24, 1, 3, 3),
    "w4": weight(24, 24, 1, 1),
}  # fmt: skip
IMAGES = {"x": RNG.standard_normal((4, 16, 12, 12)).astype(F4)}


def compiled(runs: ModelRuns) -> tuple[list[str], dict[str, str]]:
    """The ops of the network for cuda-int8 without their hashes, and why convolutions stay."""
    subject = model_of(NETWORK, LAYERS)
    exact = run(subject, IMAGES, plainly=True)[0]
    subject = Pipeline.default(
        "cuda-int8", runs=runs, supports=lambda r: cuda.supports(r) if HALF in r.flags else "float"
    ).run(subject)
    assert sqnr(exact, run(subject, IMAGES, plainly=True)[0]) > 35
    ours = [n for n in subject.graph if n.domain.startswith("qcompiler")]
    names = [re.sub("_[0-9a-f]{6}$", "", node.op_type) for node in ours]
    left = {n.name or "": decision_of(n).why for n in subject.graph if n.op_type == "Conv"}
    return names, left


def test_a_network_with_samples() -> None:
    _, observer = facts([IMAGES])
    ours, left = compiled(ModelRuns(observe=observer))
    assert sorted(ours) == [
        "QConvImageW8A8_K16_N24_R1_S1_f16_AddT_Relu_made",
        "QConvImageW8A8_K16_N24_R3_S3_f16_AddC_Relu_made",
        "QConvImageW8A8_K24_N24_R3_S3_f16_made",
        "QConvW8A8_K24_N24_R1_S1_f16_Sigmoid_Mul",
        "QConvW8A8_K24_N24_R3_S3_f16_AddC",
        "QuantizeImage_K16_f16",
        "QuantizeImage_K16_f16",
    ]
    assert left == {}


def test_a_network_without_samples_stays_float() -> None:
    ours, left = compiled(ModelRuns())
    assert ours == []
    assert len(left) == 5
    assert all("no samples: --calib DIR" in why for why in left.values())

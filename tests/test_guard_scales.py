"""What ORT must not fuse: its default optimizations answer as the model does node by node."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of, run, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.guard_scales import try_guard_scales

RNG = np.random.default_rng(5)
F4 = np.float32
SCALE = {"s": F4(0.05), "z": np.uint8(120), "t": F4(0.2), "u": np.uint8(128)}
ROWS = {"sr": RNG.uniform(0.04, 0.06, 4).astype(F4), "zr": np.full(4, 120, np.uint8)}
BLOCKS = {"sb": RNG.uniform(0.04, 0.06, (4, 2)).astype(F4), "zb": np.full((4, 2), 120, np.uint8)}
WEIGHTS = {
    # Within 63, where no sum of two products saturates on any processor.
    "w": RNG.integers(-63, 64, (64, 16)).astype(np.int8),
    "wr": RNG.uniform(0.01, 0.02, 64).astype(F4), "wc": RNG.uniform(0.01, 0.02, 16).astype(F4),
    "wb": RNG.uniform(0.01, 0.02, (2, 16)).astype(F4),
    "k": RNG.integers(-63, 64, (4, 4, 3, 3)).astype(np.int8),
    "kc": RNG.uniform(0.01, 0.02, 4).astype(F4),
    "none": np.zeros((0, 16), np.int8),
}  # fmt: skip
MATRIX = RNG.standard_normal((4, 64)).astype(F4) * 2
IMAGE = RNG.standard_normal((1, 4, 8, 8)).astype(F4) * 2

ONE = "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
BY_ROW = "q = QuantizeLinear <axis = 0> (x, sr, zr) d = DequantizeLinear <axis = 0> (q, sr, zr) "
BY_CHANNEL = BY_ROW.replace("axis = 0", "axis = 1")
BY_BLOCK = (
    "q = QuantizeLinear <axis = 1, block_size = 32> (x, sb, zb) "
    "d = DequantizeLinear <axis = 1, block_size = 32> (q, sb, zb) "
)
DYNAMIC = "q, e, f = DynamicQuantizeLinear (x) d = DequantizeLinear (q, e, f) "
ROW_WEIGHT = "v = DequantizeLinear <axis = 0> (w, wr) "
BLOCK_WEIGHT = "v = DequantizeLinear <axis = 0, block_size = 32> (w, wb) "
KERNEL = "v = DequantizeLinear <axis = 0> (k, kc) "
RESULT = " p = QuantizeLinear (c, t, u) y = DequantizeLinear (p, t, u)"
BY_RESULT = RESULT.replace("(c, t, u)", "<axis = 1> (c, tr, ur)").replace(
    "(p, t, u)", "<axis = 1> (p, tr, ur)"
)

WIDENED = {
    "a scale per row": ONE + ROW_WEIGHT + "y = MatMul (d, v)",
    "blocks": ONE + BLOCK_WEIGHT + "y = MatMul (d, v)",
    "blocks, quantized": ONE + BLOCK_WEIGHT + "c = MatMul (d, v)" + RESULT,
    "blocks, dynamic": DYNAMIC + BLOCK_WEIGHT + "y = MatMul (d, v)",
    "activations by row": BY_ROW + "v = DequantizeLinear <axis = 1> (w, wc) y = MatMul (d, v)",
    "activations in blocks": BY_BLOCK + "v = DequantizeLinear <axis = 1> (w, wc) y = MatMul (d, v)",
}
COPIED = {
    "input channels": ONE + "v = DequantizeLinear <axis = 1> (k, kc) c = Conv (d, v)" + RESULT,
    "channels of the image": BY_CHANNEL + KERNEL + "c = Conv (d, v)" + RESULT,
    "channels of the result": ONE + KERNEL + "c = Conv (d, v)" + BY_RESULT,
    "sigmoid": BY_CHANNEL + "c = Sigmoid (d)" + RESULT,
    "leaky": BY_CHANNEL + "c = LeakyRelu (d)" + RESULT,
    "mean": BY_CHANNEL + "c = AveragePool <kernel_shape = [2,2]> (d)" + RESULT,
    "mean of all": BY_CHANNEL + "c = GlobalAveragePool (d)" + RESULT,
    "behind the padding": ONE + "c = AveragePool <kernel_shape = [3,3], strides = [2,2], "
    "pads = [1,1,1,1], ceil_mode = 1, count_include_pad = 1> (d)" + RESULT,
}
VALUES = SCALE | ROWS | BLOCKS | WEIGHTS
VALUES |= {"tr": RNG.uniform(0.1, 0.2, 4).astype(F4), "ur": np.full(4, 120, np.uint8)}


def folded(body: str, head: str, feed: np.ndarray) -> ir.Model:
    """After folding; results at ORT's default level are those of the source, node by node."""
    subject = model_of(f"{head}{{ {body} }}", VALUES)
    for index, node in enumerate(subject.graph):
        node.name = f"node_{index}"
    expected = run(subject, {"x": feed}, plainly=True)
    assert FoldQDQ()(subject).modified
    verify(subject, Stage.QUANTIZED, "fold-qdq")
    for plainly in (False, True):
        for got, want in zip(run(subject, {"x": feed}, plainly=plainly), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    before = text_of(subject)
    FoldQDQ()(subject)
    assert text_of(subject) == before
    return subject


@pytest.mark.parametrize("case", WIDENED)
def test_weights_become_floats(case: str) -> None:
    subject = folded(WIDENED[case], "g (float[4,64] x) => (float[4,16] y) ", MATRIX)
    (product,) = (node for node in subject.graph if node.op_type == "MatMul")
    assert product.inputs[1] is not None and product.inputs[1].const_value is not None
    assert "ORT would fuse it all the same" in decision_of(product).why
    assert decision_of(product).action == "float"


@pytest.mark.parametrize("case", COPIED)
def test_activations_are_copied_out_of_their_pair(case: str) -> None:
    subject = folded(COPIED[case], "g (float[1,4,8,8] x) => (float[a,b,c,d] y) ", IMAGE)
    (copy,) = (node for node in subject.graph if node.op_type == "Max")
    (reader,) = (use.node for use in copy.outputs[0].uses())
    assert "ORT would fuse it all the same" in decision_of(reader).why
    assert "keeps ORT from fusing" in decision_of(copy).why


def test_of_two_activations_one_is_copied() -> None:
    second = "h = QuantizeLinear <axis = 0> (x, sr, zr) v = DequantizeLinear <axis = 0> (h, sr, zr)"
    body = f"{ONE} {second} y = MatMul (d, v)"
    subject = folded(body, "g (float[4,4] x) => (float[4,4] y) ", MATRIX[:, :4].copy())
    assert [node.op_type for node in subject.graph].count("Max") == 1


def test_an_empty_product_is_zero() -> None:
    body = f"{ONE} v = DequantizeLinear (none, t) y = MatMul (d, v)"
    folded(body, "g (float[4,0] x) => (float[4,16] y) ", np.zeros((4, 0), F4))


@pytest.mark.parametrize(
    "body",
    [
        ONE + "v = DequantizeLinear <axis = 1> (w, wc) y = MatMul (d, v)",
        ONE + "v = DequantizeLinear (w, t) c = MatMul (d, v)" + RESULT,
        "d = Neg (x) " + BLOCK_WEIGHT + "y = MatMul (d, v)",
        ONE + "c = Sigmoid (d)" + RESULT,
        BY_ROW + "c = Softmax (d)" + RESULT,
    ],
)
def test_what_ort_fuses_rightly_or_not_at_all_stays(body: str) -> None:
    subject = model_of(f"g (float[4,64] x) => (float[4,n] y) {{ {body} }}", VALUES)
    assert not any(try_guard_scales(subject.graph, node) for node in list(subject.graph))

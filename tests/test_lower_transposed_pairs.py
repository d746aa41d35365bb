"""Transposed convolutions that others quantized become convolutions of the same integers."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_rewrites, model_of, run

from qcompiler.ir.decisions import decision_of
from qcompiler.passes.normalize_qdq import NormalizeQDQ
from qcompiler.pipeline import Pipeline
from qcompiler.targets.catalog import get_target

RNG = np.random.default_rng(0)
STEP = 0.05
SCALES = RNG.uniform(0.005, 0.01, 3).astype(np.float32)
W = {
    "xs": np.float32(0.03), "xz": np.uint8(128), "ys": np.float32(STEP), "yz": np.uint8(100),
    "k": RNG.integers(-60, 61, (4, 3, 4, 4)).astype(np.int8),
    "u": RNG.integers(60, 190, (4, 3, 4, 4)).astype(np.uint8), "uz": np.uint8(120),
    "odd": RNG.integers(-60, 61, (4, 3, 3, 3)).astype(np.int8),
    "bytes": RNG.integers(60, 190, (4, 3, 3, 2)).astype(np.uint8), "kz": np.uint8([120, 128, 131]),
    "ks": SCALES, "one": np.float32(0.008), "rows": np.full(4, 0.008, np.float32),
    "b": RNG.integers(-900, 900, 3).astype(np.int32), "bs": SCALES * np.float32(0.03),
    "axes": np.array([0, 2, 3]), "from": np.array([1]), "to": np.array([4]),
    "b6": RNG.standard_normal(6).astype(np.float32),
}  # fmt: skip
FEEDS = {"x": RNG.standard_normal((1, 4, 5, 7), dtype=np.float32)}
STRIDE = "strides = [2,2]"
PER_CHANNEL = "f = DequantizeLinear <axis = 1> (k, ks)"
BIAS = "e = DequantizeLinear <axis = 0> (b, bs)"


def between_pairs(attributes, weight, operands, after="y = DequantizeLinear (r, ys, yz)"):
    text = (
        "g (float[1,4,5,7] x) => (float[1,n,p,q] y) { i = QuantizeLinear (x, xs, xz) "
        f"d = DequantizeLinear (i, xs, xz) {weight} c = ConvTranspose <{attributes}> ({operands}) "
        f"r = QuantizeLinear (c, ys, yz) {after} }}"
    )
    model = model_of(text, W)
    for node in model.graph:
        node.name = f"{node.op_type}_{node.outputs[0].name}"
    return model


def test_golden():
    assert_rewrites(
        NormalizeQDQ(),
        between_pairs(f"{STRIDE}, pads = [1,1,1,1]", f"{PER_CHANNEL} {BIAS}", "d, f, e"),
        """inputs x
        v4 = QuantizeLinear  (x, v2, v3)
        v5 = DequantizeLinear  (v4, v2, v3)
        v8 = DequantizeLinear {'axis': '0'} (v6, v7)
        v10 = Conv {'group': '1', 'pads': '(1, 1, 1, 1)'} (v5, v8, v9)
        v13 = QuantizeLinear  (v10, v11, v12)
        v14 = DepthToSpace {'blocksize': '2', 'mode': 'CRD'} (v13)
        v18 = Slice  (v14, v15, v16, v17)
        y = DequantizeLinear  (v18, v11, v12)
        outputs y""",
    )


@pytest.mark.parametrize(("attributes", "weight", "operands"), [
    (STRIDE, PER_CHANNEL, "d, f"),
    (STRIDE, f"{PER_CHANNEL} {BIAS}", "d, f, e"),
    (f"{STRIDE}, pads = [0,1,2,1], output_padding = [1,0]", PER_CHANNEL, "d, f"),
    (f"{STRIDE}, group = 2", PER_CHANNEL, "d, f, b6"),
    (f"{STRIDE}, pads = [1,1,1,1], output_padding = [1,1]",
     f"f = DequantizeLinear <axis = 1> (odd, ks) {BIAS}", "d, f, e"),
    (f"{STRIDE}, output_padding = [1,1]",
     "f = DequantizeLinear <axis = 1> (bytes, ks, kz)", "d, f"),
    ("strides = [4,4]", "f = DequantizeLinear (k, one)", "d, f"),
    ("pads = [1,1,1,1]", "f = DequantizeLinear (u, one, uz)", "d, f"),
])  # fmt: skip
def test_it_becomes_an_integer_convolution(attributes, weight, operands):
    model = between_pairs(attributes, weight, operands)
    before, plain = run(model, FEEDS)[0], run(model, FEEDS, plainly=True)[0]
    model = Pipeline.default(get_target("x86-int8")).run(model)
    assert "QConv" in [node.op_type.split("_")[0] for node in model.graph]
    assert not any(node.op_type in ("ConvTranspose", "Conv") for node in model.graph)
    # QLinearConv rounds once, floats and then a Q may round twice: a tie goes either way.
    for expected in (before, plain):
        steps = np.abs(run(model, FEEDS)[0] - expected) / STEP
        assert steps.max() < 1.5 and (steps > 0.5).mean() < 0.02


def test_what_is_cut_has_its_own_shape():
    model = between_pairs(f"{STRIDE}, pads = [1,1,1,1]", PER_CHANNEL, "d, f")
    NormalizeQDQ()(model)
    (conv,) = (node for node in model.graph if node.op_type == "Conv")
    assert conv.outputs[0].shape == [1, 12, 6, 8]
    assert model.graph.outputs[0].shape == run(model, FEEDS)[0].shape == (1, 3, 10, 14)


def test_a_kernel_that_many_read_and_a_result_that_leaves():
    twice = "y = DequantizeLinear (r, ys, yz) c2 = ConvTranspose (d, f)"
    model = between_pairs(STRIDE, PER_CHANNEL, "d, f", twice)
    model.graph.outputs.append(model.graph[-1].outputs[0])
    model.graph.outputs[-1].dtype = ir.DataType.FLOAT
    expected = run(model, FEEDS, plainly=True)
    assert NormalizeQDQ()(model).modified
    ops = [node.op_type for node in model.graph]
    assert ops.count("Conv") == ops.count("ConvTranspose") == ops.count("DepthToSpace") == 1
    for got, want in zip(run(model, FEEDS, plainly=True), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=STEP)


@pytest.mark.parametrize(("attributes", "weight", "operands", "why"), [
    ("strides = [2,1]", "f = DequantizeLinear <axis = 1> (odd, ks)", "d, f", "different strides"),
    (STRIDE, "f = DequantizeLinear <axis = 0> (k, rows)", "d, f", "not per output channel"),
    (STRIDE, f"{PER_CHANNEL} t = Slice (x, from, to, from) e = ReduceMax <keepdims = 0> (t, axes)",
     "d, f, e", "bias is computed"),
])  # fmt: skip
def test_what_stays_says_why(attributes, weight, operands, why):
    model = between_pairs(attributes, weight, operands)
    model = Pipeline.default(get_target("x86-int8")).run(model)
    (node,) = (node for node in model.graph if node.op_type == "ConvTranspose")
    assert why in decision_of(node).why


def test_floats_that_nothing_quantizes_stay():
    text = (
        "g (float[1,4,5,7] x) => (float[1,n,p,q] y) "
        "{ f = DequantizeLinear <axis = 1> (k, ks) y = ConvTranspose <strides = [2,2]> (x, f) }"
    )
    model = model_of(text, W)
    NormalizeQDQ()(model)
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "ConvTranspose"]

"""Convolutions from float to QLinearConv: their numbers, and what stays beside them."""

import numpy as np
from calibrated import planned
from golden import run, sqnr

from qcompiler.ir.stages import Stage, verify
from qcompiler.ir.types import TensorStats
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.round_to_nearest import RoundToNearest

RNG = np.random.default_rng(0)
CONV = (
    "g (float[n,2,8,8] x) => (float[n,4,6,6] y) "
    "{ c = Conv (x, w, b) r = Relu (c) d = Conv <group = 2, pads = [1,1,1,1]> (r, v) y = Neg (d) }"
)
CONV_WEIGHTS = {
    "w": RNG.standard_normal((4, 2, 3, 3), dtype=np.float32),
    "b": RNG.standard_normal(4, dtype=np.float32),
    "v": RNG.standard_normal((4, 2, 3, 3), dtype=np.float32),
}
IMAGES = {"x": RNG.standard_normal((2, 2, 8, 8), dtype=np.float32)}


def observed(model, names):
    """Ranges of the named tensors on IMAGES, through an ORT run of the model."""
    copy = model.clone()
    values = {v.name: v for n in copy.graph for v in n.outputs}
    wanted = [name for name in names if name in values]
    copy.graph.outputs[:] = [values[name] for name in wanted]
    arrays = dict(zip(wanted, run(copy, IMAGES), strict=True)) | IMAGES
    return {n: TensorStats(float(arrays[n].min()), float(arrays[n].max())) for n in names}


def test_static_convolutions_end_to_end():
    model = planned(CONV, CONV_WEIGHTS)
    reference = run(model, IMAGES)[0]
    InsertQDQ(observed)(model)
    verify(model, Stage.QDQ, "insert-qdq")
    RoundToNearest()(model)
    qdq = run(model, IMAGES)[0]
    assert sqnr(reference, qdq) > 30
    FoldQDQ()(model)
    verify(model, Stage.QUANTIZED, "fold-qdq")
    assert [n.op_type for n in model.graph] == [
        "QuantizeLinear", "QConv", "QConv", "DequantizeLinear", "Neg",
    ]  # fmt: skip
    # ORT's QLinearConv rounds its requantization once; the float pair rounds twice.
    assert sqnr(qdq, run(model, IMAGES)[0]) > 35


def test_a_relu_stays_when_zero_is_not_the_smallest_step():
    model = planned(CONV, CONV_WEIGHTS)
    InsertQDQ(lambda model, names: {name: TensorStats(-4.0, 4.0) for name in names})(model)
    RoundToNearest()(model)
    FoldQDQ()(model)
    ops = [n.op_type for n in model.graph if n.op_type in ("Relu", "QConv", "Conv")]
    assert ops == ["Conv", "Relu", "QConv"]


def test_a_dead_channel_keeps_its_bias():
    """At the scale its zero weights would give, the int32 bias would saturate and be lost."""
    weights = CONV_WEIGHTS | {"w": CONV_WEIGHTS["w"].copy(), "b": np.array([5, 0.1, -7, 2], "f4")}
    weights["w"][0] = 0
    weights["w"][2] = 1e-9
    model = planned(CONV, weights)
    reference = run(model, IMAGES)[0]
    for rewrite in (InsertQDQ(observed), RoundToNearest(), FoldQDQ()):
        rewrite(model)
    assert [n.op_type for n in model.graph].count("QConv") == 2
    assert sqnr(reference, run(model, IMAGES)[0]) > 30


def test_other_readers_of_an_input_keep_their_precision():
    model = planned(
        "g (float[n,2,8,8] x) => (float[n,4,6,6] y, float[n,2,8,8] e) "
        "{ c = Conv (x, w) y = Neg (c) e = Exp (x) }",
        CONV_WEIGHTS,
    )
    expected = run(model, IMAGES)[1]
    InsertQDQ(observed)(model)
    np.testing.assert_array_equal(run(model, IMAGES)[1], expected)

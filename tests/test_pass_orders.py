"""Whatever order passes come in, what was to be quantized is, or says why not."""

import numpy as np
import pytest
from golden import model_of, run, sqnr

import qcompiler
from qcompiler.ir.errors import OptionError

RNG = np.random.default_rng(5)
TEXT = """g (float[n,4,12,12] x) => (float[n,48] y) {
    c = Conv <pads = [1,1,1,1]> (x, k0, b0) r = Relu (c) d = Conv <group = 16> (r, k1, b1)
    s = Relu (d) e = Conv <strides = [2,2]> (s, k2, b2) t = Relu (e)
    f = Flatten (t) h = MatMul (f, w0) l = LayerNormalization (h, gamma, beta)
    u = MatMul (l, w1) v = Relu (u) o = MatMul (v, w2) y = Add (o, b3)
}"""


def weights():
    def normal(*shape, fan=1):
        return RNG.standard_normal(shape, dtype=np.float32) / fan**0.5

    # Channels of one convolution, and of the norm, have ranges of their own.
    unequal = np.geomspace(0.02, 4, 16, dtype=np.float32)
    gamma = np.ones(64, np.float32)
    gamma[[5, 40]] = 50
    return {
        "k0": normal(16, 4, 3, 3, fan=36) * unequal.reshape(-1, 1, 1, 1),
        "b0": normal(16) * unequal, "k1": normal(16, 1, 3, 3, fan=9), "b1": normal(16),
        "k2": normal(8, 16, 3, 3, fan=144), "b2": normal(8), "w0": normal(128, 64, fan=128),
        "gamma": gamma, "beta": normal(64), "w1": normal(64, 96, fan=64),
        "w2": normal(96, 48, fan=96), "b3": normal(48),
    }  # fmt: skip


WEIGHTS = weights()
SAMPLES = [RNG.standard_normal((2, 4, 12, 12), dtype=np.float32) for _ in range(4)]
EQUALIZE, SMOOTH, SPLIT, CORRECT = (
    "equalize-layers", "smooth-activations", "split-outliers", "bias-correction",
)  # fmt: skip


def compiled(folder, order, activation):
    recipe = qcompiler.Recipe(nodes=[{"op": "MatMul", "activation": activation}])
    return qcompiler.compile(
        model_of(TEXT, WEIGHTS), "arm-int8", folder / "bundle", recipe=recipe, calibration=SAMPLES,
        pipeline=f"canonicalize,assign-precision,{','.join(order)},"
        "keep-sensitive,insert-qdq,round-to-nearest,fold-qdq",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("order", "activation"),
    [
        ((EQUALIZE, SMOOTH, SPLIT, CORRECT), "static"),
        ((SMOOTH, EQUALIZE, CORRECT, SPLIT), "static"),
        ((EQUALIZE, SPLIT, CORRECT, SMOOTH), "static"),
        ((EQUALIZE, SMOOTH, SPLIT, CORRECT), "dynamic"),
    ],
)
def test_all_six_layers_are_integers(tmp_path, order, activation):
    report = compiled(tmp_path, order, activation)
    layers = [one for one in report.decisions if one.op.startswith(("QConv", "QMatMul"))]
    assert len(layers) == 6, [(one.op, one.why) for one in report.decisions]
    said = " ".join(one.why for one in report.decisions)
    for word in ("bias corrected", "equalized", "smoothed with"):
        assert word in said, said
    exact = run(model_of(TEXT, WEIGHTS), {"x": SAMPLES[0]})[0]
    got = qcompiler.load(report.bundle, native=False).run(None, {"x": SAMPLES[0]})[0]
    assert sqnr(exact, got) > 25


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        ((), "its result leaves the graph"),
        (("node_d",), "kept float by request"),
    ],
)
def test_what_stays_float_behind_integers_says_its_own_reason(tmp_path, keep, why):
    """Not what it lacks once its neighbour is quantized."""
    text = """g (float[n,4,12,12] x) => (float[n,16,10,10] y) {
        c = Conv <pads = [1,1,1,1]> (x, k0, b0) r = Relu (c) d = Conv <group = 16> (r, k1, b1)
        y = Relu (d)
    }"""
    model = model_of(text, WEIGHTS)
    model.graph[2].name = "node_d"
    recipe = qcompiler.Recipe(keep_float=keep)
    report = qcompiler.compile(
        model, "arm-int8", tmp_path / "bundle", recipe=recipe, calibration=SAMPLES
    )
    reasons = {one.node: one.why for one in report.decisions if one.op in ("Conv", "QConv")}
    assert len(reasons) == 2 and why in reasons["node_d"], reasons
    assert "not quantized" not in reasons["node_d"]


def test_an_order_that_would_undo_a_pass_is_refused(tmp_path):
    with pytest.raises(OptionError, match="equalize-layers must run before bias-correction"):
        compiled(tmp_path, (SMOOTH, CORRECT, EQUALIZE, SPLIT), "static")

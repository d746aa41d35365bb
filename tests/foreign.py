"""Models in ONNX Runtime's own quantized ops, and what their lifting must keep."""

import numpy as np
from golden import ORT_HEAD, assert_rewrites, model_of, run

from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.lift_qoperators import LiftQOperators

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (2, 6)).astype(np.uint8)
FLOATS = RNG.standard_normal((2, 6)).astype(np.float32)
IMAGE = RNG.integers(0, 256, (1, 3, 8, 8)).astype(np.uint8)
WEIGHTS = {
    "xs": np.float32(0.03), "xz": np.uint8(120), "ys": np.float32(0.07), "yz": np.uint8(130),
    "w": RNG.integers(-127, 128, (6, 4)).astype(np.int8), "ws": np.float32(0.02),
    "wz": np.int8(0), "wsc": RNG.uniform(0.01, 0.03, 4).astype(np.float32),
    "wzc": np.zeros(4, np.int8), "b": RNG.standard_normal(4).astype(np.float32),
    "bi": RNG.integers(-900, 900, 4).astype(np.int32),
    "k": RNG.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
    "xs1": np.array([0.03], np.float32), "xz1": np.array([120], np.uint8),
}  # fmt: skip


def foreign(text, weights=WEIGHTS):
    model = model_of(text, weights, ORT_HEAD)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    return model


def assert_lifts(model, after, feeds):
    """As text; integers equal but for ties, floats to rounding, fused by ORT and as it stands."""
    expected = run(model, feeds, plainly=True)
    assert_rewrites(LiftQOperators(), model, after, feeds)
    verify(model, Stage.FLOAT, "lift-qoperators")
    for got, want in zip(run(model, feeds, plainly=True), expected, strict=True):
        if want.dtype == np.float32:
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        else:
            assert np.abs(got.astype(int) - want.astype(int)).max() <= 1
            assert (got != want).mean() < 0.05

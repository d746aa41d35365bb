import numpy as np
import pytest
from golden import model_of, run

from qcompiler.passes.fuse_batchnorm import FuseBatchNorm

RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.standard_normal((4, 2, 3, 3), dtype=np.float32),
    "b": RNG.standard_normal(4, dtype=np.float32),
    "gamma": RNG.uniform(0.5, 2, 4).astype(np.float32),
    "beta": RNG.standard_normal(4, dtype=np.float32),
    "mu": RNG.standard_normal(4, dtype=np.float32),
    "var": RNG.uniform(0.5, 2, 4).astype(np.float32),
}
X = {"x": RNG.standard_normal((2, 2, 8, 8), dtype=np.float32)}
NORM = "y = BatchNormalization <epsilon = 0.001> (c, gamma, beta, mu, var)"


def convolution(body, outputs="float[n,4,6,6] y"):
    model = model_of(f"g (float[n,2,8,8] x) => ({outputs}) {{ {body} }}", WEIGHTS)
    next(iter(model.graph)).name = "stem"
    return model


@pytest.mark.parametrize("operands", ["x, w, b", "x, w"])
def test_folds_into_a_convolution(operands):
    model = convolution(f"c = Conv ({operands}) {NORM}")
    expected = run(model, X)[0]
    assert FuseBatchNorm()(model).modified
    assert [(node.op_type, node.name) for node in model.graph] == [("Conv", "stem")]
    np.testing.assert_allclose(run(model, X)[0], expected, rtol=1e-4, atol=1e-4)
    assert not FuseBatchNorm()(model).modified


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (f"c = Conv (x, w, b) {NORM}", "float[n,4,6,6] y, float[n,4,6,6] c"),
        (f"c = Conv (x, w, b) {NORM} z = Relu (c)", "float[n,4,6,6] y, float[n,4,6,6] z"),
        (f"d = Conv (x, w, b) c = Relu (d) {NORM}", "float[n,4,6,6] y"),
    ],
)
def test_leaves_what_others_read_or_what_is_no_convolution(body, outputs):
    assert not FuseBatchNorm()(convolution(body, outputs)).modified

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


def test_leaves_training_mode_alone():
    body = "c = Conv (x, w, b) y, m, v = BatchNormalization <training_mode = 1> "
    assert not FuseBatchNorm()(convolution(body + "(c, gamma, beta, mu, var)")).modified


def test_keeps_a_weight_that_is_an_output_and_names_that_are_taken():
    model = model_of(
        "g (float[n,2,8,8] x, float[4,1,1] stem_bias) => "
        "(float[n,4,6,6] y, float[4,2,3,3] w, float[n,4,6,6] stem_weight) "
        f"{{ c = Conv (x, w, b) {NORM.replace('y =', 'z =')} stem_weight = Neg (z) "
        "y = Mul (z, stem_bias) }",
        WEIGHTS,
    )
    next(iter(model.graph)).name = "stem"
    feeds = X | {"stem_bias": np.ones((4, 1, 1), np.float32)}
    expected = run(model, feeds)
    assert FuseBatchNorm()(model).modified
    for got, want in zip(run(model, feeds), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_parameters_of_another_float_type():
    half = {name: WEIGHTS[name].astype(np.float16) for name in ("w", "b")}
    model = model_of(
        f"g (float16[n,2,8,8] x) => (float16[n,4,6,6] y) {{ c = Conv (x, w, b) {NORM} }}",
        WEIGHTS | half,
    )
    feeds = {"x": X["x"].astype(np.float16)}
    expected = run(model, feeds)[0]
    assert FuseBatchNorm()(model).modified
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=2e-2, atol=5e-2)

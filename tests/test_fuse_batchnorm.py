import numpy as np
import pytest
from golden import assert_step, model_of, run

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


# An epsilon that prints the same in single precision.
EIGHTH = NORM.replace("0.001", "0.125")


def assert_folds(text, outputs, before, after=None):
    """The text before and, where anything may change, after; weights in single precision."""
    model = convolution(text, outputs)
    assert_step("fuse-batchnorm", model, before, after, X, exact=False, floor_db=120)


def test_golden_a_convolution_takes_in_its_normalization():
    assert_folds(
        f"c = Conv <strides = [2, 2]> (x, w) {EIGHTH}",
        "float[n,4,3,3] y",
        """inputs x
        v3 = Conv {'strides': '(2, 2)'} (x, v2)
        y = BatchNormalization {'epsilon': '0.125'} (v3, v4, v5, v6, v7)
        outputs y""",
        """inputs x
        y = Conv {'strides': '(2, 2)'} (x, v2, v3)
        outputs y""",
    )


def test_golden_convolutions_share_weights_and_parameters():
    assert_folds(
        f"c = Conv (x, w, b) {EIGHTH} d = Conv (x, w) "
        "z = BatchNormalization <epsilon = 0.125> (d, gamma, beta, mu, var)",
        "float[n,4,6,6] y, float[n,4,6,6] z",
        """inputs x
        v5 = Conv  (x, v3, v4)
        y = BatchNormalization {'epsilon': '0.125'} (v5, v6, v7, v8, v9)
        v10 = Conv  (x, v3)
        z = BatchNormalization {'epsilon': '0.125'} (v10, v6, v7, v8, v9)
        outputs y, z""",
        """inputs x
        y = Conv  (x, v3, v4)
        z = Conv  (x, v5, v6)
        outputs y, z""",
    )


def test_golden_another_reader_of_the_convolution():
    assert_folds(
        f"c = Conv (x, w, b) {EIGHTH} z = Relu (c)",
        "float[n,4,6,6] y, float[n,4,6,6] z",
        """inputs x
        v5 = Conv  (x, v3, v4)
        y = BatchNormalization {'epsilon': '0.125'} (v5, v6, v7, v8, v9)
        z = Relu  (v5)
        outputs y, z""",
    )


def test_golden_a_convolution_that_leaves_the_graph():
    assert_folds(
        f"c = Conv (x, w, b) {EIGHTH}",
        "float[n,4,6,6] y, float[n,4,6,6] c",
        """inputs x
        c = Conv  (x, v3, v4)
        y = BatchNormalization {'epsilon': '0.125'} (c, v5, v6, v7, v8)
        outputs y, c""",
    )


def test_golden_a_step_between_the_two():
    assert_folds(
        f"d = Conv (x, w, b) c = Relu (d) {EIGHTH}",
        "float[n,4,6,6] y",
        """inputs x
        v4 = Conv  (x, v2, v3)
        v5 = Relu  (v4)
        y = BatchNormalization {'epsilon': '0.125'} (v5, v6, v7, v8, v9)
        outputs y""",
    )


AFFINE = {
    "w": RNG.standard_normal((3, 2, 3, 3), dtype=np.float32),
    "t": RNG.standard_normal((2, 3, 2, 2), dtype=np.float32),
    "b": np.float32([1, 2, 3]), "f": np.float32([[[2]], [[-1]], [[0.5]]]), "c": np.float32([4]),
    "row": np.float32([1, 2, 3, 4, 5, 6]), "none": np.float32(0),
    "g": np.float32([1, 2, 3]), "m": np.float32([0.1, 0.2, 0.3]), "v": np.float32([1, 2, 0.5]),
}  # fmt: skip
AFFINE_HEAD = "g (float[1,2,8,8] x) => (float[a,d,e,h] y) "


@pytest.mark.parametrize("body", [
    "k = Conv (x, w, b) y = Mul (k, f)",
    "k = Conv (x, w) l = Mul (f, k) y = Add (l, c)",
    "k = Conv (x, w) l = Div (k, c) y = Sub (l, f)",
    "k = Conv (x, w) l = Add (k, c) y = BatchNormalization (l, g, b, m, v)",
    "k = Conv (x, w) l = BatchNormalization (k, g, b, m, v) y = Mul (l, f)",
    "k = ConvTranspose (x, t) l = Add (k, f) y = BatchNormalization (l, g, b, m, v)",
])  # fmt: skip
def test_factors_and_offsets_of_channels_are_folded(body):
    model = model_of(AFFINE_HEAD + f"{{ {body} }}", AFFINE)
    feeds = {"x": RNG.standard_normal((1, 2, 8, 8), dtype=np.float32)}
    expected = run(model, feeds)[0]
    assert FuseBatchNorm()(model).modified
    assert len(list(model.graph)) == 1
    assert not FuseBatchNorm()(model).modified
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("body", [
    "k = Conv (x, w) y = Mul (k, row)",  # along another axis
    "k = Conv (x, w) y = Sub (c, k)",
    "k = Conv (x, w) y = Div (k, none)",  # no finite weights
    "k = Conv (x, w) y = Mul (k, k)",
    "k = Conv (x, w) l = Mul (k, f) y = Add (l, k)",  # somebody else reads it
    "k = ConvTranspose <group = 2> (x, t) n = Neg (k) y = Mul (n, c)",
])  # fmt: skip
def test_other_factors_stay(body):
    assert not FuseBatchNorm()(model_of(AFFINE_HEAD + f"{{ {body} }}", AFFINE)).modified

import numpy as np
import pytest
from golden import assert_rewrites, model_of, text_of

from qcompiler.passes.fuse_gelu import FuseGelu

X = {"x": np.linspace(-6, 6, 64, dtype=np.float32).reshape(4, 16)}
CONSTANTS = {
    "root2": np.float32(np.sqrt(2)),
    "root_half": np.float32(np.sqrt(0.5)),
    "one": np.float32(1),
    "half": np.float32(0.5),
}
SIGNATURE = "g (float[4,16] x) => (float[4,16] y) "
AFTER = "inputs x\ny = Gelu  (x)\noutputs y"


@pytest.mark.parametrize(
    "body",
    [
        "d = Div (x, root2) e = Erf (d) a = Add (e, one) h = Mul (half, a) y = Mul (x, h)",
        "d = Mul (x, root_half) e = Erf (d) a = Add (one, e) h = Mul (x, a) y = Mul (h, half)",
        "h = Mul (x, half) d = Div (x, root2) e = Erf (d) a = Add (e, one) y = Mul (h, a)",
    ],
)
def test_fuses_each_spelling(body):
    assert_rewrites(FuseGelu(), model_of(SIGNATURE + f"{{ {body} }}", CONSTANTS), AFTER, X)


@pytest.mark.parametrize(
    "body",
    [
        "d = Div (x, half) e = Erf (d) a = Add (e, one) h = Mul (half, a) y = Mul (x, h)",
        "d = Div (root2, x) e = Erf (d) a = Add (e, one) h = Mul (half, a) y = Mul (x, h)",
        "d = Div (x, root2) e = Erf (d) a = Add (e, half) h = Mul (half, a) y = Mul (x, h)",
        "d = Div (x, root2) e = Erf (d) a = Add (e, one) h = Mul (x, a) y = Mul (x, h)",
    ],
)
def test_leaves_what_only_looks_like_it(body):
    model = model_of(SIGNATURE + f"{{ {body} }}", CONSTANTS)
    before = text_of(model)
    assert not FuseGelu()(model).modified
    assert text_of(model) == before


def test_leaves_pieces_that_leave_the_graph():
    model = model_of(
        "g (float[4,16] x) => (float[4,16] y, float[4,16] e) { d = Div (x, root2) e = Erf (d) "
        "a = Add (e, one) h = Mul (half, a) y = Mul (x, h) }",
        CONSTANTS,
    )
    assert not FuseGelu()(model).modified


def test_keeps_a_scaled_input_that_others_read():
    model = model_of(
        "g (float[4,16] x) => (float[4,16] y, float[4,16] z) { d = Div (x, root2) e = Erf (d) "
        "a = Add (e, one) h = Mul (half, a) y = Mul (x, h) z = Relu (d) }",
        CONSTANTS,
    )
    assert FuseGelu()(model).modified
    assert [node.op_type for node in model.graph] == ["Div", "Gelu", "Relu"]

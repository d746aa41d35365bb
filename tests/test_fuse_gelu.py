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
    "two": np.float32(2),
    "three": np.float32(3),
    "k": np.float32(np.sqrt(2 / np.pi)),
    "c": np.float32(0.044715),
    "off": np.float32(0.05),
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


TANH = "inputs x\ny = Gelu {'approximate': 'tanh'} (x)\noutputs y"
INNER = "p = Pow (x, three) q = Mul (c, p) r = Add (x, q) i = Mul (r, k) t = Tanh (i) "


@pytest.mark.parametrize(
    "body",
    [
        INNER + "a = Add (one, t) h = Mul (half, x) y = Mul (h, a)",
        INNER + "a = Add (t, one) h = Mul (x, a) y = Mul (h, half)",
        INNER + "a = Add (t, one) h = Mul (a, half) y = Mul (h, x)",
        INNER + "h = Div (x, two) a = Add (t, one) y = Mul (a, h)",
        "u = Mul (x, x) p = Mul (u, x) q = Mul (p, c) r = Add (q, x) i = Mul (k, r) t = Tanh (i) "
        "a = Add (t, one) h = Mul (half, x) y = Mul (h, a)",
        "u = Mul (x, x) q = Mul (u, c) r = Add (q, one) s = Mul (x, k) i = Mul (s, r) t = Tanh (i) "
        "a = Add (t, one) h = Mul (half, x) y = Mul (h, a)",
    ],
)
def test_fuses_each_spelling_with_tanh(body):
    assert_rewrites(FuseGelu(), model_of(SIGNATURE + f"{{ {body} }}", CONSTANTS), TANH, X)


@pytest.mark.parametrize(
    "body",
    [
        INNER + "a = Add (half, t) h = Mul (half, x) y = Mul (h, a)",
        INNER + "a = Add (one, t) h = Mul (x, x) y = Mul (h, a)",
        INNER + "a = Add (one, t) y = Mul (half, a)",
        INNER + "a = Add (one, t) n = Neg (x) h = Mul (n, half) y = Mul (h, a)",
        INNER.replace("c, p", "off, p") + "a = Add (one, t) h = Mul (half, x) y = Mul (h, a)",
        INNER.replace("x, three", "x, two") + "a = Add (one, t) h = Mul (half, x) y = Mul (h, a)",
        "t = Tanh (x) a = Add (one, t) h = Mul (half, x) y = Mul (h, a)",
    ],
)
def test_leaves_what_only_looks_like_it_with_tanh(body):
    model = model_of(SIGNATURE + f"{{ {body} }}", CONSTANTS)
    before = text_of(model)
    assert not FuseGelu()(model).modified
    assert text_of(model) == before


@pytest.mark.parametrize("inside", ["t", "a"])
def test_leaves_pieces_with_tanh_that_leave_the_graph(inside):
    signature = f"g (float[4,16] x) => (float[4,16] y, float[4,16] {inside}) "
    body = INNER + "a = Add (one, t) h = Mul (half, x) y = Mul (h, a)"
    assert not FuseGelu()(model_of(f"{signature} {{ {body} }}", CONSTANTS)).modified


def test_keeps_a_cube_that_others_read():
    signature = "g (float[4,16] x) => (float[4,16] y, float[4,16] z) "
    body = INNER + "a = Add (one, t) h = Mul (half, x) y = Mul (h, a) z = Relu (p)"
    model = model_of(f"{signature} {{ {body} }}", CONSTANTS)
    assert FuseGelu()(model).modified
    assert sorted(node.op_type for node in model.graph) == ["Gelu", "Pow", "Relu"]

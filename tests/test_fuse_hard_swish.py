"""fuse-hard-swish: its spellings, and what only looks like one."""

import numpy as np
import pytest
from golden import assert_rewrites, model_of

from qcompiler.passes.fuse_hard_swish import FuseHardSwish

NUMBERS = {
    "three": np.float32([3]), "zero": np.float32(0), "six": np.float32(6),
    "sixth": np.float32(1 / 6), "seven": np.float32(7),
}  # fmt: skip
GATE = "a = Add (x, three) c = Clip (a, zero, six) "
FEEDS = {"x": np.linspace(-5, 5, 64, dtype=np.float32).reshape(4, 16)}
HEAD = "g (float[4,16] x) => (float[4,16] y) "


@pytest.mark.parametrize("body", [
    GATE + "m = Mul (x, c) y = Div (m, six)",
    GATE + "m = Mul (c, x) y = Mul (sixth, m)",
    GATE + "d = Div (c, six) y = Mul (x, d)",
    "a = Add (three, x) c = Clip (a, zero, six) d = Mul (c, sixth) y = Mul (d, x)",
    "c = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x) y = Mul (x, c)",
])  # fmt: skip
def test_every_spelling(body):
    after = "inputs x\ny = HardSwish  (x)\noutputs y"
    assert_rewrites(FuseHardSwish(), model_of(HEAD + f"{{ {body} }}", NUMBERS), after, FEEDS)


@pytest.mark.parametrize("body", [
    GATE + "m = Mul (x, c) y = Div (m, seven)",
    GATE + "m = Mul (x, a) n = Mul (m, c) y = Div (n, six)",
    GATE + "m = Mul (x, c) n = Div (m, six) y = Add (n, c)",  # the gate is read elsewhere
    GATE + "m = Mul (x, c) y = Div (six, m)",
    "a = Add (x, three) c = Clip (a, zero) m = Mul (x, c) y = Div (m, six)",
    "c = HardSigmoid <alpha = 0.2> (x) y = Mul (x, c)",
    "n = Neg (x) c = HardSigmoid <alpha = 0.16666667> (n) y = Mul (x, c)",
])  # fmt: skip
def test_near_misses_stay(body):
    assert not FuseHardSwish()(model_of(HEAD + f"{{ {body} }}", NUMBERS)).modified


def test_pieces_that_leave_the_graph_stay():
    text = "g (float[4,16] x) => (float[4,16] y, float[4,16] c) "
    model = model_of(text + f"{{ {GATE} m = Mul (x, c) y = Div (m, six) }}", NUMBERS)
    assert not FuseHardSwish()(model).modified

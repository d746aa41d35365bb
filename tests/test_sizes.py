"""Sizes that exporters compute from shapes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of

from qcompiler.ir.sizes import is_size_of, sizes_of

NUMBERS = {
    "zero": np.int64(0), "first": np.int64([0]), "one": np.int64([1]), "two": np.int64([2]),
    "four": np.int64([4]), "minus": np.int64(-1), "flat": np.int64([-1]), "five": np.int64([5]),
    "many": np.zeros(100, np.int64), "real": np.float32([2]),
}  # fmt: skip
DIMS = (
    "shape = Shape (x) b0 = Gather (shape, zero) b = Unsqueeze (b0, first) "
    "t = Shape <start = 1, end = 2> (x) "
)


def sizes(body: str) -> list[int | str | None] | None:
    """Of `y`, dimensions by their names."""
    model = model_of(f"g (float[batch,tokens,16] x) => (int64[n] y) {{ {body} }}", NUMBERS)
    found = sizes_of(model.graph.outputs[0])
    return found and [s.value if isinstance(s, ir.SymbolicDim) else s for s in found]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Shape (x)", ["batch", "tokens", 16]),
        ("y = Shape <start = -2> (x)", ["tokens", 16]),
        (f"{DIMS} y = Concat <axis = 0> (b, two, t, four)", ["batch", 2, "tokens", 4]),
        (f"{DIMS} y = Slice (shape, first, two)", ["batch", "tokens"]),
        (f"{DIMS} y = Slice (shape, one, five, first, one)", ["tokens", 16]),
        (f"{DIMS} y = Mul (t, one)", ["tokens"]),
        (f"{DIMS} y = Mul (t, two)", [None]),
        (f"{DIMS} y = Cast <to = 7> (b)", ["batch"]),
        (f"{DIMS} c = Concat <axis = 0> (b, two) r = Reshape (c, flat) ones = ConstantOfShape "
         "<value = int64[1] {1}> (two) m = Mul (ones, minus) e = Equal (r, m) "
         "y = Where (e, ones, r)", ["batch", 2]),
        (f"{DIMS} c = Concat <axis = 0> (b, flat) ones = ConstantOfShape "
         "<value = int64[1] {1}> (two) m = Mul (ones, minus) e = Equal (c, m) "
         "y = Where (e, ones, c)", ["batch", 1]),
        (f"{DIMS} e = Equal (b, two) y = Where (e, one, b)", [None]),
        ("y = ConstantOfShape (two)", [0, 0]),
        ("y = ConstantOfShape (flat)", None),
        (f"{DIMS} y = Neg (b)", None),
        (f"{DIMS} y = Concat <axis = 0> (b, many)", None),
        (f"{DIMS} y = Gather (shape, five)", None),
        ("y = Cast <to = 7> (real)", None),
    ],
)  # fmt: skip
def test_elements_are_followed(body, expected):
    assert sizes(body) == expected


def test_a_size_is_a_dimension_by_its_name():
    name = ir.SymbolicDim("batch")
    assert is_size_of(name, ir.SymbolicDim("batch"))
    assert is_size_of(3, 3)
    for other in (3, ir.SymbolicDim("tokens"), ir.SymbolicDim(None)):
        assert not is_size_of(name, other)
    assert not is_size_of(None, ir.SymbolicDim(None))

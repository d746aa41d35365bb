"""Zero points of torch that are no integers: a subtraction after the DQ, of the same numbers."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of, run
from quantized_torch import Of, Q, both, nodes, torch

RNG = np.random.default_rng(0)


def look_up(i, table, scale, zero):
    floats = Q.dequantize_per_channel(table, scale, zero, 0, 0, 255, torch.uint8)
    return torch.nn.functional.embedding(i, floats)


@pytest.mark.parametrize(
    ("zeros", "ops"),
    [
        (RNG.uniform(90, 140, 16), ["DequantizeLinear", "Gather", "Gather", "Sub"]),
        # Of rows without a negative number: no uint8 is below 0.
        (np.full(16, -20.0), ["DequantizeLinear", "Gather", "Gather", "Sub"]),
        (RNG.integers(90, 140, 16), ["DequantizeLinear", "Gather"]),
    ],
)
def test_zero_points_of_floats(zeros, ops):
    """They are as torch has them; as integers they would be off by up to half a step."""
    table = RNG.integers(0, 256, (16, 8), np.uint8)
    scale = RNG.uniform(0.01, 0.03, 16).astype(np.float32)
    module = Of(look_up, table=table, scale=scale, zero=zeros.astype(np.float32))
    model, pairs = both(module, np.array([[3, 0, 15], [7, 7, 1]]), dynamic=False)
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert [node.op_type for node in model.graph] == ops
    (table,) = nodes(model, "DequantizeLinear")
    assert table.inputs[0].dtype is ir.DataType.UINT8
    assert (len(table.inputs) == 3) == (len(ops) == 2)


@pytest.mark.parametrize(("shape", "stored"), [([4, 1], True), ([4], False), ([1, 4], False)])
def test_what_is_subtracted_along_another_axis_is_no_zero_point(shape, stored):
    from qcompiler.from_torch.float_zero_points import float_zero_points

    constants = {
        "w": RNG.integers(-8, 8, (4, 4)).astype(np.int8), "s": np.full(4, 0.5, np.float32),
        "o": np.array([0, 0.5, 1, 1.5], np.float32).reshape(shape),
    }  # fmt: skip
    text = (
        "g (float[1,4] x) => (float[4,4] y) "
        "{ d = DequantizeLinear <axis = 0> (w, s) e = Sub (d, o) y = Add (e, x) }"
    )
    model = model_of(text, constants)
    feeds = {"x": np.zeros((1, 4), np.float32)}
    expected = run(model, feeds, plainly=True)
    float_zero_points(model)
    assert ("Sub" not in [node.op_type for node in model.graph]) == stored
    np.testing.assert_array_equal(run(model, feeds, plainly=True), expected)

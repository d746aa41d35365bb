"""Static ranges that are empty, nothing but 0, or on one side of it."""

import numpy as np
import pytest
from convolution_chains import FEEDS, prepared
from golden import run, sqnr

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import CalibrationError
from qcompiler.ir.types import TensorStats
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.round_to_nearest import RoundToNearest


@pytest.mark.parametrize(("seen", "why"), [
    ({"a": TensorStats(0.0, 0.0)}, "'a' was nothing but 0"),
    ({"a": None}, "'a' was never there"),
    ({"x": TensorStats(0.0, 0.0)}, "'x' was nothing but 0"),
    ({"x": TensorStats(-1e-30, 1e-29)}, "'x' was 1e-29 at most, below one step of the smallest"),
])  # fmt: skip
def test_a_tensor_of_which_nothing_is_known_keeps_its_ops_float(seen, why):
    model = prepared("t = Sigmoid (a)")

    def observe(_, names):
        stats = {name: seen.get(name, TensorStats(-1.0, 1.0)) for name in names}
        return {name: found for name, found in stats.items() if found is not None}

    expected = run(model, FEEDS)[0]
    InsertQDQ(observe)(model)
    RoundToNearest()(model)
    conv = next(node for node in model.graph if node.op_type == "Conv")
    assert why in decision_of(conv).why
    assert sqnr(np.log(expected), np.log(run(model, FEEDS, plainly=True)[0])) > 20


@pytest.mark.parametrize("ends", [(2.0, 2.0), (0.5, 3.0), (-3.0, -1.0), (-1e-30, 0.0)])
def test_ranges_on_one_side_of_0_hold_it(ends):
    model = prepared("t = Sigmoid (a)")
    InsertQDQ(lambda m, names: {name: TensorStats(*ends) for name in names})(model)
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            scale, zero = (value.const_value.numpy() for value in node.inputs[1:])
            low, high = -float(zero) * scale, (255 - float(zero)) * scale
            assert low <= min(ends[0], 0) + 1e-6
            assert high >= max(ends[1], 0) - 1e-6
    assert np.isfinite(run(model, FEEDS, plainly=True)[0]).all()


def test_says_what_needs_calibration():
    with pytest.raises(CalibrationError, match="needed by Conv_0.*and 1 more|needed by Conv_0"):
        InsertQDQ()(prepared("t = Sigmoid (a)"))

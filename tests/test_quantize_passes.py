"""insert-qdq and round-to-nearest: each alone."""

import numpy as np
import pytest
from calibrated import planned
from golden import assert_rewrites, run

from qcompiler.ir.errors import CalibrationError, ModelError
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.round_to_nearest import RoundToNearest

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 8), dtype=np.float32)
X = {"x": RNG.standard_normal((3, 64), dtype=np.float32)}
MATMUL = "g (float[m,64] x) => (float[m,8] y) { y = MatMul (x, w) }"


def test_insert_makes_one_exact_pair_per_tensor():
    model = planned(
        "g (float[m,64] x) => (float[m,8] y, float[m,8] z) { y = MatMul (x, w) z = MatMul (x, v) }",
        {"w": W, "v": W * 2},
    )
    assert_rewrites(
        InsertQDQ(),
        model,
        """inputs x
        v3 = Abs  (x)
        v5 = ReduceMax {'keepdims': '1'} (v3, v4)
        v8 = Slice  (v5, v6, v7, v4)
        v10 = Max  (v8, v9)
        v12 = Div  (v10, v11)
        v13 = QuantizeLinear {'axis': '-1', 'block_size': '64', 'output_dtype': '3'} (x, v12)
        v14 = DequantizeLinear {'axis': '-1', 'block_size': '64'} (v13, v12)
        y = MatMul  (v14, v15)
        z = MatMul  (v14, v16)
        outputs y, z""",
        X,
        exact=False,
        floor_db=35,
    )
    verify(model, Stage.QDQ, "insert-qdq")


def test_insert_needs_calibration_for_convolutions():
    model = planned(
        "g (float[1,2,8,8] x) => (float[1,4,6,6] y) { t = Conv (x, w) r = Relu (t) y = Neg (r) }",
        {"w": np.ones((4, 2, 3, 3), np.float32)},
    )
    with pytest.raises(CalibrationError, match="needed by node_0: .*--calib.*--keep-float Conv"):
        InsertQDQ()(model)


@pytest.mark.parametrize(
    ("target", "printed"),
    [
        ("x86-int8", "v4 = DequantizeLinear {'axis': '1'} (v2, v3)"),
        ("x86-int4", "v4 = DequantizeLinear {'axis': '0', 'block_size': '32'} (v2, v3)"),
        ("cuda-fp8", "v3 = Cast {'to': '1'} (v2)\nv5 = Mul  (v3, v4)"),
    ],
)
def test_rounds_weights_by_scheme(target, printed):
    last = "v5" if "fp8" in target else "v4"
    assert_rewrites(
        RoundToNearest(),
        planned(MATMUL, {"w": W}, target),
        f"inputs x\n{printed}\ny = MatMul  (x, {last})\noutputs y",
        X,
        exact=False,
        floor_db=15,
    )


def test_rounding_keeps_the_float_weight_for_other_readers():
    model = planned(
        "g (float[m,64] x, int64[1] i) => (float[m,8] y, float[1,8] z) "
        "{ y = MatMul (x, w) z = Gather (w, i) }",
        {"w": W},
    )
    RoundToNearest()(model)
    assert "w" in model.graph.initializers
    np.testing.assert_array_equal(run(model, X | {"i": np.array([3])})[1], W[3:4])


def test_rounding_shares_a_shared_weight():
    model = planned(
        "g (float[m,64] x) => (float[m,8] y, float[m,8] z) "
        "{ y = MatMul (x, w) t = Neg (x) z = MatMul (t, w) }",
        {"w": W},
    )
    RoundToNearest()(model)
    assert [n.op_type for n in model.graph].count("DequantizeLinear") == 1
    assert "w" not in model.graph.initializers


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rounding_refuses_weights_that_are_not_finite(bad):
    weight = W.copy()
    weight[3, 4] = bad
    with pytest.raises(ModelError, match="'w' of 'node_0' holds 1 NaN or Inf.*--keep-float node_0"):
        RoundToNearest()(planned(MATMUL, {"w": weight}))


@pytest.mark.parametrize("shape", [(64, 8), (64, 1)])
@pytest.mark.parametrize("target", ["x86-int8", "x86-int4", "cuda-int4", "cuda-fp8"])
def test_rounding_survives_zero_and_tiny_channels(target, shape):
    weight = np.zeros(shape, np.float32)
    weight[0, 0] = 1e-38
    model = planned(
        f"g (float[m,64] x) => (float[m,{shape[1]}] y) {{ y = MatMul (x, w) }}",
        {"w": weight},
        target,
    )
    RoundToNearest()(model)
    assert np.isfinite(run(model, X)[0]).all()

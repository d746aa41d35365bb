"""Ways of storing and rounding 4-bit weights together with what is done to outliers."""

import numpy as np
import pytest
from golden import model_of, run, sqnr

import qcompiler
from qcompiler.passes.node_rules import NodeRule
from qcompiler.recipe import Recipe

pytestmark = pytest.mark.usefixtures("own_cache")

K, N = 128, 96
RNG = np.random.default_rng(3)
W = (RNG.standard_normal((K, N)) + 0.2).astype(np.float32)
TEXT = f"g (float[m,{K}] x) => (float[m,{N}] y) {{ y = MatMul (x, w) }}"


def rows(seed):
    x = np.random.default_rng(seed).standard_normal((64, K)).astype(np.float32)
    x[:, 5] *= 60  # an outlier that nothing before the product can take
    return {"x": x}


@pytest.mark.parametrize("rounding", ["nearest", "hqq", "awq", "gptq", "awq_gptq"])
@pytest.mark.parametrize(
    ("zero_points", "scales"),
    [("none", "float"), ("none", "int8"), ("integer", "float"), ("float", "float"),
     ("float", "int8")],
)  # fmt: skip
def test_with_split_outliers(rounding, zero_points, scales, tmp_path):
    recipe = Recipe(
        rounding=rounding,
        zero_points=zero_points,
        group_size=32,
        nodes=[NodeRule(op="MatMul", scales=scales)],
    )
    report = qcompiler.compile(
        model_of(TEXT, {"w": W}), "arm-int4", tmp_path / "b", recipe=recipe, timing=False,
        calibration=lambda: (rows(seed) for seed in range(4)),
    )  # fmt: skip
    whys = " ".join(decision.why for decision in report.decisions)
    assert "1 of 128 channels" in whys or "outlier" in whys
    assert rounding == "nearest" or rounding.rpartition("_")[2] in whys
    expected = run(model_of(TEXT, {"w": W}), rows(99))[0]
    # Without it 20 to 22 dB are left, nearest, as the token scales are those of the outlier.
    assert sqnr(expected, qcompiler.load(report.bundle, native=False).run(None, rows(99))[0]) > 28

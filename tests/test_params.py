"""QuantParams: what a Q or DQ says about its integers, read off the graph."""

from __future__ import annotations

import numpy as np
import pytest
from golden import model_of

from qcompiler.ir.params import QuantParams, quant_params
from qcompiler.ir.types import Granularity, PerAxis, PerGroup, PerTensor

F4 = np.float32
VALUES = {
    "s": F4(0.5), "z": np.uint8(7), "s1": np.full(1, 0.5, F4), "z1": np.uint8([7]),
    "t": np.full(8, 0.5, F4), "i": np.ones((4, 8), np.int8), "g": np.full((4, 2), 0.5, F4),
    "s2": F4(0.25),
}  # fmt: skip


def params_of(body: str) -> list[QuantParams | None]:
    model = model_of(f"g (float[4,8] x) => (float[4,8] y) {{ {body} }}", VALUES)
    kinds = ("QuantizeLinear", "DequantizeLinear")
    return [quant_params(node) for node in model.graph if node.op_type in kinds]


@pytest.mark.parametrize(
    ("body", "storage", "granularity", "zeros"),
    [
        ("q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)", "UINT8", PerTensor(), 7),
        ("q = QuantizeLinear (x, s1, z1) y = DequantizeLinear (q, s1, z1)", "UINT8",
         PerTensor(), 7),
        ("q = QuantizeLinear (x, s) y = DequantizeLinear (q, s)", "UINT8", PerTensor(), 0),
        ("q = QuantizeLinear <output_dtype = 3> (x, s) y = DequantizeLinear (q, s)", "INT8",
         PerTensor(), 0),
        ("y = DequantizeLinear <axis = -1> (i, t)", "INT8", PerAxis(-1), 0),
        ("y = DequantizeLinear <axis = 1, block_size = 4> (i, g)", "INT8", PerGroup(1, 4), 0),
    ],
)  # fmt: skip
def test_reads_type_scale_and_zero_point(
    body: str, storage: str, granularity: Granularity, zeros: int
) -> None:
    for params in params_of(body):
        assert params is not None
        assert (params.type.storage.name, params.type.granularity) == (storage, granularity)
        assert params.is_per_tensor == (granularity == PerTensor())
        assert params.scales is not None
        assert params.zeros is not None
        assert (np.unique(params.scales), np.unique(params.zeros)) == ([0.5], [zeros])
        assert params.type.symmetric == (zeros == 0)


def test_a_computed_scale_is_a_value_and_no_array() -> None:
    (params,) = params_of("q, a, b = DynamicQuantizeLinear (x) y = DequantizeLinear (q, a, b)")
    assert params is not None
    assert (params.is_per_tensor, params.scales, params.zeros) == (True, None, None)
    assert not params.type.symmetric


@pytest.mark.parametrize(
    ("second", "equal"),
    [
        ("(q, s, z)", True),
        ("(q, s1, z1)", True),
        ("(q, s2, z)", False),
        ("(q, s)", False),
        ("<axis = 1> (q, t)", False),
    ],
)
def test_equality_is_that_of_the_numbers(second: str, equal: bool) -> None:
    first, other = params_of(f"q = QuantizeLinear (x, s, z) y = DequantizeLinear {second}")
    assert first is not None
    assert other is not None
    assert first.equals(other) == equal


def test_other_nodes_have_none() -> None:
    model = model_of("g (float[4,8] x) => (float[4,8] y) { y = Neg (x) }")
    assert quant_params(model.graph[0]) is None
    assert quant_params(None) is None

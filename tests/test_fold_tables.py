"""fold-qdq on tables that are looked up: as they are stored, or left and why."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of, run

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.fold_qdq import FoldQDQ

RNG = np.random.default_rng(3)
F4 = np.float32
TABLE = {
    "t8": RNG.integers(-128, 128, (20, 8)).astype(np.int8), "ts": F4(0.1), "tz": np.int8(3),
    "tr": RNG.uniform(0.5, 1, 20).astype(F4), "trz": RNG.integers(-9, 9, 20).astype(np.int8),
    "tc": RNG.uniform(0.5, 1, 8).astype(F4), "tg": RNG.uniform(0.5, 1, (20, 2)).astype(F4),
    "tgr": RNG.uniform(0.5, 1, (5, 8)).astype(F4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("dequantize", "gathers"),
    [
        ("DequantizeLinear (t8, ts, tz)", 1),
        ("DequantizeLinear <axis = 1> (t8, tc)", 1),
        ("DequantizeLinear <axis = 0> (t8, tr)", 2),
        ("DequantizeLinear <axis = 0> (t8, tr, trz)", 3),
        ("DequantizeLinear <axis = 1, block_size = 4> (t8, tg)", 2),
    ],
)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 3)])
def test_embeddings_are_looked_up_as_they_are_stored(
    dequantize: str, gathers: int, shape: tuple[int, ...]
) -> None:
    head = f"g (int64[{','.join(map(str, shape))}] i) => (float[{'n,' * len(shape)}m] y) "
    feeds = {"i": RNG.integers(0, 20, shape)}
    subject = model_of(f"{head}{{ f = {dequantize} y = Gather (f, i) }}", TABLE)
    before = run(subject, feeds)[0]
    FoldQDQ()(subject)
    assert [n.op_type for n in subject.graph] == ["Gather"] * gathers + ["DequantizeLinear"]
    np.testing.assert_array_equal(run(subject, feeds)[0], before)


FEW_BITS = {
    name: RNG.integers(*limits, shape).astype(ir.DataType[kind].numpy())
    for name, limits, shape, kind in (
        ("t4", (-8, 8), (20, 40), "INT4"), ("z4", (-8, 8), 20, "INT4"),
        ("u4", (0, 16), (20, 40), "UINT4"), ("v4", (0, 16), (), "UINT4"),
        ("vg", (0, 16), (20, 3), "UINT4"), ("t2", (-2, 2), (20, 40), "INT2"),
        ("e4", (-8, 8), (20, 40), "FLOAT8E4M3FN"),
    )
} | {
    "sg": RNG.uniform(0.5, 1, (20, 3)).astype(F4), "s8": RNG.uniform(0.5, 1, (20, 5)).astype(F4),
    "sc": RNG.uniform(0.5, 1, 40).astype(F4),
}  # fmt: skip


def few_bits(dequantize: str) -> ir.Model:
    head = "g (int64[2,2] i) => (float[2,2,40] y) "
    return model_of(f"{head}{{ f = {dequantize} y = Gather (f, i) }}", TABLE | FEW_BITS)


@pytest.mark.parametrize(
    "dequantize",
    [
        "DequantizeLinear (t4, ts)",
        "DequantizeLinear (u4, ts)",
        "DequantizeLinear (u4, ts, v4)",
        "DequantizeLinear <axis = 0> (t4, tr, z4)",
        "DequantizeLinear <axis = 1, block_size = 16> (t4, sg)",
        "DequantizeLinear <axis = -1, block_size = 16> (u4, sg, vg)",
    ],
)
def test_a_table_of_4_bits_is_looked_up_as_it_is_stored(dequantize: str) -> None:
    subject, feeds = few_bits(dequantize), {"i": np.array([[19, 0], [-1, 7]])}
    before = run(subject, feeds)[0]
    FoldQDQ()(subject)
    verify(subject, Stage.QUANTIZED, "fold-qdq")
    (gather,) = subject.graph
    assert gather.op_type == "GatherBlockQuantized"
    assert "as they are stored" in decision_of(gather).why
    np.testing.assert_array_equal(run(subject, feeds)[0], before)


@pytest.mark.parametrize(
    ("dequantize", "why"),
    [
        ("DequantizeLinear <axis = 1> (t4, sc)", "not per column"),
        ("DequantizeLinear <axis = 1, block_size = 8> (t4, s8)", "power of two from 16, not of 8"),
        ("DequantizeLinear (t2, ts)", "neither ONNX nor ORT has a Gather"),
        ("DequantizeLinear (e4, ts)", "no Gather of floats of 8 bits"),
    ],
)
def test_a_table_of_few_bits_that_ort_does_not_look_up_stays(dequantize: str, why: str) -> None:
    subject = few_bits(dequantize)
    assert not FoldQDQ()(subject).modified
    assert why in decision_of(subject.graph[-1]).why


def test_a_table_that_is_not_looked_up_by_row_stays() -> None:
    head = "g (int64[3] i) => (float[20,3] y) "
    subject = model_of(
        f"{head}{{ f = DequantizeLinear (t8, ts) y = Gather <axis = 1> (f, i) }}", TABLE
    )
    assert not FoldQDQ()(subject).modified
    assert "does not look up rows" in decision_of(subject.graph[-1]).why

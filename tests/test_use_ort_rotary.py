"""use-ort-rotary: rotary embeddings become ONNX Runtime's op where that provably computes them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of, run, sqnr

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.fuse_attention import FuseAttention
from qcompiler.passes.use_ort_rotary import UseOrtRotary
from qcompiler.pipeline import Pipeline
from qcompiler.recipe import Recipe
from qcompiler.targets.catalog import get_target

D = 8
CONSTANTS = {
    "zero": np.int64([0]), "half": np.int64([D // 2]), "end": np.int64([2**62]),
    "last": np.int64([3]), "one": np.int64([1]), "two": np.int64([2]),
    "heads": np.int64([0, 0, 2, D]), "halves": np.int64([D // 2] * 2),
}  # fmt: skip
ANGLES = "pairs = Concat <axis = -1> (a, a) c0 = Cos (pairs) s0 = Sin (pairs) "
SHARED = ANGLES + "c = Unsqueeze (c0, one) s = Unsqueeze (s0, one) "
SLICED = "low = Slice (x, zero, half, last) high = Slice (x, half, end, last, one) "
SPLIT = "low, high = Split <axis = -1> (x, halves) "
TURNED = "minus = Neg (high) turned = Concat <axis = -1> (minus, low) "
SUM = "straight = Mul (x, c) crossed = Mul (turned, s) y = Add (straight, crossed) "
HEADS = f"g (float[b,2,t,{D}] x, float[{{}},t,{D // 2}] a) => (float[b,2,t,{D}] y) "
ROWS = f"g (float[b,t,{2 * D}] r, float[{{}},t,{D // 2}] a) => (float[b,2,t,{D}] y) "
TO_HEADS = "h = Reshape (r, heads) x = Transpose <perm = [0, 2, 1, 3]> (h) "


def graph(text: str) -> ir.Model:
    model = model_of(text, CONSTANTS)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def feeds_of(model: ir.Model, batch: int, tokens: int) -> dict[str, np.ndarray]:
    rng, sizes = np.random.default_rng(0), {"b": batch, "t": tokens}
    return {
        str(value.name): rng.standard_normal(
            [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape or ()]
        ).astype(np.float32)
        for value in model.graph.inputs
    }


def rewritten(text: str) -> list[str]:
    """The ops after the rewrite, which changes no number, of empty tensors neither."""
    model = graph(text)
    sizes = ((2, 5), (1, 1), (3, 1), (0, 5), (2, 0))
    before = [run(model, feeds_of(model, *size), plainly=True)[0] for size in sizes]
    assert UseOrtRotary()(model).modified
    verify(model, Stage.FLOAT, "use-ort-rotary")
    assert not UseOrtRotary()(model).modified
    for size, want in zip(sizes, before, strict=True):
        (got,) = run(model, feeds_of(model, *size), plainly=True)
        assert got.shape == want.shape
        assert not want.size or sqnr(want, got) >= 110
    (found,) = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert "own rotary embedding" in decision_of(found).why
    return [node.op_type for node in model.graph]


TABLES = ["Concat", "Cos", "Sin", "Unsqueeze", "Unsqueeze", "Slice", "Reshape", "Slice", "Reshape"]


@pytest.mark.parametrize("halves", [SLICED, SPLIT], ids=["Slice", "Split"])
def test_heads_are_turned(halves):
    text = f"{HEADS.format(1)} {{ {SHARED}{halves}{TURNED}{SUM} }}"
    assert sorted(rewritten(text)) == sorted([*TABLES, "RotaryEmbedding"])


def test_rows_are_turned_before_their_heads_come_first():
    ops = rewritten(f"{ROWS.format(1)} {{ {SHARED}{TO_HEADS}{SLICED}{TURNED}{SUM} }}")
    assert ops[-3:] == ["RotaryEmbedding", "Reshape", "Transpose"]
    assert ops.count("Transpose") == 1


@pytest.mark.parametrize("start", [HEADS.format("b"), ROWS.format("b")], ids=["heads", "rows"])
def test_each_sequence_of_a_batch_may_have_its_own_positions(start):
    to_heads = TO_HEADS if start.startswith("g (float[b,t") else ""
    ops = rewritten(f"{start} {{ {SHARED}{to_heads}{SLICED}{TURNED}{SUM} }}")
    assert ops.count("Range") == 1


@pytest.mark.parametrize(
    "written",
    [
        "straight = Mul (c, x) crossed = Mul (s, turned) y = Add (straight, crossed) ",
        "straight = Mul (x, c) crossed = Mul (turned, s) y = Add (crossed, straight) ",
    ],
)
def test_operands_come_in_any_order(written):
    ops = rewritten(f"{HEADS.format(1)} {{ {SHARED}{SLICED}{TURNED}{written} }}")
    assert "RotaryEmbedding" in ops


def test_tables_may_be_constants():
    angles = np.arange(3 * D // 2, dtype=np.float32).reshape(1, 1, 3, D // 2)
    both = np.concatenate([angles, angles], -1)
    text = HEADS.replace(",t,", ",3,").format(1) + f"{{ {SLICED}{TURNED}{SUM} }}"
    model = model_of(text, CONSTANTS | {"c": np.cos(both), "s": np.sin(both)})
    feeds = {name: array for name, array in feeds_of(model, 2, 3).items() if name in "xa"}
    (before,) = run(model, feeds, plainly=True)
    assert UseOrtRotary()(model).modified
    assert sqnr(before, run(model, feeds, plainly=True)[0]) >= 110


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(SHARED + SLICED + TURNED.replace("(minus, low)", "(low, minus)") + SUM,
                     id="halves not exchanged"),
        pytest.param(SHARED + SLICED + TURNED.replace("Neg (high)", "Neg (low)") + SUM,
                     id="one half twice"),
        pytest.param(SHARED + SLICED + TURNED.replace("Neg", "Abs") + SUM, id="no sign"),
        pytest.param(SHARED + SLICED.replace("high = Slice (x, half", "high = Slice (x, one")
                     .replace("low = Slice (x, zero, half", "low = Slice (x, zero, one")
                     + TURNED + SUM, id="uneven parts"),
        pytest.param(SHARED.replace("(a, a)", "(a, b2)").replace("pairs", "b2 = Neg (a) pairs", 1)
                     + SLICED + TURNED + SUM, id="angles of their own in each half"),
        pytest.param(SHARED + SLICED + TURNED + SUM.replace("Add", "Sub"), id="a difference"),
        pytest.param(SHARED + SLICED + TURNED + SUM.replace("Mul (x, c)", "Mul (turned, c)"),
                     id="no straight part"),
    ],
)  # fmt: skip
def test_what_is_none_stays(text):
    model = graph(f"{HEADS.format(1)} {{ {text} }}")
    before = [node.op_type for node in model.graph]
    assert not UseOrtRotary()(model).modified
    assert [node.op_type for node in model.graph] == before


def test_numbers_that_the_op_does_not_take_stay():
    text = f"{HEADS.format(1)} {{ {SHARED}{SLICED}{TURNED}{SUM} }}".replace("float[", "double[")
    assert not UseOrtRotary()(graph(text)).modified


def test_angles_of_each_head_stay():
    start = HEADS.format(1).replace(f"[1,t,{D // 2}] a", f"[1,2,t,{D // 2}] a")
    text = f"{start} {{ {SHARED}{SLICED}{TURNED}{SUM} }}".replace(
        "c = Unsqueeze (c0, one)", "c = Identity (c0)"
    )
    text = text.replace("s = Unsqueeze (s0, one)", "s = Identity (s0)")
    assert not UseOrtRotary()(graph(text)).modified


def test_attention_reads_the_heads_where_they_are():
    start = ROWS.format(1).replace(") =>", f", float[b,2,t,{D}] v) =>").replace("] y)", "] z)")
    end = ("kt = Transpose <perm = [0, 1, 3, 2]> (y) raw = MatMul (y, kt) p = Softmax (raw) "
           "z = MatMul (p, v) ")  # fmt: skip
    model = graph(f"{start} {{ {SHARED}{TO_HEADS}{SLICED}{TURNED}{SUM}{end} }}")
    assert UseOrtRotary()(model).modified
    assert FuseAttention(lambda region: None)(model).modified
    ops = [node.op_type for node in model.graph]
    assert ops[-1] == f"Attention_D{D}_sshh"
    assert "Transpose" not in ops


def test_targets_without_figures_keep_them():
    for target, wanted in (("x86-int8", True), ("x86-int4", True), ("cuda-int8", False)):
        steps = {s.name: s.rewrite for s in Pipeline.default(get_target(target), Recipe())}
        assert steps["use-ort-rotary"].wanted is wanted

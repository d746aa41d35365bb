"""fuse-windows: which products read windows where they are, and that the numbers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_step, model_of, run
from test_merge_siblings import rewritten
from test_regions import everything, folded

from qcompiler.ir.decisions import decisions, region_of
from qcompiler.passes.fuse_regions import FuseRegions
from qcompiler.passes.fuse_requantize import FuseRequantize
from qcompiler.passes.fuse_windows import FuseWindows

RNG = np.random.default_rng(9)
FEEDS = {"x": RNG.standard_normal((11, 64), np.float32)}
VALUES = {
    "w": RNG.standard_normal((192, 8), np.float32),
    "zero": np.int64([0]), "one": np.int64([1]), "two": np.int64([2]), "three": np.int64([3]),
    "four": np.int64([4]), "minus_four": np.int64([-4]),
    "minus_two": np.int64([-2]), "minus_one": np.int64([-1]), "end": np.int64([2**63 - 1]),
    "last": np.int64([99]), "pads": np.int64([1, 0, 2, 0]), "ends": np.int64([1, 2]),
    "of_columns": np.int64([1, 1, 2, 1]), "cropping": np.int64([1, 0, -1, 0]),
    "nothing": np.float32(0), "something": np.float32(0.5),
    "v": RNG.standard_normal((64, 8), np.float32),
}  # fmt: skip
HEAD = "g (float[n,64] x) => (float[m,8] y) "
TAPS = """i = Slice (x, zero, minus_two, zero, two) j = Slice (x, one, minus_one, zero, two)
    k = Slice (x, two, end, zero, two) """
JOIN = "windows = Concat <axis = 1> (i, j, k) y = MatMul (windows, w)"


def quantized(text: str, **values: Any) -> ir.Model:
    model = folded(text, **VALUES | values)
    FuseRegions(everything)(model)
    return model


def joined(text: str) -> list[str]:
    return rewritten(quantized(text), FuseWindows(everything), FEEDS)


def test_joins_a_product_with_the_windows_that_it_reads():
    assert joined(f"{HEAD}{{ {TAPS}{JOIN} }}") == ["WindowedQMatMulW8A8_K192_N8_R3_S2"]


def test_steps_of_one_need_not_be_said():
    taps = TAPS.replace(", two)", ")")
    assert joined(f"{HEAD}{{ {taps}{JOIN} }}") == ["WindowedQMatMulW8A8_K192_N8_R3_S1"]


def test_axes_may_count_from_the_end():
    taps = TAPS.replace("zero, two)", "minus_two, two)").replace("one, two)", "minus_two, two)")
    head = "g (float[b,n,64] x) => (float[b,m,8] y) "
    model = quantized(f"{head}{{ {taps}{JOIN.replace('axis = 1', 'axis = -1')} }}")
    FuseWindows(everything)(model)
    assert [node.op_type for node in model.graph] == ["WindowedQMatMulW8A8_K192_N8_R3_S2"]


DILATED = """i = Slice (x, zero, minus_four, zero) j = Slice (x, two, minus_two, zero)
    k = Slice (x, four, end, zero) """


def test_windows_may_have_holes():
    model = quantized(f"{HEAD}{{ {DILATED}{JOIN} }}")
    (op,) = rewritten(model, FuseWindows(everything), FEEDS)
    assert op.startswith("WindowedQMatMulW8A8_K192_N8_R3_S1_")
    assert region_of(model.graph.node(0)).attributes == (("dilations", (2,)),)


def test_windows_with_holes_reach_into_zeros():
    model = quantized(f"{HEAD}{{ p = Pad (x, pads) {DILATED.replace('(x', '(p')}{JOIN} }}")
    assert len(rewritten(model, FuseWindows(everything), FEEDS)) == 1
    attributes = region_of(model.graph.node(0)).attributes
    assert attributes == (("dilations", (2,)), ("pads", (1, 2)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("j = Slice (x, two, minus_two", "j = Slice (x, three, minus_one"),  # two other holes
        ("j = Slice (x, two, minus_two", "j = Slice (x, two, minus_one"),
        ("(i, j, k)", "(k, j, i)"),
    ],
)
def test_holes_are_all_of_one_size(old, new):
    text = f"{HEAD}{{ {DILATED}{JOIN} }}"
    assert old in text
    assert not FuseWindows(everything)(quantized(text.replace(old, new))).modified


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("i = Slice (x, zero, minus_two", "i = Slice (x, zero, minus_one"),  # one row more
        ("j = Slice (x, one,", "j = Slice (x, two,"),  # a hole
        ("k = Slice (x, two, end, zero, two)", "k = Slice (x, two, end, zero, one)"),
        ("k = Slice (x, two, end, zero, two)", "k = Slice (x, two, last, zero, two)"),
        ("k = Slice (x, two, end, zero, two)", "d = Neg (x) k = Slice (d, two, end, zero, two)"),
        ("i = Slice (x, zero, minus_two, zero, two)", "i = RandomNormal <shape = [5, 64]> ()"),
        ("(i, j, k)", "(j, i, k)"),
        ("(i, j, k)", "(k, j, i)"),
    ],
)
def test_leaves_what_are_no_windows(old, new):
    text = f"{HEAD}{{ {TAPS}{JOIN} }}"
    assert old in text
    model = quantized(text.replace(old, new))
    assert not FuseWindows(everything)(model).modified


@pytest.mark.parametrize(
    "pad",
    ["Pad (x, pads)", "Pad (x, pads, nothing)", "Pad (x, ends, , zero)",
     "Pad (x, ends, nothing, minus_two)"],
)  # fmt: skip
def test_zeros_around_the_rows_are_not_stored(pad):
    padded = quantized(f"{HEAD}{{ p = {pad} {TAPS.replace('(x', '(p')}{JOIN} }}")
    (op,) = rewritten(padded, FuseWindows(everything), FEEDS)
    assert op.startswith("WindowedQMatMulW8A8_K192_N8_R3_S2_")
    assert not {*padded.graph.initializers} & {"pads", "ends", "nothing"}


@pytest.mark.parametrize("pads", ["ends", "one_before", "two_behind"])
def test_zeros_between_two_transposes(pads):
    """As convolutions have them; ONNX Runtime may turn what the body of a region does there."""
    taps = TAPS.replace("(x", "(p").replace("zero, two)", "minus_two, two)")
    model = quantized(
        "g (float[b,64,n] x) => (float[b,8,m] y) { q = Transpose <perm = [0, 2, 1]> (x) "
        f"p = Pad (q, {pads}, , minus_two) {taps}"
        "windows = Concat <axis = 2> (i, j, k) z = MatMul (windows, w) "
        "y = Transpose <perm = [0, 2, 1]> (z) }",
        one_before=np.int64([1, 0]),
        two_behind=np.int64([0, 2]),
    )
    feeds = {"x": RNG.standard_normal((2, 64, 11), np.float32)}
    before = run(model, feeds, plainly=True)
    assert FuseWindows(everything)(model).modified
    assert [n.op_type[:8] for n in model.graph] == ["Transpos", "Windowed", "Transpos"]
    np.testing.assert_array_equal(run(model, feeds), before)


@pytest.mark.parametrize(
    "pad",
    ['Pad <mode = "edge"> (x, pads)', "Pad (x, pads, something)", "Pad (x, of_columns)",
     "Pad (x, cropping)", "Pad (x, pads, y0)"],
)  # fmt: skip
def test_windows_are_of_other_pads_results(pad):
    """Pads by what is no zero, of both axes, that cut rows off, and by what is not known."""
    wide = {"w": RNG.standard_normal((198, 8), np.float32)} if "columns" in pad else {}
    text = f"{{ y0 = ReduceMax <keepdims = 0> (x) p = {pad} {TAPS.replace('(x', '(p')}{JOIN} }}"
    padded = quantized(f"{HEAD}{text}", **wide)
    ops = rewritten(padded, FuseWindows(everything), FEEDS)
    assert "Pad" in ops
    assert ops[-1] == f"WindowedQMatMulW8A8_K{198 if wide else 192}_N8_R3_S2"


def test_a_pad_that_others_read_stays_for_them():
    head = "g (float[n,64] x) => (float[m,8] y, float[p,64] z) "
    text = f"{head}{{ p = Pad (x, pads) {TAPS.replace('(x', '(p')}{JOIN} z = Neg (p) }}"
    ops = rewritten(quantized(text), FuseWindows(everything), FEEDS)
    assert sorted(op[:5] for op in ops) == ["Neg", "Pad", "Windo"]


def test_two_products_read_past_one_pad():
    head = "g (float[n,64] x) => (float[m,8] y, float[p,8] z) "
    text = f"{head}{{ p = Pad (x, pads) {TAPS.replace('(x', '(p')}{JOIN} z = MatMul (p, v) }}"
    ops = rewritten(quantized(text), FuseWindows(everything), FEEDS)
    assert sorted(op.split("_", 2)[1] for op in ops) == ["K192", "K64"]


def test_without_a_kernel_for_zeros_they_are_stored():
    model = quantized(f"{HEAD}{{ p = Pad (x, pads) {TAPS.replace('(x', '(p')}{JOIN} }}")
    FuseWindows(lambda region: "zeros" if region.attributes else None)(model)
    assert [n.op_type for n in model.graph] == ["Pad", "WindowedQMatMulW8A8_K192_N8_R3_S2"]


@pytest.mark.parametrize(
    ("made", "region"),
    [
        ("Slice (x, zero, end, zero, two)", "WindowedQMatMulW8A8_K64_N8_R1_S2"),
        ("Pad (x, pads)", "WindowedQMatMulW8A8_K64_N8_R1_S1_#"),
        ("Slice (x, one, end, zero, two)", None),
        ("Slice (x, zero, minus_one, zero, two)", None),
        ("Neg (x)", None),
    ],
)
def test_windows_of_one_row(made, region):
    """Every second row, as in convolutions that others are added to; or with zeros around them."""
    model = quantized(f"{HEAD}{{ p = {made} y = MatMul (p, v) }}")
    if region is None:
        assert not FuseWindows(everything)(model).modified
        return
    (op,) = rewritten(model, FuseWindows(everything), FEEDS)
    assert op == region or (region.endswith("#") and op[:-6] == region[:-1])


@pytest.mark.parametrize("read", ["i", "windows"])
def test_leaves_copies_that_others_read(read):
    head = "g (float[n,64] x) => (float[m,8] y, float[p,q] z) "
    assert not FuseWindows(everything)(
        quantized(f"{head}{{ {TAPS}{JOIN} z = Neg ({read}) }}")
    ).modified


def test_leaves_copies_that_are_added_to_the_result():
    """A layer around which its input goes, as wide as that: the product reads them twice."""
    text = (
        "g (float[11,64] x) => (float[5,192] y) <float[5,192] windows, float[5,192] z> "
        f"{{ {TAPS}{JOIN.replace('y =', 'z =')} y = Add (z, windows) }}"
    )
    model = quantized(text, w=RNG.standard_normal((192, 192), np.float32))
    assert model.graph[-1].op_type == "QMatMulW8A8_K192_N192_AddT"
    assert not FuseWindows(everything)(model).modified


@pytest.mark.parametrize("supported", [True, False])
def test_asks_for_a_kernel_and_says_what_was_done(supported):
    model = quantized(f"{HEAD}{{ {TAPS}{JOIN} }}")
    result = FuseWindows(lambda region: None if supported else "too wide")(model)
    assert result.modified == supported
    whys = [decision.why for decision in decisions(model)]
    assert supported == any("quantizes windows of its input" in why for why in whys)


SLICE = "windows = Slice (x, zero, end, zero, two) "
THREE = f"{TAPS} windows = Concat <axis = 1> (i, j, k) "


@pytest.mark.parametrize(
    ("made", "depth", "width", "takes"),
    [
        (THREE, 192, 384, True),
        (THREE, 192, 385, False),
        (SLICE, 64, 64, True),
        (SLICE, 64, 65, False),
    ],
)
def test_wide_results_are_rather_quantized_than_windows_read(made, depth, width, takes):
    """By the product that makes them, where the next one would read them as integers."""
    shapes = {"w": (depth, width), "e": (width, 8)}
    weights = {name: RNG.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    model = quantized(f"{HEAD}{{ {made} h = MatMul (windows, w) y = MatMul (h, e) }}", **weights)
    before = run(model, FEEDS)
    assert FuseWindows(everything)(model).modified == takes
    assert FuseRequantize(everything)(model).modified != takes
    np.testing.assert_array_equal(run(model, FEEDS), before)
    (why,) = (d.why for d in decisions(model) if f"K{depth}_N{width}" in d.op)
    assert takes == ("quantizes windows of its input, and so not its result" in why)
    assert takes != ("copies of its windows cost less than a result of floats" in why)


def test_results_that_stay_floats_may_be_wide():
    wide = RNG.standard_normal((192, 385), np.float32)
    model = quantized(f"{HEAD}{{ {TAPS}{JOIN} }}".replace("m,8", "m,385"), w=wide)
    assert rewritten(model, FuseWindows(everything), FEEDS) == [
        "WindowedQMatMulW8A8_K192_N385_R3_S2"
    ]


def test_golden_windows_of_every_second_row():
    assert_step(
        "fuse-windows",
        model_of(f"{HEAD}{{ {TAPS}{JOIN} }}", VALUES),
        """inputs x
        v5 = Slice  (x, v2, v3, v2, v4)
        v8 = Slice  (x, v6, v7, v2, v4)
        v10 = Slice  (x, v4, v9, v2, v4)
        v11 = Concat {'axis': '1'} (v5, v8, v10)
        v12, v13 = qcompiler.region.Quantize_K192  (v11)
        y = qcompiler.region.QMatMulW8A8_K192_N8  (v12, v13, v14, v15)
        outputs y""",
        """inputs x
        y = qcompiler.region.WindowedQMatMulW8A8_K192_N8_R3_S2  (x, v2, v3)
        outputs y""",
        FEEDS,
    )

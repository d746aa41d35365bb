"""convert-float16: constants, masks and values that leave the range of float16, or may."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from float16_models import (
    GROWS,
    RNG,
    X,
    converted,
    named,
    on,
    types,
    why,
)
from golden import run

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import CalibrationError
from qcompiler.model_runs import ModelRuns
from qcompiler.passes.convert_float16 import ConvertFloat16
from qcompiler.passes.mask_constants import MASKED
from qcompiler.samples import Samples


@pytest.mark.parametrize(
    ("before", "node", "after"),
    [
        ("s = Mul (x, x) m = ReduceMean (s, last) e = Add (m, tiny) r = Sqrt (e) u = Div (x, r)",
         "m", "a part of RMSNorm"),
        ("s = Mul (x, x) m = ReduceSum (s, last) e = Add (m, tiny) r = Sqrt (e) u = Div (x, r)",
         "m", "ReduceSum of squares"),
        ("s = Pow (x, two) m = ReduceMean (s, last) e = Add (m, tiny) r = Sqrt (e) "
         "i = Reciprocal (r) u = Mul (x, i)", "m", "a part of RMSNorm"),
        ("m = ReduceL2 (x, last) e = Max (m, tiny) u = Div (x, e)", "m", "ReduceL2 of squares"),
        ("c = ReduceMean (x, last) d = Sub (x, c) s = Pow (d, two) m = ReduceMean (s, last) "
         "e = Add (m, tiny) r = Sqrt (e) u = Div (d, r)", "d", "ReduceMean of squares"),
    ],
)  # fmt: skip
def test_squares_are_summed_in_float32_and_do_not_leave_the_range(before, node, after):
    text = f"g (float[m,64] x) => (float[m,64] y) {{ {before} h = Mul (u, gamma) y = Tanh (h) }}"
    feeds = {"x": X["x"] * np.asarray([[3000], [1], [1e-4]], np.float32)}
    model = converted(text, feeds)
    assert after in why(model, node)
    found = types(model)
    assert all(found[name] == "FLOAT" for name in found if name not in "hy")
    assert found["y"] == "FLOAT16"


def test_layer_normalization_keeps_its_epsilon_and_sums_in_float32():
    text = (
        "g (float[m,64] x) => (float[m,64] y) "
        "{ y = LayerNormalization <epsilon = 1e-12> (x, gamma, b) }"
    )
    model = converted(text, {"x": X["x"] * np.asarray([[3000], [1], [1e-2]], np.float32)}, floor=60)
    assert types(model)["y"] == "FLOAT16"


@pytest.mark.parametrize(("low", "half"), [("group", True), ("column", False), (None, True)])
def test_scales_of_groups_below_the_range(low, half):
    """Small ones beside larger ones are noted; a column of nothing else stays in float32."""
    scales = np.full((2, 16), 0.01, np.float32)
    scales[{"group": (0, slice(3)), "column": (slice(2), 3)}.get(low, (0, 0))] = (
        0.01 if low is None else 3.3e-6
    )
    model = named(
        "g (float[m,64] x) => (float[m,16] y) "
        "{ y = qcompiler.QMatMulW4A16 <block_size = 32> (x, iw, scales) }",
        iw=RNG.integers(-8, 8, (64, 16)).astype(ml_dtypes.int4), scales=scales,
    )  # fmt: skip
    dialect.type_results(model.graph[0], "QMatMulW4A16")
    ConvertFloat16()(model)
    (product,) = [node for node in model.graph if node.domain]
    assert (product.inputs[2].dtype is ir.DataType.FLOAT16) == half
    said = "its scales are as small as 3.3e-06, of which float16 has fewer bits"
    assert (said in decision_of(product).why) == (low is not None)
    assert ("float32: its scales" in decision_of(product).why) == (not half)


def test_constants_out_of_range_keep_their_node():
    model = converted(
        "g (float[m,64] x) => (float[m,64] y) { a = Add (x, big) s = Sub (a, big) "
        "d = Add (x, tiny) v = Div (s, small) c = Add (d, v) y = Mul (c, fine) }",
        small=np.asarray([0.5] * 63 + [1e-6], np.float32),
        fine=np.asarray([0.5] * 63 + [1e-6], np.float32),
        floor=40,
    )
    assert "holds 1e+06, float16 ends at 65504" in why(model, "a")
    assert "holds 1e-12, float16 begins at 6.1e-05" in why(model, "d")
    assert "holds 1e-06, float16 begins at 6.1e-05" in why(model, "v")
    assert types(model)["y"] == "FLOAT16"  # a small factor among others costs little


MASK = (
    "g (float[m,64] x, bool[m,64] c) => (float[m,64] y) "
    "{ k = Where (c, zero, low) s = Add (x, k) y = Softmax (s) }"
)


def test_masks_are_brought_into_range():
    seen = RNG.random((3, 64)) < 0.5
    model = converted(MASK, X | {"c": seen})
    assert types(model) == {"k": "FLOAT16", "s": "FLOAT16", "y": "FLOAT16"}
    assert "a mask of -3.4e+38 is -30000 in float16" in why(model, "k")
    assert not run(model, X | {"c": seen})[0][~seen].any()
    masked = run(model, X | {"c": np.zeros((3, 64), bool)})[0]  # a row of nothing but masks
    np.testing.assert_allclose(masked.sum(axis=-1), 1, rtol=1e-2)


@pytest.mark.parametrize("low", [-3.4e38, -65504, -3e4, -1e4])
def test_how_low_a_mask_is_does_not_matter(low):
    feeds = X | {"c": RNG.random((3, 64)) < 0.5}
    model = converted(MASK, feeds, on(feeds), low=np.float32(low))
    assert set(types(model).values()) == {"FLOAT16"}


def test_two_masks_may_meet():
    model = named(
        "g (float[m,64] x, float[m,64] c) => (float[m,64] y) "
        "{ k = Mul (c, low) l = Add (k, k) s = Add (x, l) y = Softmax (s) }"
    )
    ConvertFloat16()(model)
    assert np.isfinite(run(model, X | {"c": np.ones((3, 64), np.float32)})[0]).all()
    # ONNX Runtime's CPU provider adds in float32; a GPU does not.
    assert np.isfinite(np.float16(MASKED) + np.float16(MASKED) + np.float16(-5000))


def test_what_is_read_elsewhere_too_is_no_mask():
    model = converted(MASK.replace("float[m,64] y)", "float[m,64] y, float[m,64] k)"),
                      X | {"c": np.ones((3, 64), bool)}, floor=60)  # fmt: skip
    assert types(model)["k"] == "FLOAT"
    assert "holds 3.4e+38, float16 ends at 65504" in why(model, "k")


def test_a_bound_that_bounds_nothing_is_in_range():
    model = converted(
        "g (float[m,64] x) => (float[m,64] y) { a = Clip (x, zero, most) y = Max (a, low) }",
        most=np.float32(3.4e38),
    )
    assert set(types(model).values()) == {"FLOAT16"}
    bounded = converted(
        "g (float[m,64] x) => (float[m,64] y) { a = Clip (x, zero, big) y = Neg (a) }"
    )
    assert types(bounded) == {"a": "FLOAT", "y": "FLOAT16"}


def test_minus_infinity_stays_what_it_is():
    seen = {"c": RNG.random((3, 64)) < 0.5}
    model = converted(MASK, X | seen, low=np.float32(-np.inf))
    assert why(model, "k") == "holds no weights to quantize"
    assert types(model)["k"] == "FLOAT16"


def test_resize_takes_scales_and_roi_in_float32():
    image = {"x": RNG.standard_normal((1, 1, 4, 4), dtype=np.float32)}
    model = converted(
        'g (float[1,1,4,4] x) => (float[1,1,8,8] y) { a = Tanh (x) y = Resize <mode = "linear"> '
        "(a, roi, scales) }",
        image, roi=np.zeros(8, np.float32), scales=np.asarray([1, 1, 2, 2], np.float32),
    )  # fmt: skip
    (resize,) = [node for node in model.graph if node.op_type == "Resize"]
    kinds = [value.dtype for value in resize.inputs]
    assert kinds == [ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.FLOAT]


def test_drawn_numbers_are_drawn_in_float32():
    model = named(
        "g (float[3,64] x) => (float[3,64] y) { r = RandomNormal <shape = [3, 64], seed = 1.0> () "
        "y = Add (x, r) }"
    )
    ConvertFloat16()(model)
    assert types(model) == {"r": "FLOAT", "y": "FLOAT16"}


def test_values_that_leave_the_range_keep_what_makes_and_reads_them():
    feeds = {"x": np.full((3, 64), 6, np.float32)}
    model = converted(GROWS, feeds, on(feeds))
    assert types(model) == {"e": "FLOAT16", "s": "FLOAT", "l": "FLOAT", "y": "FLOAT16"}
    reached = "reached 1.63e+05 where the model was run, and float16 ends at 65504"
    assert f"float32: its result {reached}" in why(model, "s")
    assert f"float32: s {reached}" in why(model, "l")


def test_values_in_range_keep_nothing_and_infinite_ones_are_no_overflow():
    feeds = {"x": np.full((3, 64), 2, np.float32)}
    assert set(types(converted(GROWS, feeds, on(feeds))).values()) == {"FLOAT16"}
    infinite = GROWS.replace("x)", "x)", 1).replace("Exp (x)", "Where (c, x, low)")
    infinite = infinite.replace("float[m,64] x)", "float[m,64] x, bool[m,64] c)")
    feeds |= {"c": np.zeros((3, 64), bool)}
    model = named(infinite, low=np.float32(-np.inf))
    ConvertFloat16(on(feeds))(model)
    assert set(types(model).values()) == {"FLOAT16"}


def test_headroom():
    feeds = {"x": np.full((3, 64), 4.6, np.float32)}  # e^9.2 is 9897
    for headroom, kept in ((2.0, "FLOAT16"), (8.0, "FLOAT")):
        model = named(GROWS)
        ConvertFloat16(on(feeds), ConvertFloat16.Options(headroom=headroom))(model)
        assert types(model)["s"] == kept


def test_overflow_is_found_in_samples_and_on_made_up_inputs(tmp_path):
    text = "g (float[4,64] x) => (float[4,64] y) { p = Mul (x, k) y = Div (p, k) }"
    model = named(text, k=np.float32(3e4))
    np.savez(tmp_path / "0.npz", x=np.full((4, 64), 50, np.float32))
    for sample in (ModelRuns().sample, ModelRuns.on(Samples(tmp_path)).sample):
        kept = model.clone()
        rewrite = ConvertFloat16(sample)
        rewrite(kept)
        assert types(kept)["p"] == "FLOAT"
        assert not rewrite.notes
    np.savez(tmp_path / "0.npz", x=np.full((4, 64), 0.1, np.float32))
    kept = model.clone()
    ConvertFloat16(ModelRuns.on(Samples(tmp_path)).sample)(kept)
    assert types(kept)["p"] == "FLOAT16"
    np.savez(tmp_path / "0.npz", wrong=np.zeros(3, np.float32))
    with pytest.raises(CalibrationError, match="'x'"):
        ConvertFloat16(ModelRuns.on(Samples(tmp_path)).sample)(model)


def test_says_so_where_nobody_ran_the_model():
    rewrite = ConvertFloat16(lambda model, names: {})
    rewrite(named(GROWS))
    assert rewrite.notes == (
        "float16: nobody saw which values leave its range, because the model was not run; give "
        "samples (--calib)",
    )


def test_says_so_where_bodies_are_not_looked_into():
    text = (
        "g (float[m,64] x, bool c) => (float[m,64] y) { y = If (c) <"
        "then_branch = t () => (float[m,64] s) { s = BRANCH (x) }, "
        "else_branch = e () => (float[m,64] r) { r = Atan (x) }> }"
    )
    feeds = X | {"c": np.array(True)}
    for op, said in (("Exp", True), ("Atan", False)):
        rewrite = ConvertFloat16(on(feeds))
        rewrite(named(text.replace("BRANCH", op)))
        assert ["bodies of If" in note for note in rewrite.notes] == [True] * said


def test_empty_tensors_and_scalars_reach_nothing():
    text = (
        "g (float[m,64] x, float z) => (float[m,64] y) { a = Tanh (x) e = Exp (z) y = Mul (a, e) }"
    )
    feeds = {"x": np.zeros((0, 64), np.float32), "z": np.array(1, np.float32)}
    model = named(text)
    ConvertFloat16(on(feeds))(model)
    assert set(types(model).values()) == {"FLOAT16"}

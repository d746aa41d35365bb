"""convert-float16: what becomes float16, what stays, and that the numbers are good to its bits."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from golden import ORT_HEAD, assert_rewrites, assert_step, model_of, run, sqnr, text_of

import qcompiler
from qcompiler.ir import dialect
from qcompiler.ir.decisions import decision_of, decisions
from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.ir.region import HALF
from qcompiler.ir.stages import Stage, verify
from qcompiler.model_runs import ModelRuns
from qcompiler.numerics import CheckNumerics
from qcompiler.passes.convert_float16 import ConvertFloat16
from qcompiler.passes.float16_types import HALF_OPS
from qcompiler.passes.mask_constants import MASKED
from qcompiler.pipeline import Pipeline
from qcompiler.recipe import Recipe
from qcompiler.samples import Samples
from qcompiler.targets import catalog
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 64), dtype=np.float32) / 8
X = {"x": RNG.standard_normal((3, 64), dtype=np.float32)}
WEIGHTS = {
    "w": W, "b": RNG.standard_normal(64, dtype=np.float32), "two": np.float32(2),
    "half": np.float32(0.5), "tiny": np.float32(1e-12), "big": np.float32(1e6),
    "zero": np.float32(0), "low": np.float32(-3.4e38), "last": np.asarray([-1]),
    "gamma": RNG.uniform(0.5, 1, 64).astype(np.float32),
}  # fmt: skip
FLOOR = 65.0
"""dB: one rounding to float16 is 75, and a few in a row stay above this."""


def named(text, head="", **weights):
    model = model_of(text, WEIGHTS | weights, *([head] if head else []))
    for node in model.graph.all_nodes():
        node.name = node.outputs[0].name
    return model


def converted(text, feeds=X, sample=None, head="", floor=FLOOR, **weights):
    """The model after the pass, which must keep numbers, types and names, and be done then."""
    model = named(text, head, **weights)
    outputs = [(value.name, value.dtype) for value in model.graph.outputs]
    before, rewrite = run(model, feeds), ConvertFloat16(sample)
    rewrite(model)
    verify(model, Stage.QUANTIZED, "convert-float16")
    assert [(value.name, value.dtype) for value in model.graph.outputs] == outputs
    printed = text_of(model, notes=True)
    assert not rewrite(model).modified
    assert text_of(model, notes=True) == printed
    for got, want in zip(run(model, feeds), before, strict=True):
        assert got.dtype == want.dtype
        assert np.isfinite(got).all()
        assert np.array_equal(want, got) or sqnr(want, got) > floor
    return model


def types(model):
    """The float type that each node computes in, by its name; Casts of the pass left out."""
    found = {}
    for node in model.graph.all_nodes():
        values = [v for v in [*node.inputs, *node.outputs] if v is not None]
        kinds = {
            v.dtype.name for v in values if v.dtype in (ir.DataType.FLOAT16, ir.DataType.FLOAT)
        }
        if decision_of(node).why != "between float16 and float32":
            found[node.name] = "+".join(sorted(kinds))
    return found


def why(model, name):
    (node,) = [node for node in model.graph.all_nodes() if node.name == name]
    return decision_of(node).why


def on(feeds):
    """What runs a model on these inputs."""

    def sample(model, names):
        copy = model.clone()
        values = {value.name: value for node in copy.graph for value in node.outputs}
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(values[name] for name in names)
        return dict(zip(names, run(copy, feeds), strict=True))

    return sample


def test_a_layer_between_inputs_and_outputs_that_keep_their_types():
    assert_rewrites(
        ConvertFloat16(),
        named("g (float[m,64] x) => (float[m,64] y) { p = MatMul (x, w) a = Add (p, b) "
              "y = Gelu (a) }"),
        """
        inputs x
        v2 = Cast {'to': '10'} (x)
        # float: between float16 and float32
        v4 = MatMul  (v2, v3)
        v6 = Add  (v4, v5)
        v7 = Gelu  (v6)
        y = Cast {'to': '1'} (v7)
        # float: between float16 and float32
        outputs y
        """,
        X, exact=False, floor_db=FLOOR, notes=True,
    )  # fmt: skip


def test_in_the_pipeline_ops_of_ours_keep_float32_between_casts():
    text = "g (float[m,64] x) => (float[m,64] y) { p = MatMul (x, w) a = Add (p, b) y = Tanh (a) }"
    quantized = """
        inputs x
        v2, v3 = qcompiler.Quantize {'block_size': '64'} (x)
        v6 = qcompiler.QMatMulW8A8  (v2, v3, v4, v5)
        v8 = Add  (v6, v7)
        y = Tanh  (v8)
        outputs y
        """
    after = """
        inputs x
        v2 = Cast {'to': '10'} (x)
        v3 = Cast {'to': '1'} (v2)
        v4, v5 = qcompiler.Quantize {'block_size': '64'} (v3)
        v8 = qcompiler.QMatMulW8A8  (v4, v5, v6, v7)
        v9 = Cast {'to': '10'} (v8)
        v11 = Add  (v9, v10)
        v12 = Tanh  (v11)
        y = Cast {'to': '1'} (v12)
        outputs y
        """
    numbers = {"exact": False, "floor_db": FLOOR}
    assert_step("convert-float16", named(text), quantized, after, X, "cuda-int8", **numbers)
    assert_step("convert-float16", named(text), quantized, None, X, "x86-int8")


def test_weights_in_groups_have_scales_in_float16_too():
    model = assert_step(
        "convert-float16",
        named("g (float[m,64] x) => (float[m,64] y) { y = MatMul (x, w) }"),
        """
        inputs x
        y = qcompiler.QMatMulW4A16 {'block_size': '64'} (x, v2, v3)
        outputs y
        """,
        """
        inputs x
        v2 = Cast {'to': '10'} (x)
        v5 = qcompiler.QMatMulW4A16 {'block_size': '64'} (v2, v3, v4)
        y = Cast {'to': '1'} (v5)
        outputs y
        """,
        target="cuda-int4", exact=False,
    )  # fmt: skip
    node = next(node for node in model.graph if node.op_type == "QMatMulW4A16")
    assert node.inputs[2].dtype is ir.DataType.FLOAT16
    exact = Pipeline.default("cuda-int4", Recipe(float="fp32")).run(
        named("g (float[m,64] x) => (float[m,64] y) { y = MatMul (x, w) }")
    )
    for plainly, floor in ((True, FLOOR), (False, 35.0)):  # fused, ORT rounds activations to 8 bits
        assert sqnr(run(exact, X, plainly=True)[0], run(model, X, plainly=plainly)[0]) > floor


def test_weights_of_4_bits_with_zero_points_are_multiplied_in_float16():
    text = "g (float[m,64] x) => (float[m,64] y) { y = MatMul (x, w) }"
    recipe = Recipe.from_dict({"nodes": [{"match": "*", "zero_points": "integer"}]})
    found = [Pipeline.default("cuda-int4", recipe=recipe).run(named(text))]
    (product,) = [n for n in found[0].graph if n.op_type.startswith("QMatMulW4Z4A16")]
    assert product.outputs[0].dtype is ir.DataType.FLOAT16
    found.append(Pipeline.default(
        "cuda-int4", recipe=Recipe.from_dict(recipe.to_dict() | {"float": "fp32"})
    ).run(named(text)))  # fmt: skip
    half, exact = (run(model, X, plainly=True)[0] for model in found)
    assert sqnr(exact, half) > FLOOR


def test_a_value_is_cast_once_for_all_its_readers():
    model = converted(
        "g (float[m,64] x) => (float[m,64] y, float[m,64] z, float[m,64] h) "
        "{ h = Tanh (x) y = Add (h, big) z = Sub (h, big) }"
    )
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == 2  # of x, and of h, which also leaves the graph
    assert types(model) == {"h": "FLOAT16", "y": "FLOAT", "z": "FLOAT"}


def test_a_constant_that_both_read_stays_in_both_types():
    model = converted(
        "g (float[m,64] x) => (float[m,64] y, float[m,64] z) "
        "{ a = Add (x, b) y = Exp (a) t = Atan (b) z = Add (a, t) }"
    )
    kinds = {value.name: value.dtype for value in model.graph.initializers.values()}
    assert kinds == {"b": ir.DataType.FLOAT, "b_float16": ir.DataType.FLOAT16}


def test_values_may_share_what_says_their_type():
    model = named("g (float[m,64] x) => (float[m,64] y) { a = Add (x, big) y = Exp (a) }")
    first, last = (node.outputs[0] for node in model.graph)
    first.type = last.type
    ConvertFloat16()(model)
    assert first.dtype is ir.DataType.FLOAT
    verify(model, Stage.QUANTIZED, "convert-float16")


def test_branches_read_outer_values_and_return_float32():
    text = (
        "g (float[m,64] x, bool c) => (float[m,64] y) { h = Tanh (x) y = If (c) <"
        "then_branch = t () => (float[m,64] s) { s = Exp (h) }, "
        "else_branch = e () => (float[m,64] r) { k = Mul (h, two) r = Relu (k) }> }"
    )
    for chosen in (True, False):
        model = converted(text, X | {"c": np.array(chosen)})
    assert types(model) == {"h": "FLOAT16", "y": "FLOAT", "s": "FLOAT16", "k": "FLOAT16",
                            "r": "FLOAT16"}  # fmt: skip


def test_a_branch_that_hands_out_an_outer_value():
    model = converted(
        "g (float[m,64] x, bool c) => (float[m,64] y, float[m,64] h) { h = Tanh (x) y = If (c) <"
        "then_branch = t () => (float[m,64] s) { s = Identity (h) }, "
        "else_branch = e () => (float[m,64] r) { r = Neg (h) }> }",
        X | {"c": np.array(True)},
    )
    assert types(model)["s"] == "FLOAT16"


def test_loops_carry_float32():
    model = converted(
        "g (float[3,64] x, int64 n, bool c) => (float[3,64] y) { h = Tanh (x) y = Loop (n, c, h) <"
        "body = t (int64 i, bool on, float[3,64] s) => (bool go, float[3,64] o) "
        "{ go = Identity (on) k = Add (s, h) o = Mul (k, half) }> }",
        X | {"n": np.array(3), "c": np.array(True)},
    )
    assert types(model) | {"go": "", "i": ""} == {
        "h": "FLOAT16", "y": "FLOAT", "k": "FLOAT16", "o": "FLOAT16", "go": "", "i": ""
    }  # fmt: skip


def test_float16_inputs_stay_and_what_the_source_widens_too():
    model = converted(
        "g (float16[m,64] x) => (float16[m,64] y, float[m,64] z) { a = Relu (x) "
        "d = Cast <to = 1> (a) e = Exp (d) l = Log (e) y = Cast <to = 10> (l) "
        "v = Cast <to = 1> (x) z = Tanh (v) }",
        {"x": X["x"].astype(np.float16)},
    )
    assert types(model)["l"] == "FLOAT"
    assert "the source widens it from FLOAT16" in why(model, "d")
    assert types(model)["z"] == "FLOAT16"  # an input may be anything: it says nothing


def test_foreign_ops_and_ops_without_a_kernel_stay():
    model = converted(
        "g (float[m,64] x) => (float[m,64] y, float[m,64] z) "
        "{ a = Relu (x) q = com.microsoft.QuickGelu (a) y = Identity (q) "
        "s = Atan (a) z = Neg (s) }",
        head=ORT_HEAD,
    )
    assert types(model)["a"] == "FLOAT16"
    assert "an op of com.microsoft" in why(model, "q")
    assert "no float16 kernel of Atan on CUDA" in why(model, "s")
    assert types(model)["z"] == "FLOAT16"


@pytest.mark.parametrize(("reduction", "kind"), [("none", "FLOAT16"), ("add", "FLOAT")])
def test_scattered_sums_stay(reduction, kind):
    model = converted(
        f'g (float[3,64] x) => (float[3,64] y) {{ y = ScatterND <reduction = "{reduction}"> '
        "(x, at, row) }",
        at=np.asarray([[1], [2]]), row=np.ones((2, 64), np.float32),
    )  # fmt: skip
    assert types(model)["y"] == kind


def test_ranges_and_what_is_counted_stay():
    model = converted(
        "g (float[m,64] x, int64 n) => (float[m,64] y, int64[k] i) { z = Cast <to = 1> (n) "
        "r = Range (zero, z, two) a = Mul (r, half) s = Sin (a) t = ReduceSum <keepdims = 0> (s) "
        "y = Mul (x, t) f = Floor (a) i = Cast <to = 7> (f) }",
        X | {"n": np.array(5000)},
    )
    found = types(model)
    assert [found[name] for name in "zrasf"] == ["FLOAT"] * 5
    assert found["y"] == "FLOAT16"
    assert "no float16 kernel of Range" in why(model, "r")
    assert "computed from integers" in why(model, "a")


def test_a_lookup_by_integers_is_no_count():
    ids = {"n": np.asarray([3, 5])}
    model = converted("g (int64[2] n) => (float[2,64] y) { t = Gather (w, n) y = Tanh (t) }", ids)
    assert types(model) == {"t": "FLOAT16", "y": "FLOAT16"}


def test_what_integers_are_made_of_stays_up_to_the_next_product():
    model = converted(
        "g (float[m,64] x) => (int64[m,64] y) { p = MatMul (x, w) a = Mul (p, k) f = Floor (a) "
        "y = Cast <to = 7> (f) }",
        {"x": np.zeros((3, 64), np.float32)}, k=np.float32(1000),
    )  # fmt: skip
    assert types(model) == {"p": "FLOAT16", "a": "FLOAT", "f": "FLOAT", "y": "FLOAT"}
    assert "integers are made of it" in why(model, "a")


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


GROWS = (
    "g (float[m,64] x) => (float[m,64] y) { e = Exp (x) s = Mul (e, e) l = Log (s) y = Mul (l, b) }"
)


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


def test_every_op_that_may_be_float16_exists():
    import onnx

    missing = [op for op in HALF_OPS if not onnx.defs.has(op, 21, "")]
    assert not missing


def test_a_model_of_integers_is_left_alone():
    model = named("g (int64[3] x) => (int64[3] y) { y = Neg (x) }")
    assert not ConvertFloat16()(model).modified
    assert not ConvertFloat16(options=ConvertFloat16.Options("fp32"))(named(GROWS)).modified


LAYERS = """g (float[m,64] x, float[m,64] r) => (float[m,64] y, float[m,64] z) {
    n = LayerNormalization (x, gamma, b) p = MatMul (n, w) a = Add (p, b) h = Gelu (a)
    q = MatMul (h, v) s = Add (q, r) t = MatMul (n, u) c = Clip (t, minus, one) y = Add (s, c)
    z = Mul (c, half) }"""
FEEDS = X | {"r": RNG.standard_normal((3, 64), dtype=np.float32)}
MORE = {"v": W[::-1].copy(), "u": W.T.copy(), "minus": np.float32(-1), "one": np.float32(1)}


def only_half(region):
    return None if HALF in region.flags else "computes in float16 alone"


REGIONS = {
    "cuda-int8": ["Quantize_K64_f16", "QMatMulW8A8_K64_N64_f16_AddC_Gelu", "Quantize_K64_f16",
                  "QMatMulW8A8_K64_N64_f16_Clip_#", "QMatMulW8A8_K64_N64_f16_AddT_AddT"],
    "cuda-int4": ["QMatMulW4A16_K64_N64_G64_f16_AddC_Gelu", "QMatMulW4A16_K64_N64_G64_f16_Clip_#",
                  "QMatMulW4A16_K64_N64_G64_f16_AddT_AddT"],
    "cuda-fp8": ["QuantizeFp8_K64_f16", "QMatMulFp8_K64_N64_f16_AddC_Gelu", "QuantizeFp8_K64_f16",
                 "QMatMulFp8_K64_N64_f16_Clip_#", "QMatMulFp8_K64_N64_f16_AddT_AddT"],
}  # fmt: skip


@pytest.mark.parametrize("target", REGIONS)
def test_regions_in_float16_take_the_casts_in(target):
    model = named(LAYERS, **MORE)
    steps = {step.name: step for step in Pipeline.default(target, supports=only_half)}
    names = list(steps)
    first = names.index("convert-float16")
    model = Pipeline([steps[name] for name in names[:first]]).run(model)
    exact = run(model, FEEDS, plainly=True)
    steps["convert-float16"].apply(model, Stage.QUANTIZED)
    half = run(model, FEEDS, plainly=True)
    steps["fuse-regions"].apply(model, Stage.KERNEL)
    ops = [node.op_type for node in model.graph if node.op_type.startswith("Q")]
    assert [f"{op[:-6]}#" if "Clip" in op else op for op in ops] == REGIONS[target]
    assert all(node.inputs[0].graph or node.inputs[0].producer() for node in model.graph)
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == 4  # the two inputs and the two outputs
    fused = run(model, FEEDS, plainly=True)
    for wanted, rounded, got in zip(exact, half, fused, strict=True):
        # Float16 decides ties of int8 otherwise; outlining changes no bit of what ORT computes.
        assert sqnr(wanted, rounded) > (45 if target == "cuda-int8" else 60)
        assert sqnr(rounded, got) > 75
    assert not steps["fuse-regions"].rewrite(model).modified


def test_an_operand_in_float32_ends_a_region_in_float16():
    model = named(
        "g (float[m,64] x) => (float[m,64] y) { p = MatMul (x, w) a = Add (p, big) y = Relu (a) }"
    )
    steps = list(Pipeline.default("cuda-int8", supports=only_half))
    model = Pipeline(steps[: [s.name for s in steps].index("fuse-regions") + 1]).run(model)
    ops = [node.op_type for node in model.graph if node.op_type.startswith("QMatMul")]
    assert ops == ["QMatMulW8A8_K64_N64_f16"]


RMS_NORM = (
    "s = Pow (x, two) m = ReduceMean <keepdims = 1> (s, last) e = Add (m, tiny) r = Sqrt (e) "
    "u = Div (x, r) n = Mul (u, gamma) "
)
BESIDE_FLOAT32 = {
    "inputs and outputs": ("y = MatMul (x, w)", ["Quantize", "QMatMulW8A8"]),
    "one node between": (
        "p = MatMul (x, w) a = Relu (p) y = MatMul (a, v)",
        ["Quantize", "QMatMulW8A8_Relu", "Quantize", "QMatMulW8A8"],
    ),
    "nothing between": (
        "p = MatMul (x, w) y = MatMul (p, v)",
        ["Quantize", "QMatMulW8A8", "Quantize", "QMatMulW8A8"],
    ),
    "a norm": (RMS_NORM + "p = MatMul (n, w) y = Tanh (p)", ["Quantize", "QMatMulW8A8_Tanh"]),
    "read in both types": (
        "p = MatMul (x, w) a = Atan (p) t = Tanh (p) y = Add (a, t)",
        ["Quantize", "QMatMulW8A8"],
    ),
    "an output that is read": (
        "y = MatMul (x, w) a = Atan (y) t = Tanh (y) z = Add (a, t)",
        ["Quantize", "QMatMulW8A8"],
    ),
    "a branch": (
        "c = Constant <value = bool {1}> () h = Tanh (x) y = If (c) <"
        "then_branch = t () => (float[m,64] o) { o = MatMul (h, w) }, "
        "else_branch = f () => (float[m,64] r) { r = Neg (h) }>",
        ["Quantize", "QMatMulW8A8"],
    ),
}


@pytest.mark.parametrize("beside", BESIDE_FLOAT32)
def test_kernels_in_float16_beside_float32(beside):
    body, wanted = BESIDE_FLOAT32[beside]
    outputs = "float[m,64] y, float[m,64] z" if " z = " in body else "float[m,64] y"
    model = named(f"g (float[m,64] x) => ({outputs}) {{ {body} }}", v=W[::-1].copy())
    exact = Pipeline.default("cuda-int8", Recipe(float="fp32")).run(model.clone())
    half = Pipeline.default("cuda-int8").run(model)
    ops = [n.op_type for n in half.graph.all_nodes() if n.domain.startswith("qcompiler.")]
    assert [op.replace("_K64", "").replace("_N64", "").replace("_f16", "") for op in ops] == wanted
    assert all("_f16" in op for op in ops)
    assert [(v.name, v.dtype) for v in half.graph.outputs] == [
        (name, ir.DataType.FLOAT) for name in ("y", "z")[: len(half.graph.outputs)]
    ]
    results = [run(each, X, plainly=True) for each in (exact, half)]
    assert all(sqnr(want, got) > 35 for want, got in zip(*results, strict=True))


@pytest.mark.parametrize("beside", BESIDE_FLOAT32)
def test_casts_beside_float32_are_made_once(beside):
    model = named(f"g (float[m,64] x) => (float[m,64] y) {{ {BESIDE_FLOAT32[beside][0]} }}", v=W)
    steps = list(Pipeline.default("cuda-int8"))
    after = [step.name for step in steps].index("convert-float16") + 1
    model = Pipeline(steps[:after]).run(model)
    printed = text_of(model)
    assert not ConvertFloat16()(model).modified
    assert text_of(model) == printed


def test_what_leaves_the_range_beside_float32_has_no_kernel():
    model = named("g (float[m,64] x) => (float[m,64] y) { p = MatMul (x, w) y = MatMul (p, v) }",
                  w=W * 1e5, v=W * 1e-5)  # fmt: skip
    steps = list(Pipeline.default("cuda-int8", runs=ModelRuns()))
    model = Pipeline(steps[: [s.name for s in steps].index("fuse-regions") + 1]).run(model)
    ops = [node.op_type for node in model.graph if node.domain.startswith("qcompiler")]
    assert ops == ["Quantize_K64_f16", "QMatMulW8A8", "Quantize", "QMatMulW8A8_K64_N64_f16"]
    assert "kernels for GPUs take floats of 16 bits; float32: its result reached" in why(model, "p")


def test_kernels_of_floats_take_no_regions_in_float16():
    model = named(LAYERS, **MORE)
    recipe = Recipe(float="fp16")
    model = Pipeline.default("x86-int8", recipe).run(model)
    regions = [node.op_type for node in model.graph if node.domain.startswith("qcompiler.")]
    assert regions
    assert not [name for name in regions if "f16" in name]
    exact = Pipeline.default("x86-int8").run(named(LAYERS, **MORE))
    for want, got in zip(run(exact, FEEDS), run(model, FEEDS), strict=True):
        assert sqnr(want, got) > 35


def test_norms_are_fused_in_float16():
    model = named(LAYERS, **MORE)
    supports = {True: None, False: "not in float16"}
    model = Pipeline.default(
        "cuda-int8", supports=lambda region: supports[HALF in region.flags]
    ).run(model)  # fmt: skip
    ops = [node.op_type for node in model.graph]
    assert any(op.startswith("LayerNorm_K64_f16") for op in ops)
    assert "LayerNormalization" not in ops


def test_the_default_is_the_targets_and_the_recipe_has_the_last_word(tmp_path):
    for name, target in TARGETS.items():
        wanted = "fp16" if target.arch == "cuda" else "fp32"
        assert target.float_type == wanted
        assert Pipeline.default(name).effective_recipe.float == wanted
    recipe = Recipe.from_dict({"float": "fp32"})
    assert Pipeline.default("cuda-int8", recipe).effective_recipe.float == "fp32"
    text = "g (float[m,64] x) => (float[m,64] y) { p = MatMul (x, w) y = Tanh (p) }"
    found = []
    for folder, given in (("half", None), ("exact", recipe)):
        path = tmp_path / folder
        qcompiler.compile(named(text), "cuda-int8", path, recipe=given, timing=False)
        assert Recipe.read(path).float == ("fp16" if given is None else "fp32")
        casts = [d for d in decisions(ir.load(path / "model.onnx")) if "between float16" in d.why]
        assert bool(casts) == (given is None)
        session = qcompiler.load(path, native=False, providers=["CPUExecutionProvider"])
        found += session.run(None, X)
    half, full = found
    assert half.dtype == full.dtype == np.float32
    assert sqnr(full, half) > FLOOR


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("float16", "float must be fp16 or fp32, not 'float16'; did you mean 'fp16'?"),
        ("half", "did you mean 'fp16'?"),
        ("fp61", "not 'fp61'; did you mean 'fp16'?"),
        ("bf16", "float must be fp16 or fp32, not 'bf16'"),
        (16, "float must be fp16 or fp32, not 16"),
    ],
)
def test_bad_types_are_refused(given, message):
    with pytest.raises(OptionError) as caught:
        Recipe(float=given)
    assert message in str(caught.value)


def test_bad_options_are_refused():
    for headroom in (0.5, float("inf"), float("nan")):
        with pytest.raises(OptionError, match="headroom must be 1 or more"):
            ConvertFloat16.Options(headroom=headroom)
    with pytest.raises(OptionError, match="convert-float16: type is what the recipe calls float"):
        Pipeline.default("cuda-int8", Recipe(passes={"convert-float16": {"type": "fp32"}}))
    with pytest.raises(OptionError, match="float is for convert-float16, which the pipeline"):
        qcompiler.compile(named(GROWS), "cuda-int8", "unused", recipe=Recipe(float="fp16"),
                          pipeline="canonicalize")  # fmt: skip


def test_numerics_are_reported_and_not_held_to_the_last_bit(tmp_path):
    np.savez(tmp_path / "0.npz", **FEEDS)
    watcher = CheckNumerics(tmp_path)
    Pipeline.default("cuda-int4", supports=only_half).run(named(LAYERS, **MORE), watchers=[watcher])
    change = {change.step: change for change in watcher.changes}
    assert change["convert-float16"].rounds
    assert 30 < change["convert-float16"].sqnr < 90
    assert change["fuse-regions"].changed


def test_unsupported_reason_for_x86_names_the_type():
    from qcompiler.ir.region import Region

    region = Region("Quantize", (("K", 64),), flags=(HALF,))
    reason = catalog.unsupported(TARGETS["x86-int8"], region)
    assert reason == "x86 kernels compute in float32"

"""convert-float16: what becomes float16, what stays, and that the numbers are good to its bits."""

import numpy as np
import onnx_ir as ir
import pytest
from float16_models import (
    FEEDS,
    FLOOR,
    GROWS,
    LAYERS,
    MORE,
    X,
    converted,
    named,
    only_half,
    types,
    why,
)
from golden import ORT_HEAD, assert_rewrites, assert_step, run, sqnr

import qcompiler
from qcompiler.ir.decisions import decisions
from qcompiler.ir.errors import OptionError
from qcompiler.ir.region import HALF
from qcompiler.ir.stages import Stage, verify
from qcompiler.numerics import CheckNumerics
from qcompiler.passes.convert_float16 import ConvertFloat16
from qcompiler.passes.float16_types import HALF_OPS
from qcompiler.pipeline import Pipeline
from qcompiler.recipe import Recipe
from qcompiler.targets import catalog
from qcompiler.targets.catalog import TARGETS


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


def test_every_op_that_may_be_float16_exists():
    import onnx

    missing = [op for op in HALF_OPS if not onnx.defs.has(op, 21, "")]
    assert not missing


def test_a_model_of_integers_is_left_alone():
    model = named("g (int64[3] x) => (int64[3] y) { y = Neg (x) }")
    assert not ConvertFloat16()(model).modified
    assert not ConvertFloat16(options=ConvertFloat16.Options("fp32"))(named(GROWS)).modified


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

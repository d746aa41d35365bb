"""widen-floats: models of 16-bit floats are quantized as those of float32 are."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from golden import ORT_HEAD, assert_rewrites, model_of, run, sqnr

import qcompiler
from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import CalibrationError
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.convert_float16 import ConvertFloat16
from qcompiler.passes.widen_floats import WidenFloats
from qcompiler.pipeline import Pipeline
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
HALF, BF = np.float16, ml_dtypes.bfloat16
X = {"x": RNG.standard_normal((3, 128)).astype(HALF)}
LAYER = (
    "g ({0}[m,128] x) => ({0}[m,128] y) {{ n = LayerNormalization(x, gamma, beta) "
    "p = MatMul(n, w) h = Gelu(p) q = MatMul(h, v) y = Add(q, x) }}"
)


def weights(dtype):
    return {
        "gamma": RNG.uniform(0.5, 1, 128).astype(dtype), "beta": np.zeros(128, dtype),
        "w": (RNG.standard_normal((128, 256)) / 11).astype(dtype),
        "v": (RNG.standard_normal((256, 128)) / 16).astype(dtype),
    }  # fmt: skip


def layer(name="float16", dtype=HALF):
    return model_of(LAYER.format(name), weights(dtype))


def widened(text, given=(), head="", **values):
    model = model_of(text, dict(given) | values, *([head] if head else []))
    rewrite = WidenFloats()
    assert rewrite(model).modified
    verify(model, Stage.FLOAT, "widen-floats")
    assert not rewrite(model).modified
    assert rewrite.notes == ()
    return model


def types(model):
    return {node.op_type: node.outputs[0].dtype.name for node in model.graph.all_nodes()}


def test_a_layer_between_inputs_and_outputs_that_keep_their_types():
    rewrite = WidenFloats()
    model = assert_rewrites(
        rewrite,
        model_of("g (float16[m,128] x) => (float16[m,256] y) { p = MatMul(x, w) y = Gelu(p) }",
                 weights(HALF)),
        """
        inputs x
        v2 = Cast {'to': '1'} (x)
        # float: a border between the source's 16-bit floats and float32
        v4 = MatMul  (v2, v3)
        v5 = Gelu  (v4)
        y = Cast {'to': '10'} (v5)
        # float: a border between the source's 16-bit floats and float32
        outputs y
        """,
        X, exact=False, floor_db=60, notes=True,
    )  # fmt: skip
    assert model.graph.initializers["w"].dtype is ir.DataType.FLOAT


def test_it_is_said_what_was_done():
    rewrite = WidenFloats()
    rewrite(layer())
    (note,) = rewrite.notes
    assert note.startswith("the source computes in float16 (5 nodes): widened to float32")
    assert "twice the bytes" in note
    rewrite = WidenFloats(back=True)
    rewrite(layer("bfloat16", BF))
    (note,) = rewrite.notes
    assert note.startswith("the source computes in bfloat16 (5 nodes)")
    assert note.endswith("computes in float16 in the end, where its range allows")


def test_a_model_of_float32_stays():
    model = layer("float", np.float32)
    assert not WidenFloats()(model).modified


def test_casts_at_the_border_of_a_float32_model_stay():
    text = ("g (float16[m,4] x) => (float16[m,4] y) { a = Cast<to=1>(x) b = Relu(a) "
            "y = Cast<to=10>(b) }")  # fmt: skip
    model = model_of(text)
    assert not WidenFloats()(model).modified


def test_casts_between_floats_are_gone():
    text = ("g (float16[m,4] x) => (float[m,4] y) { a = Relu(x) b = Cast<to=1>(a) c = Sqrt(b) "
            "d = Cast<to=16>(c) y = Cast<to=1>(d) }")  # fmt: skip
    model = widened(text)
    assert [node.op_type for node in model.graph] == ["Cast", "Relu", "Sqrt"]
    assert model.graph.outputs[0].name == "y"


def test_a_shared_input_is_cast_once_and_an_output_that_is_read_goes_on_in_float32():
    text = ("g (float16[m,4] x) => (float16[m,4] y, float16[m,4] z, float16[m,4] x) "
            "{ a = Relu(x) y = Add(a, x) z = Neg(y) }")  # fmt: skip
    model = widened(text)
    assert [node.op_type for node in model.graph].count("Cast") == 3
    (negated,) = [node for node in model.graph if node.op_type == "Neg"]
    assert negated.inputs[0].dtype is ir.DataType.FLOAT
    assert [value.dtype.name for value in model.graph.outputs] == ["FLOAT16"] * 3
    feeds = {"x": X["x"][:, :4]}
    for got, want in zip(run(model, feeds), run(model_of(text), feeds), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-6)


def test_attributes_that_name_a_type_follow():
    text = (
        "g (int64[1] n, float16[m,4] x) => (float16[m,4] y) "
        "{ z = ConstantOfShape<value = float16[1] {16896}>(n) i = Cast<to=10>(n) "
        "a = Add(z, i) y = Add(a, x) }"
    )  # fmt: skip (16896 is 3.0)
    model = widened(text)
    assert {v.dtype.name for n in model.graph for v in n.outputs} == {"FLOAT", "FLOAT16"}
    got = run(model, {"n": np.asarray([4]), "x": X["x"][:, :4]})[0]
    np.testing.assert_allclose(got, X["x"][:, :4] + HALF(7), rtol=1e-3)


def test_bodies_follow():
    text = ("g (bool c, float16[m,4] x) => (float16[m,4] y) { a = Relu(x) "
            "y = If(c) <then_branch = t () => (float16[m,4] b) { b = Add(a, k) }, "
            "else_branch = e () => (float16[m,4] d) { d = Neg(a) }> }")  # fmt: skip
    model = widened(text, k=np.ones(4, HALF))
    assert types(model) == {
        "Relu": "FLOAT", "Add": "FLOAT", "Neg": "FLOAT", "If": "FLOAT", "Cast": "FLOAT16"
    }  # fmt: skip
    feeds = {"c": np.asarray(True), "x": X["x"][:, :4]}
    np.testing.assert_allclose(
        run(model, feeds)[0], np.maximum(X["x"][:, :4], 0) + HALF(1), rtol=1e-3
    )


@pytest.mark.parametrize(
    ("products", "level", "dtype"),
    [(False, 0, "FLOAT16"), (False, 4, "FLOAT"), (True, 0, "FLOAT")],
)
def test_products_of_floats_that_stay_onnx_runtimes_keep_their_type(products, level, dtype):
    text = (
        "g (float16[m,32] x) => (float16[m,4] y) { a = Neg(x) "
        "p = com.microsoft.MatMulNBits<K = 32, N = 4, bits = 4, block_size = 32, "
        f"accuracy_level = {level}>(a, w, s) y = Neg(p) }}"
    )
    w = RNG.integers(0, 256, (4, 1, 16)).astype(np.uint8)
    model = model_of(text, {"w": w, "s": np.full(4, 0.5, HALF)}, ORT_HEAD)
    for node in model.graph:
        node.outputs[0].dtype = ir.DataType.FLOAT16  # the tests' shape inference knows no such op
    assert WidenFloats(back=True, products=products)(model).modified
    (product,) = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert product.inputs[2].dtype.name == product.outputs[0].dtype.name == dtype


def test_ops_of_other_domains_keep_their_types():
    text = ("g (float16[m,4] x) => (float16[m,4] y) { a = Relu(x) "
            "b = com.microsoft.BiasGelu(a, bias) c = com.microsoft.FastGelu(b) y = Neg(c) }"
            )  # fmt: skip
    model = model_of(text, {"bias": np.ones(4, HALF)}, ORT_HEAD)
    for node in model.graph:
        node.outputs[0].dtype = ir.DataType.FLOAT16  # the tests' shape inference knows none of them
    before = run(model, {"x": X["x"][:, :4]})[0]
    assert WidenFloats()(model).modified
    assert types(model) | {"Cast": ""} == {
        "Cast": "", "Relu": "FLOAT", "BiasGelu": "FLOAT16", "FastGelu": "FLOAT16", "Neg": "FLOAT"
    }  # fmt: skip
    (fast,) = [node for node in model.graph if node.op_type == "FastGelu"]
    np.testing.assert_allclose(run(model, {"x": X["x"][:, :4]})[0], before, rtol=5e-3, atol=1e-4)
    assert fast.inputs[0].dtype is ir.DataType.FLOAT16


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_quantizes_it(target):
    model = layer()
    before = run(model, X)[0]
    pipeline = Pipeline.default(target).up_to(Stage.QUANTIZED)
    after = pipeline.run(model)
    products = [node.op_type for node in after.graph if node.op_type.startswith("QMatMul")]
    assert len(products) == 2
    assert pipeline.notes[0].startswith("the source computes in float16")
    assert sqnr(before, run(after, X, plainly=True)[0]) > 20


def test_on_cuda_no_cast_is_left():
    model = layer()
    after = Pipeline.default("cuda-int8", supports=lambda region: None).run(model)
    assert "Cast" not in [node.op_type for node in after.graph]


def test_float16_again_goes_on_from_ops_that_kept_it():
    text = ("g (float16[m,4] x) => (float16[m,4] y) { a = Relu(x) "
            "b = com.microsoft.FastGelu(a) c = Neg(b) y = Gelu(c) }")  # fmt: skip
    model = model_of(text, {}, ORT_HEAD)
    for node in model.graph:
        node.outputs[0].dtype = ir.DataType.FLOAT16
    WidenFloats()(model)
    ConvertFloat16()(model)
    assert [node.op_type for node in model.graph] == ["Relu", "FastGelu", "Neg", "Gelu"]
    assert "widens" not in " ".join(decision_of(node).why for node in model.graph)


def test_bfloat16_compiles_and_runs_where_onnx_runtime_has_no_kernels_of_it(tmp_path):
    text = LAYER.format("bfloat16").replace("bfloat16[m,128] x", "int64[m] i")
    text = text.replace("{ n", "{ x = Gather(table, i) n").replace("=> (bfloat16", "=> (float")
    text = text.replace("y = Add(q, x)", "z = Add(q, x) y = Cast<to=1>(z)")
    table = RNG.standard_normal((50, 128)).astype(BF)
    model = model_of(text, weights(BF) | {"table": table})
    report = qcompiler.compile(model, "x86-int8", tmp_path / "b", timing=False)
    assert any("bfloat16" in note for note in report.notes)
    wide = model.clone()
    WidenFloats()(wide)
    feeds = {"i": np.arange(5)}
    got = qcompiler.load(tmp_path / "b").run(None, feeds)[0]
    assert sqnr(run(wide, feeds, plainly=True)[0], got) > 30


def test_samples_of_bfloat16_cannot_be_given(tmp_path):
    (tmp_path / "calib").mkdir()
    np.savez(tmp_path / "calib" / "a.npz", x=X["x"].astype(np.float32))
    model = layer("bfloat16", BF)
    with pytest.raises(CalibrationError, match=r"'x' is bfloat16, which numpy has not: export"):
        qcompiler.compile(
            model, "x86-int8", tmp_path / "b", calibration=tmp_path / "calib", timing=False
        )


@pytest.mark.parametrize(("name", "dtype"), [("float16", HALF), ("bfloat16", BF)])
def test_pieces_of_gelu_are_found_though_their_constants_are_rounded(name, dtype):
    text = (f"g ({name}[m,4] x) => ({name}[m,4] y) {{ d = Div(x, r) e = Erf(d) s = Add(e, one) "
            "t = Mul(x, s) y = Mul(t, half) }")  # fmt: skip
    values = {"r": 2**0.5, "one": 1, "half": 0.5}
    model = model_of(text, {key: np.asarray(value, dtype) for key, value in values.items()})
    model = Pipeline.default("arm-int8").up_to(Stage.FLOAT).run(model)
    assert "Gelu" in [node.op_type for node in model.graph]

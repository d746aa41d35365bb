"""fuse-norms: what is outlined with which outputs, what stays and why; the numbers stay."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import HEAD, assert_rewrites, model_of, text_of
from instruction_sets import needs_kernels
from onnx_ir.passes import common

import qcompiler
from qcompiler.ir.decisions import decision_of
from qcompiler.ir.region import Region
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.fuse_norms import FuseNorms
from qcompiler.passes.fuse_regions import FuseRegions
from qcompiler.targets.catalog import TARGETS, unsupported

RNG = np.random.default_rng(0)
K = 64
WEIGHTS = {
    "gamma": RNG.standard_normal(K, dtype=np.float32),
    "beta": RNG.standard_normal(K, dtype=np.float32),
    "factor": RNG.uniform(0.1, 1, K).astype(np.float32),
    "one": np.ones(1, np.float32),
    "two": np.float32(2),
    "three": np.float32(3),
    "axis": np.array([-1]),
    "first_axis": np.array([0]),
    "eps": np.float32(1e-5),
}
FEEDS = {name: RNG.standard_normal((3, 5, K), dtype=np.float32) for name in "ab"}
A, AB = f"g (float[m,n,{K}] a)", f"g (float[m,n,{K}] a, float[m,n,{K}] b)"
X, Y = f"float[m,n,{K}] x", f"float[m,n,{K}] y"
QS = f"uint8[m,n,{K}] q, float[m,n,1] s"
NORM = "y = LayerNormalization <axis = -1> ({x}, gamma, beta)"
QUANTIZE = f"q, s = qcompiler.Quantize <block_size = {K}> (y)"


def everything(region):
    return None


def outlined(anchor, outputs, **options):
    attributes = (("epsilon", float(np.float32(1e-5))),)
    sizes = (("K", K),)
    return Region(anchor, sizes, outputs=tuple(outputs), attributes=attributes, **options).name


def quantized(text):
    """A model as fuse-regions leaves it."""
    model = model_of(text, WEIGHTS)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    FuseRegions(everything)(model)
    return model


def fused(text, operation, inputs="a", outputs="y", floor_db=0.0):
    """Whether the whole text becomes one op."""
    model = quantized(text)
    known = len(inputs) + len(outputs)
    parameters = [f"v{known}", f"v{known + 1}"] if "LayerNorm" in operation else [f"v{known}"]
    after = f"""
        inputs {", ".join(inputs)}
        {", ".join(outputs)} = qcompiler.region.{operation}  ({", ".join([*inputs, *parameters])})
        outputs {", ".join(outputs)}
    """
    feeds = {name: FEEDS[name] for name in inputs}
    exact = not floor_db
    assert_rewrites(FuseNorms(everything), model, after, feeds, exact=exact, floor_db=floor_db)
    verify(model, Stage.KERNEL, "fuse-norms")
    return model


@pytest.mark.parametrize(
    ("results", "outputs"), [(Y, "y"), (QS, "qs"), (f"{Y}, {QS}", "yqs"), (f"{QS}, {Y}", "yqs")]
)
def test_norm_and_quantize(results, outputs):
    quantize = QUANTIZE if "q" in outputs else ""
    model = quantized(f"{A} => ({results}) {{ {NORM.format(x='a')} {quantize} }}")
    assert FuseNorms(everything)(model).modified
    (node,) = model.graph
    assert node.op_type == outlined("LayerNorm", outputs)
    assert [value.name for value in node.outputs] == list(outputs)
    assert [function.name for function in model.functions.values()] == [node.op_type]
    verify(model, Stage.KERNEL, "fuse-norms")


@pytest.mark.parametrize("outputs", ["y", "qs", "yqs", "xy", "xqs", "xyqs"])
def test_residual(outputs):
    quantize = QUANTIZE if "q" in outputs else ""
    results = ", ".join(text for name, text in (("x", X), ("y", Y), ("q", QS)) if name in outputs)
    text = f"{AB} => ({results}) {{ x = Add (a, b) {NORM.format(x='x')} {quantize} }}"
    fused(text, outlined("AddLayerNorm", outputs), "ab", outputs)


SMOOTHED = {"extras": ("channel",), "flags": ("smoothed",)}
SMOOTH_QUANTIZE = QUANTIZE.replace("(y)", "(z)")


@pytest.mark.parametrize("operands", ["y, factor", "factor, y"])
@pytest.mark.parametrize("outputs", ["yqs", "qs", "xyqs"])
def test_smoothing(operands, outputs):
    results = ", ".join(text for name, text in (("x", X), ("y", Y), ("q", QS)) if name in outputs)
    model = quantized(
        f"{AB} => ({results}) {{ x = Add (a, b) {NORM.format(x='x')} z = Mul ({operands}) "
        f"{SMOOTH_QUANTIZE} }}"
    )
    known = 2 + len(outputs)
    after = f"""
        inputs a, b
        {", ".join(outputs)} = qcompiler.region.{outlined("AddLayerNorm", outputs, **SMOOTHED)}  \
(a, b, v{known}, v{known + 1}, v{known + 2})
        outputs {", ".join(outputs)}
    """
    assert_rewrites(FuseNorms(everything), model, after, FEEDS)
    verify(model, Stage.KERNEL, "fuse-norms")
    assert decision_of(model.graph[0]).why == "fused with a residual and smoothing and Quantize"


@pytest.mark.parametrize(
    "product",
    ["z = Mul (y, two)", "z = Mul (y, y)", "z = Mul (y, b)", "z = Div (y, factor)",
     "z = Mul (y, factor) u = Neg (z)"],
    ids=["a scalar", "a square", "no constant", "a quotient", "read by others"],
)  # fmt: skip
def test_almost_smoothing(product):
    more = f", float[m,n,{K}] u" if "u =" in product else ""
    model = quantized(
        f"{AB} => ({QS}{more}) {{ {NORM.format(x='a')} {product} {SMOOTH_QUANTIZE} }}"
    )
    assert FuseNorms(everything)(model).modified
    assert model.graph[0].op_type == outlined("LayerNorm", "y")


def test_values_that_other_ops_read_are_outputs():
    model = quantized(
        f"{AB} => (float[m,n,{K}] u, float[m,n,{K}] v, {QS}) {{ x = Add (a, b) u = Neg (x) "
        f"{NORM.format(x='x')} v = Abs (y) {QUANTIZE} }}"
    )
    after = f"""
        inputs a, b
        v8, v9, q, s = qcompiler.region.{outlined("AddLayerNorm", "xyqs")}  (a, b, v6, v7)
        u = Neg  (v8)
        v = Abs  (v9)
        outputs u, v, q, s
    """
    assert_rewrites(FuseNorms(everything), model, after, FEEDS)


def test_two_norms_share_a_sum():
    model = quantized(
        f"{AB} => ({Y}, float[m,n,{K}] z) {{ x = Add (a, b) {NORM.format(x='x')} "
        "z = LayerNormalization (x, beta, gamma) }"
    )
    assert FuseNorms(everything)(model).modified
    names = [node.op_type for node in model.graph]
    assert names == [outlined("AddLayerNorm", "xy"), outlined("LayerNorm", "y")]


def test_two_quantizes_share_a_norm():
    model = quantized(
        f"{A} => ({QS}, uint8[m,n,{K}] r, float[m,n,1] t) {{ {NORM.format(x='a')} {QUANTIZE} "
        f"r, t = qcompiler.Quantize <block_size = {K}> (y) }}"
    )
    assert FuseNorms(everything)(model).modified
    assert [n.op_type for n in model.graph] == [outlined("LayerNorm", "yqs"), f"Quantize_K{K}"]
    assert len(model.functions) == 2


def test_a_missing_bias_is_zero():
    model = quantized(f"{A} => ({Y}) {{ y = LayerNormalization (a, gamma) }}")
    assert FuseNorms(everything)(model).modified
    (node,) = model.graph
    assert not node.inputs[2].const_value.numpy().any()


SQUARE = {"pow": "p = Pow (x, two)", "mul": "p = Mul (x, x)"}
ROOT = {
    "reciprocal": "i = Reciprocal (r) u = Mul (x, i)",
    "divide": "u = Div (x, r)",
    "inverse": "i = Div (one, r) u = Mul (i, x)",
}
MEAN = "m = ReduceMean <keepdims = 1> (p, axis)"


@pytest.mark.parametrize("root", ROOT)
@pytest.mark.parametrize("square", SQUARE)
@pytest.mark.parametrize("order", ["gamma, u", "u, gamma"])
def test_rms_norm_in_pieces(square, root, order):
    text = (
        f"{AB} => ({X}, {QS}) {{ x = Add (a, b) {SQUARE[square]} {MEAN} e = Add (m, eps) "
        f"r = Sqrt (e) {ROOT[root]} y = Mul ({order}) {QUANTIZE} }}"
    )
    fused(text, outlined("AddRMSNorm", "xqs"), "ab", "xqs", floor_db=60)


def test_what_nobody_reads_any_more_is_gone(tmp_path, capfd):
    """ONNX Runtime warns of each such constant whenever the bundle is opened."""
    text = (
        f"g (float[m,{K}] x) => (float[m,8] z) {{ {SQUARE['pow']} {MEAN} e = Add (m, eps) "
        f"r = Sqrt (e) {ROOT['inverse']} y = Mul (u, gamma) z = MatMul (y, w) }}"
    )
    weight = RNG.standard_normal((K, 8), dtype=np.float32)
    model = model_of(text, WEIGHTS | {"w": weight})
    report = qcompiler.compile(model, "x86-int8", tmp_path / "b", timing=False)
    assert any("RMSNorm" in decision.op for decision in report.decisions)
    kept = ir.load(report.bundle / "model.onnx").graph.initializers.values()
    assert all(value.uses() for value in kept), [value.name for value in kept if not value.uses()]
    capfd.readouterr()
    qcompiler.load(report.bundle)
    assert capfd.readouterr() == ("", "")


def test_rms_normalization():
    text = f"{A} => ({Y}) {{ y = RMSNormalization <epsilon = 1e-5> (a, gamma) }}"
    model = ir.from_onnx_text(
        HEAD.replace("21", "23") + text, initializers=[ir.tensor(WEIGHTS["gamma"], name="gamma")]
    )
    gamma = model.graph.initializers["gamma"]
    gamma.dtype, gamma.shape = gamma.const_value.dtype, gamma.const_value.shape
    common.ShapeInferencePass(strict_mode=False)(model)
    after = f"inputs a\ny = qcompiler.region.{outlined('RMSNorm', 'y')}  (a, v2)\noutputs y"
    rewrite, feeds = FuseNorms(everything), {"a": FEEDS["a"]}
    assert_rewrites(rewrite, model, after, feeds, exact=False, floor_db=100)


@pytest.mark.parametrize(
    "pieces",
    [
        f"p = Pow (x, three) {MEAN} e = Add (m, eps) r = Sqrt (e) u = Div (x, r)",
        "p = Pow (x, two) m = ReduceMean <keepdims = 1> (p, first_axis) e = Add (m, eps) "
        "r = Sqrt (e) u = Div (x, r)",
        f"p = Pow (x, two) {MEAN} r = Sqrt (m) u = Div (x, r)",
        f"p = Pow (x, two) {MEAN} e = Add (m, eps) r = Sqrt (e) u = Div (b, r)",
        f"p = Pow (x, two) {MEAN} e = Add (m, eps) r = Sqrt (e) i = Div (two, r) u = Mul (i, x)",
    ],
    ids=["cube", "other axis", "no epsilon", "other value", "twice"],
)
def test_almost_rms_norm(pieces):
    model = quantized(f"{AB} => ({Y}) {{ x = Add (a, b) {pieces} y = Mul (u, gamma) }}")
    assert not FuseNorms(everything)(model).modified


@pytest.mark.parametrize("result", "pmeru")
def test_pieces_that_others_read_stay(result):
    shape = f"m,n,{K}" if result in "pu" else "m,n,1"
    model = quantized(
        f"{A} => ({Y}, float[{shape}] o) {{ x = Abs (a) p = Mul (x, x) {MEAN} e = Add (m, eps) "
        f"r = Sqrt (e) u = Div (x, r) y = Mul (u, gamma) o = Neg ({result}) }}"
    )
    assert not FuseNorms(everything)(model).modified


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            f"{A} => ({Y}) {{ y = LayerNormalization <axis = 1> (a, gamma, beta) }}",
            "normalizes more than the last axis",
        ),
        (
            f"{A} => ({Y}) {{ y = LayerNormalization <stash_type = 16> (a, gamma, beta) }}",
            "its statistics are not float32",
        ),
        (
            f"{A} => ({Y}, float[m,n,1] u) {{ y, u = LayerNormalization (a, gamma, beta) }}",
            "its mean or deviation is read",
        ),
        (
            f"{A} => ({Y}) {{ y = LayerNormalization (a, one) }}",
            "one is not one FLOAT per channel",
        ),
        (
            f"g (float[m,{K}] a, float[{K}] b) => (float[m,{K}] y) "
            "{ y = LayerNormalization (a, b) }",
            "b is no constant",
        ),
        (
            "g (float[m,n] a) => (float[m,n] y) { y = LayerNormalization (a, gamma) }",
            "the length of its last axis is not known",
        ),
        (
            f"g (double[m,{K}] a) => (double[m,{K}] y) {{ y = LayerNormalization (a, gamma) }}",
            "DOUBLE is normalized in float",
        ),
    ],
)
def test_stays_with_a_reason(text, reason):
    model = quantized(text)
    before = text_of(model)
    assert not FuseNorms(everything)(model).modified
    assert text_of(model) == before
    (decision,) = map(decision_of, model.graph)
    assert (decision.action, decision.why) == ("float", reason)


def test_an_addition_that_broadcasts_stays():
    model = quantized(
        f"g (float[m,{K}] a, float[1,{K}] b) => (float[m,{K}] y) "
        f"{{ x = Add (a, b) {NORM.format(x='x')} }}"
    )
    assert FuseNorms(everything)(model).modified
    assert [node.op_type for node in model.graph] == ["Add", outlined("LayerNorm", "y")]


def test_takes_the_norm_alone_where_there_is_no_larger_kernel():
    model = quantized(f"{AB} => ({QS}) {{ x = Add (a, b) {NORM.format(x='x')} {QUANTIZE} }}")
    rewrite = FuseNorms(lambda region: "no" if region.anchor.startswith("Add") else None)
    assert rewrite(model).modified
    names = [node.op_type for node in model.graph]
    assert names == ["Add", outlined("LayerNorm", "y"), f"Quantize_K{K}"]


def test_targets_without_the_kernel_say_so():
    model = quantized(f"{A} => ({Y}) {{ {NORM.format(x='a')} }}")
    target = TARGETS["arm-int8"]
    assert not FuseNorms(lambda region: unsupported(target, region))(model).modified
    assert [decision_of(node).why.split("-")[0] for node in model.graph] == ["no arm"]


@needs_kernels
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_so(tmp_path, bad):
    """As in its body; the other rows are untouched."""
    model = model_of(
        "g (float[s,32] x) => (float[s,32] y) { s2 = Pow (x, two) m = ReduceMean (s2, last) "
        "a = Add (m, e) r = Sqrt (a) u = Div (x, r) y = Mul (u, g) }",
        {"two": np.float32(2), "last": np.array([-1]), "e": np.float32(1e-5),
         "g": np.ones(32, np.float32)},
    )  # fmt: skip
    bundle = qcompiler.compile(model, "x86-int8", tmp_path / "b").bundle
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    x[1, 3] = bad
    native = qcompiler.load(bundle).run(None, {"x": x})[0]
    bodies = qcompiler.load(bundle, native=False).run(None, {"x": x})[0]
    np.testing.assert_allclose(native, bodies, rtol=1e-5, atol=1e-6)

"""lower-few-bits: the same values in ORT's layout, in text, in numpy and in stock ORT."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import model_of, run, sqnr, text_of

import qcompiler
from qcompiler.ir.arithmetic import quantize, scale_and_zero_point
from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import OptionError
from qcompiler.ir.types import PerAxis, PerGroup, QuantType
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.lift_qoperators import LiftQOperators
from qcompiler.passes.lower_few_bits import LowerFewBits
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.passes.rounded_weight import RoundedWeight, place_dequantize
from qcompiler.passes.widen_constants import dequantized_constant
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 8), dtype=np.float32)


LIFT = LiftQOperators(LiftQOperators.Options(float_products=True))


def stored_as(type, k, n=24):
    weight = RNG.standard_normal((k, n), dtype=np.float32)
    model = model_of(f"g (float[m,{k}] x) => (float[m,{n}] y) {{ y = MatMul (x, w) }}",
                     {"w": weight})  # fmt: skip
    (node,) = model.graph
    node.name = "product"
    scale, zero = scale_and_zero_point(weight, type)
    stored = quantize(weight, scale, type, zero)
    rounded = RoundedWeight(stored, scale, None if type.symmetric else zero)
    node.replace_input_with(
        1, place_dequantize(model.graph, node.inputs[1], type, rounded).outputs[0]
    )
    del model.graph.initializers["w"]
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [64, 40, 200])
@pytest.mark.parametrize("granularity", [PerGroup(0, 16), PerGroup(0, 32), PerAxis(1)])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_the_same(bits, k, granularity, signed, symmetric):
    if symmetric and not signed:
        pytest.skip("an unsigned type without a zero point holds no negative numbers")
    storage = ir.DataType[f"{'' if signed else 'U'}INT{bits}"]
    model = stored_as(QuantType(storage, granularity=granularity, symmetric=symmetric), k)
    feeds = {"x": RNG.standard_normal((5, k), dtype=np.float32)}
    expected = run(model, feeds, plainly=True)[0]
    floats = dequantized_constant(model.graph[1].inputs[1])
    assert LowerFewBits()(model).modified and not LowerFewBits()(model).modified
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=1e-4, atol=1e-4)
    LIFT(model)
    np.testing.assert_array_equal(dequantized_constant(model.graph[-1].inputs[1]), floats)


@pytest.mark.parametrize("storage", [ir.DataType.INT2, ir.DataType.UINT4, ir.DataType.INT8])
@pytest.mark.parametrize("size", [512, 1024])
def test_groups_larger_than_onnx_runtime_has(storage, size):
    """ORT 1.31 opens blocks of 256 at most, ORT 1.32 larger ones but of 2 bits."""
    symmetric = storage.is_signed()
    model = stored_as(QuantType(storage, granularity=PerGroup(0, size), symmetric=symmetric), 1100)
    feeds = {"x": RNG.standard_normal((5, 1100), dtype=np.float32)}
    floats = dequantized_constant(model.graph[1].inputs[1])
    assert LowerFewBits()(model).modified
    assert model.graph[0].attributes.get_int("block_size") == 128
    np.testing.assert_allclose(run(model, feeds)[0], feeds["x"] @ floats, rtol=1e-3, atol=2e-3)
    LIFT(model)
    np.testing.assert_array_equal(dequantized_constant(model.graph[-1].inputs[1]), floats)


def test_two_bits():
    model = stored_as(QuantType(ir.DataType.INT2, granularity=PerGroup(0, 32)), 64)
    floats = dequantized_constant(model.graph[1].inputs[1])
    LowerFewBits()(model)
    LIFT(model)
    np.testing.assert_array_equal(dequantized_constant(model.graph[-1].inputs[1]), floats)


def test_the_pair_of_the_activations_goes():
    model = model_of("g (float[m,64] x) => (float[m,8] y, float[m,8] z) "
                     "{ y = MatMul (x, w) z = MatMul (x, v) }",
                     {n: RNG.standard_normal((64, 8), dtype=np.float32) for n in "wv"})  # fmt: skip
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    AssignPrecision(TARGETS["x86-int4"].scheme)(model)
    feeds = {"x": RNG.standard_normal((5, 64), dtype=np.float32)}
    for rewrite in (InsertQDQ(), RoundToNearest()):
        rewrite(model)
    expected = run(model, feeds, plainly=True)
    LowerFewBits()(model)
    bits = "'bits': '4', 'block_size': '32'"
    call = f"com.microsoft.MatMulNBits {{'K': '64', 'N': '8', 'accuracy_level': '4', {bits}}}"
    assert text_of(model) == "\n".join([
        "inputs x", f"y = {call} (x, v3, v4)", f"z = {call} (x, v5, v6)", "outputs y, z",
    ])  # fmt: skip
    assert "no Q and DQ" in decision_of(model.graph[0]).why
    for got, want in zip(run(model, feeds), expected, strict=True):
        assert sqnr(want, got) > 30


@pytest.mark.parametrize(
    "type",
    [QuantType(ir.DataType.INT8, granularity=PerGroup(1, 8)), QuantType(ir.DataType.INT8),
     QuantType(ir.DataType.INT4, granularity=PerGroup(0, 24))],
    ids=["groups along N", "per tensor", "no power of two"],
)  # fmt: skip
def test_stays(type):
    model = stored_as(type, 64)
    before = text_of(model)
    assert not LowerFewBits()(model).modified
    assert text_of(model) == before


def model():
    made = model_of("g (float[m,64] x) => (float[m,8] y) { y = MatMul (x, w) }", {"w": W})
    made.graph[0].name = "product"
    return made


@pytest.mark.parametrize("target", ["x86-int4", "cuda-int4"])
def test_emitted_for_stock_ort(tmp_path, target):
    feeds = {"x": RNG.standard_normal((5, 64), dtype=np.float32)}
    expected = run(model(), feeds)[0]
    report = qcompiler.compile(model(), target, tmp_path / "out.onnx", emit="ort")
    assert report.bundle == tmp_path / "out.onnx"
    session = ort.InferenceSession(report.bundle)
    assert sqnr(expected, session.run(None, feeds)[0]) > 17
    (decision,) = [d for d in report.decisions if d.op == "MatMulNBits"]
    assert ("no Q and DQ" in decision.why) == (target == "x86-int4")
    assert not any(
        op in str(ir.load(report.bundle).graph) for op in ("QuantizeLinear", "qcompiler")
    )


def test_emit_is_checked(tmp_path):
    with pytest.raises(
        OptionError, match="emit must be bundle or ort, not 'otr'; did you mean 'ort'"
    ):
        qcompiler.compile(model(), "x86-int4", tmp_path / "a.onnx", emit="otr")
    with pytest.raises(OptionError, match="--emit ort.*x86-int8 has no weights in groups"):
        qcompiler.compile(model(), "x86-int8", tmp_path / "a.onnx", emit="ort")
    with pytest.raises(OptionError, match="emit .* and stop_after .* not both"):
        qcompiler.compile(model(), "x86-int4", tmp_path / "a", emit="ort", stop_after="qdq")
    assert not list(tmp_path.iterdir())

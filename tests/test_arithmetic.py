"""Quantize and dequantize, bit for bit against ONNX's reference evaluator and ONNX Runtime."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx.reference import ReferenceEvaluator
from quantized_types import GRANULARITIES, STORED, D

from qcompiler.installed import version_of
from qcompiler.ir.arithmetic import (
    broadcast_scale,
    dequantize,
    fake_quantize,
    quantize,
    weight_scale,
)
from qcompiler.ir.codebooks import FP4, NF4
from qcompiler.ir.types import PerAxis, PerGroup, PerTensor, QuantType
from qcompiler.session_options import new_session_options


def quantize_and_back(values, scale, zero_point, type):
    """QuantizeLinear and DequantizeLinear as a model; its outputs are floats.

    int2 exists from opset 25 on, FLOAT4E2M1 from 23.
    """
    node, cast = onnx.helper.make_node, int(type.expressed)
    attributes = {}
    match type.granularity:
        case PerAxis(axis):
            attributes = {"axis": axis}
        case PerGroup(axis, size):
            attributes = {"axis": axis, "block_size": size}
    graph = onnx.helper.make_graph(
        [
            node("Cast", ["x"], ["real"], to=cast),
            node("QuantizeLinear", ["real", "s", "z"], ["q"], **attributes),
            node("DequantizeLinear", ["q", "s", "z"], ["back"], **attributes),
            node("Cast", ["q"], ["stored"], to=1),
            node("Cast", ["back"], ["y"], to=1),
        ],
        "pair",
        [onnx.helper.make_tensor_value_info("x", 1, values.shape)],
        [onnx.helper.make_tensor_value_info(name, 1, values.shape) for name in ("stored", "y")],
        [
            onnx.numpy_helper.from_array(scale, "s"),
            onnx.numpy_helper.from_array(zero_point.astype(type.storage.numpy()), "z"),
        ],
    )
    opset = {2: 25, 4: 23}.get(int(type.storage.bitwidth), 21)
    return onnx.helper.make_model(
        graph, ir_version=11, opset_imports=[onnx.helper.make_opsetid("", opset)]
    )


def reference(model, values):
    with np.errstate(all="ignore"):
        stored, back = ReferenceEvaluator(model).run(None, {"x": values.astype(np.float32)})
    return stored, back


def runtime(model, values):
    options = new_session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {"x": values.astype(np.float32)})


def ours(values, scale, zero_point, type):
    stored = quantize(values, scale, type, zero_point)
    assert stored.dtype == type.storage.numpy()
    back = dequantize(stored, scale, type, zero_point)
    assert back.dtype == type.expressed.numpy()
    assert fake_quantize(values, scale, type, zero_point).tobytes() == back.tobytes()
    return stored.astype(np.float32), back.astype(np.float32)


def assert_same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(np.signbit(a), np.signbit(b))


@st.composite
def cases(draw, expressed=D.FLOAT):
    """Values that often lie half way between two steps, scales, zero points and a type."""
    storage = draw(st.sampled_from(STORED))
    symmetric = storage.is_floating_point() or draw(st.booleans())
    type = QuantType(storage, expressed, draw(st.sampled_from(GRANULARITIES)), symmetric)
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))
    scales = type.granularity.scale_shape(shape)
    exact = draw(st.booleans())  # powers of two, so that halves stay halves
    steps = st.integers(-6, 3).map(lambda e: 2.0**e) if exact else st.floats(2**-6, 8, width=32)
    scale = draw(hnp.arrays(np.float32, scales, elements=steps)).astype(expressed.numpy())
    low, high = type.range
    if symmetric:
        zero_point = np.full(scales, type.middle)
    else:
        zero_point = draw(hnp.arrays(np.int64, scales, elements=st.integers(int(low), int(high))))
    span = st.integers(int(-4 * (high - low)), int(4 * (high - low)))
    quarters = draw(hnp.arrays(np.int64, shape, elements=span))
    factor = scale.astype(np.float32).reshape(-1)[0]
    largest = float(ml_dtypes.finfo(expressed.numpy()).max)
    values = np.clip(quarters / 4 * factor, -largest, largest).astype(expressed.numpy())
    return values, scale, zero_point, type


@settings(deadline=None, max_examples=150)
@given(cases())
def test_equals_the_reference_and_onnx_runtime(case):
    values = case[0]
    model = quantize_and_back(*case)
    assert_same(ours(*case), reference(model, values))
    assert_same(ours(*case), runtime(model, values))


@settings(deadline=None, max_examples=100)
@given(st.sampled_from([D.FLOAT16, D.BFLOAT16]).flatmap(cases))
def test_narrow_expressed_types_equal_the_reference(case):
    values, scale, _, type = case
    with np.errstate(over="ignore"):
        quotients = values / broadcast_scale(scale, values.shape, type.granularity)
    assume(np.isfinite(quotients.astype(np.float32)).all())  # see the test of saturation
    assert_same(ours(*case), reference(quantize_and_back(*case), case[0]))


def test_onnx_runtime_rounds_a_quotient_of_float16_once():
    # 126.5 steps in float16, 126.49 before that is rounded: 126 there, 126 or 127 here.
    rng = np.random.default_rng(0)
    values, scale = rng.standard_normal((64, 64)).astype(np.float16), np.asarray(0.0171, np.float16)
    case = values, scale, np.asarray(0), QuantType(D.INT8, D.FLOAT16)
    model = quantize_and_back(*case)
    assert_same(ours(*case), reference(model, values))
    difference = np.abs(ours(*case)[0] - runtime(model, values)[0])
    assert difference.max() == 1
    assert 0 < np.count_nonzero(difference) < 0.02 * values.size


CORNERS = np.asarray([-np.inf, -3e9, -2e9, 2e9, 3e9, np.inf, np.nan], np.float32)


@pytest.mark.parametrize("storage", [D.INT4, D.UINT4, D.INT8, D.UINT8, D.INT16, D.UINT16])
def test_saturation_at_and_beyond_int32(storage):
    case = CORNERS, np.float32(1), np.asarray(1), QuantType(storage)
    model, (low, high) = quantize_and_back(*case), QuantType(storage).range
    stored = ours(*case)[0]
    np.testing.assert_array_equal(stored, [low, low, low, high, high, high, low])
    np.testing.assert_array_equal(stored, runtime(model, CORNERS)[0])
    # The reference wraps at 2**31.
    np.testing.assert_array_equal(
        reference(model, CORNERS)[0], [low, low, low, high, low, low, low]
    )


def test_infinity_saturates_as_in_onnx_runtime_since_1_32():
    """The reference wraps, and so did ONNX Runtime before: int2, and what stands for float16."""
    wraps = version_of(ort.__version__) < version_of("1.32.0")
    for type in (QuantType(D.INT2), QuantType(D.INT8, D.FLOAT16)):
        values = np.asarray([np.inf], type.expressed.numpy())
        case = values, np.asarray(1, values.dtype), np.asarray(0), type
        model, (low, high) = quantize_and_back(*case), type.range
        assert ours(*case)[0] == high
        assert reference(model, values)[0] == low
        assert runtime(model, values)[0] == (low if wraps else high)


@pytest.mark.parametrize("storage", [D.FLOAT8E4M3FN, D.FLOAT8E5M2])
def test_float8_saturates_and_keeps_nan(storage):
    top = QuantType(storage).range[1]
    values = np.asarray([*CORNERS, top * 1.03, top * 1.2, 1e-9, -1e-9], np.float32)
    case = values, np.float32(1), np.asarray(0), QuantType(storage)
    assert_same(ours(*case), reference(quantize_and_back(*case), values))
    assert_same(ours(*case), runtime(quantize_and_back(*case), values))
    np.testing.assert_array_equal(np.abs(ours(*case)[0][[0, 5, 7, 8]]), top)
    assert np.isnan(ours(*case)[0][6])


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-40, 1e-45, np.inf, np.nan, 3e38])
def test_any_scale_divides_as_in_onnx_runtime(scale):
    values = np.asarray([0, 1e-45, -1e-40, 1, -1, 1e30, -1e30], np.float32)
    case = values, np.float32(scale), np.asarray(3), QuantType(D.INT8, symmetric=False)
    assert_same(ours(*case), runtime(quantize_and_back(*case), values))


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1)])
def test_int32_biases_dequantize_as_in_onnx_runtime(granularity):
    rng = np.random.default_rng(0)
    stored = rng.integers(-(2**31), 2**31, (3, 5)).astype(np.int32)
    scale = rng.uniform(0.1, 1, granularity.scale_shape(stored.shape)).astype(np.float32)
    type = QuantType(D.INT32, granularity=granularity)
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (int32[3,5] x, float[n] s) => (float[3,5] y) '
        "{ y = DequantizeLinear <axis = 1> (x, s) }"
    )
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds = {"x": stored, "s": scale if scale.ndim else scale[None]}
    np.testing.assert_array_equal(dequantize(stored, scale, type), session.run(None, feeds)[0])


def test_int32_biases_keep_every_bit():
    biases = np.asarray([2**31 - 1, -(2**31), 16777217, -5], np.float64)
    stored = quantize(biases, np.asarray(1.0), QuantType(D.INT32))
    np.testing.assert_array_equal(stored, biases)
    assert quantize(np.asarray([3e9]), np.asarray(1.0), QuantType(D.INT32))[0] == 2**31 - 1


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float32, 24, elements=st.floats(-8, 8, width=32)), st.floats(0.25, 4))
def test_fp4_is_the_float4_of_the_reference(values, step):
    type = QuantType(D.UINT4, codebook=FP4)
    scale = np.float32(step)
    model = quantize_and_back(values, scale, np.asarray(0), QuantType(D.INT8))
    # Without a zero point, because adding it makes 0.0 of -0.0.
    for node in model.graph.node[1:3]:
        node.input.pop()
    output = onnx.helper.make_attribute("output_dtype", onnx.TensorProto.FLOAT4E2M1)
    model.graph.node[1].attribute.append(output)
    model.opset_import[0].version = 23
    stored = quantize(values, scale, type)
    assert stored.dtype == D.UINT4.numpy()
    entries = np.asarray(FP4.values, np.float32)[stored.astype(int)]
    assert_same((entries, dequantize(stored, scale, type)), reference(model, values))


def test_codebooks_dequantize_as_a_gather_and_a_product():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((8, 10)).astype(np.float32)
    type = QuantType(D.UINT4, granularity=PerGroup(0, 4), codebook=NF4)
    scale = weight_scale(values, type)
    assert scale.shape == (2, 10)
    stored = quantize(values, scale, type)
    wanted = np.asarray(NF4.values, np.float32)[stored.astype(int)] * np.repeat(scale, 4, axis=0)
    np.testing.assert_array_equal(dequantize(stored, scale, type), wanted)
    # The entries farthest apart are 0.304 from each other.
    assert (np.abs(wanted - values) <= np.repeat(scale, 4, axis=0) * 0.153).all()

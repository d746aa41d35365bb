"""What the verifier refuses of Q and DQ does not run, and what ONNX Runtime writes is accepted."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from qcompiler.ir.qdq_rules import qdq_problems
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.session_options import new_session_options

SHAPES = [(), (1,), (6,), (8,), (2,), (1, 1), (6, 8), (2, 8), (6, 2), (6, 1), (1, 8)]
STORED = ["INT8", "UINT8", "INT4", "INT16", "FLOAT8E4M3FN"]

FLOAT = np.float32


def between_casts(op, storage, real, scale, zero, axis=1, block=0):
    """A Q or DQ of whatever types, in a model from float to float."""
    stored, source = ir.DataType[storage], ir.DataType[real]
    output = f", output_dtype = {int(stored)}" if op == "QuantizeLinear" else ""
    return model_of(
        f"g (float[6,8] x) => (float[6,8] y) {{ "
        f"a = Cast <to = {int(source if output else stored)}> (x) "
        f"b = {op} <axis = {axis}, block_size = {block}{output}> "
        f"{'(a, s)' if zero is None else '(a, s, z)'} y = Cast <to = 1> (b) }}",
        {"s": np.ones(scale, source.numpy())}
        | ({} if zero is None else {"z": np.zeros(zero, stored.numpy())}),
    )


def run(model):
    """Raises what ORT has against a model."""
    options = new_session_options()
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    session.run(None, {"x": np.ones((6, 8), FLOAT)})


@pytest.mark.parametrize("op", ["QuantizeLinear", "DequantizeLinear"])
@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("real", ["FLOAT", "FLOAT16"])
@pytest.mark.parametrize(
    ("scale", "axis", "block"), [((), 1, 0), ((1,), 7, 0), ((6,), 0, 0), ((2, 8), -2, 4)]
)
def test_valid_pairs_run_and_are_accepted(op, storage, real, scale, axis, block):
    model = between_casts(op, storage, real, scale, scale, axis, block)
    run(model)
    assert not list(qdq_problems(model))


@settings(deadline=None, max_examples=250)
@given(
    st.sampled_from(["QuantizeLinear", "DequantizeLinear"]),
    st.sampled_from(STORED),
    st.sampled_from(["FLOAT", "FLOAT16", "DOUBLE"]),
    st.tuples(st.sampled_from(SHAPES), st.sampled_from(SHAPES), st.booleans(), st.booleans()),
    st.integers(-3, 3),
    st.sampled_from([0, 0, 1, 3, 4, 6, 8, 9]),
)
def test_what_is_refused_does_not_run(op, storage, real, shapes, axis, block):
    scale, other, same, present = shapes
    zero = (scale if same else other) if present else None
    model = between_casts(op, storage, real, scale, zero, axis, block)
    if list(qdq_problems(model)):
        with pytest.raises(Exception, match=r"\[ONNXRuntimeError\]"):
            run(model)


class Samples(CalibrationDataReader):
    def __init__(self):
        rng = np.random.default_rng(0)
        shape = (2, 3, 8, 8)
        self.feeds = iter([{"x": rng.standard_normal(shape).astype(FLOAT)} for _ in range(2)])

    def get_next(self):
        return next(self.feeds, None)


@pytest.fixture(scope="module")
def convolution(tmp_path_factory):
    """A small network in a file: Conv, Relu, GlobalAveragePool, MatMul, Add."""
    rng = np.random.default_rng(0)
    model = model_of(
        "g (float[n,3,8,8] x) => (float[n,5] y) { c = Conv <pads = [1,1,1,1]> (x, k, b) "
        "r = Relu (c) p = GlobalAveragePool (r) f = Flatten (p) m = MatMul (f, w) y = Add (m, d) }",
        {
            "k": rng.standard_normal((16, 3, 3, 3), dtype=FLOAT),
            "b": rng.standard_normal(16, dtype=FLOAT),
            "w": rng.standard_normal((16, 5), dtype=FLOAT),
            "d": rng.standard_normal(5, dtype=FLOAT),
        },
    )
    path = tmp_path_factory.mktemp("convolution") / "float.onnx"
    ir.save(model, path)
    return path


EIGHT_BITS = [
    (QuantType.QInt8, QuantType.QInt8),
    (QuantType.QUInt8, QuantType.QInt8),
    (QuantType.QUInt8, QuantType.QUInt8),
]
OTHERS = [(QuantType.QUInt16, QuantType.QInt8), (QuantType.QUInt8, QuantType.QInt4)]


@pytest.mark.parametrize(
    ("format", "activation", "weight"),
    [
        *((QuantFormat.QDQ, *types) for types in (*EIGHT_BITS, *OTHERS)),
        *((QuantFormat.QOperator, *types) for types in EIGHT_BITS),
    ],
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_what_the_static_quantizer_writes_is_accepted(
    convolution, tmp_path, format, activation, weight, per_channel
):
    target = tmp_path / "quantized.onnx"
    quantize_static(
        convolution,
        target,
        Samples(),
        quant_format=format,
        per_channel=per_channel,
        activation_type=activation,
        weight_type=weight,
    )
    assert_accepted(target)


def test_what_the_dynamic_quantizer_writes_is_accepted(convolution, tmp_path):
    quantize_dynamic(convolution, tmp_path / "quantized.onnx", op_types_to_quantize=["MatMul"])
    assert_accepted(tmp_path / "quantized.onnx")


def assert_accepted(path):
    model = ir.load(path)
    onnx.shape_inference.infer_shapes_path(str(path), str(path.with_suffix(".inferred.onnx")))
    for candidate in (model, ir.load(path.with_suffix(".inferred.onnx"))):
        assert not list(qdq_problems(candidate))
    Canonicalize()(model)
    verify(model, Stage.FLOAT, "canonicalize")

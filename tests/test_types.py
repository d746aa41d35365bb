"""Quantized types and their arithmetic, against ONNX Runtime's own Q and DQ."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.ir.arithmetic import dequantize, quantize, weight_scale
from qcompiler.ir.types import PerAxis, PerGroup, PerTensor, QuantSpec, QuantType

INT8, UINT8, INT4 = ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4
FP8 = ir.DataType.FLOAT8E4M3FN


@pytest.mark.parametrize(
    ("type", "range_"),
    [
        (QuantType(INT8), (-128, 127)),
        (QuantType(INT8, narrow_range=True), (-127, 127)),
        (QuantType(UINT8), (0, 255)),
        (QuantType(INT4), (-8, 7)),
        (QuantType(FP8), (-448, 448)),
    ],
)
def test_ranges(type, range_):
    assert type.range == range_


def test_text_form_tells_types_apart():
    types = [
        QuantType(INT8),
        QuantType(INT8, narrow_range=True),
        QuantType(UINT8, symmetric=False),
        QuantType(INT4, granularity=PerGroup(0, 32)),
        QuantType(INT4, granularity=PerAxis(0)),
    ]
    assert len({str(type) for type in types}) == len(types)
    assert str(QuantSpec(types[3], "dynamic")) == "dynamic quant<int4:float, axis=0/32>"


weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
    elements=st.floats(-1e4, 1e4, width=32),
)


@settings(deadline=None, max_examples=60)
@given(weights, st.sampled_from([PerTensor(), PerAxis(0), PerAxis(1), PerGroup(0, 16)]))
def test_rounding_errs_by_at_most_half_a_step(weight, granularity):
    for storage in (INT8, INT4):
        type = QuantType(storage, granularity=granularity)
        scale = weight_scale(weight, type)
        back = dequantize(quantize(weight, scale, type), scale, type)
        if isinstance(granularity, PerGroup):
            steps = np.repeat(scale, granularity.group_size, axis=0)[: len(weight)]
        elif isinstance(granularity, PerAxis):
            steps = scale[:, None] if granularity.axis == 0 else scale[None]
        else:
            steps = scale
        assert (np.abs(back - weight) <= steps * 0.5001 + 1e-30).all()


@settings(deadline=None, max_examples=40)
@given(
    hnp.arrays(np.float32, (4, 32), elements=st.floats(-300, 300, width=32)),
    st.floats(0.015625, 2, width=32),
    st.integers(0, 255),
)
def test_equals_onnx_runtime_bit_for_bit(values, step, zero):
    scale = np.float32(step)
    cases = [
        (QuantType(INT8), "", 0, "int8", scale),
        (QuantType(UINT8, symmetric=False), "", zero, "uint8", scale),
        (QuantType(INT8, granularity=PerAxis(1)), "<axis = 1>", 0, "int8", np.full(32, scale)),
        (
            QuantType(INT4, granularity=PerGroup(1, 16)),
            "<axis = 1, block_size = 16>",
            0,
            "int4",
            np.full((4, 2), scale),
        ),
    ]
    for type, attributes, zero_point, name, scales in cases:
        zeros = np.full(np.shape(scales), zero_point).astype(type.storage.numpy())
        model = model_of(
            f"g (float[4,32] x) => ({name}[4,32] q, float[4,32] y) "
            f"{{ q = QuantizeLinear {attributes} (x, s, z) "
            f"y = DequantizeLinear {attributes} (q, s, z) }}",
            {"s": scales, "z": zeros},
        )
        model.graph.outputs.pop(0)
        (expected,) = run(model, {"x": values})
        stored = quantize(values, scales, type, zero_point)
        np.testing.assert_array_equal(dequantize(stored, scales, type, zero_point), expected)

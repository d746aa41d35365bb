"""torchao's affine ops on rows and their groups become Q and DQ, without torchao too."""

import numpy as np
import onnx_ir as ir
import pytest
from quantized_torch import Of, both, nodes, torch

from qcompiler.ir.types import PerAxis, PerGroup, PerTensor

RNG = np.random.default_rng(0)


def parts(x, block_size):
    return x.reshape(*x.shape[:-1], -1, block_size[-1])


def choose(x, scheme, block_size, dtype, low, high, eps, scale_dtype, zero_dtype, keepdim):
    assert scheme == "SYMMETRIC" and keepdim
    scale = x.abs().amax(-1, keepdim=True) / ((high - low) / 2)
    return scale.clamp(min=eps), torch.zeros_like(scale, dtype=zero_dtype)


def quantize(x, block_size, scale, zero, dtype, low, high):
    rounded = torch.round(parts(x, block_size) * (1 / scale[..., None])) + zero[..., None]
    return rounded.clamp(low, high).to(dtype).reshape(x.shape)


def dequantize(q, block_size, scale, zero, dtype, low, high, out_dtype=torch.float32):
    wide = parts(q, block_size).to(out_dtype) - zero[..., None]
    return (wide * scale[..., None]).reshape(q.shape)


ENDS = "Scalar? quant_min=None, Scalar? quant_max=None"
STAND_INS = {
    "choose_qparams_affine(Tensor? input, str mapping_type, SymInt[] block_size, "
    f"ScalarType target_dtype, {ENDS}, float? eps=None, ScalarType? scale_dtype=None, "
    "ScalarType? zero_point_dtype=None, bool keepdim=False) -> (Tensor, Tensor)": choose,
    "quantize_affine(Tensor input, SymInt[] block_size, Tensor scale, Tensor? zero_point, "
    f"ScalarType output_dtype, {ENDS}) -> Tensor": quantize,
    "dequantize_affine(Tensor input, SymInt[] block_size, Tensor scale, Tensor? zero_point, "
    f"ScalarType input_dtype, {ENDS}, ScalarType output_dtype=6) -> Tensor": dequantize,
}


@pytest.fixture(scope="module")
def affine():
    """torchao's ops on rows and their groups; where it is not installed, the same arithmetic."""
    ops = torch.ops.torchao
    if hasattr(ops, "quantize_affine"):
        yield ops
        return
    library = torch.library.Library("torchao", "DEF")
    for schema, function in STAND_INS.items():
        library.define(schema)
        library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")
    yield ops
    library._destroy()


def test_torchao_tokens_of_8_bits_and_weights_of_4(affine):
    def linear(x, weight, scale, zero):
        row, int8 = [1, x.shape[-1]], torch.int8
        eps, dtypes = 1e-7, (torch.float32, int8)
        s, z = affine.choose_qparams_affine(
            x, "SYMMETRIC", row, int8, -127, 127, eps, *dtypes, True
        )
        q = affine.quantize_affine(x, row, s, z, int8, -127, 127)
        x = affine.dequantize_affine(q, row, s, z, int8, -127, 127)
        wide = affine.dequantize_affine(weight, [1, 32], scale, zero, int8, -8, 7)
        return torch.nn.functional.linear(x, wide)

    weight = RNG.integers(-8, 8, (8, 64)).astype(np.int8)
    scale = RNG.uniform(0.01, 0.02, (8, 2)).astype(np.float32)
    module = Of(linear, weight=weight, scale=scale, zero=np.zeros((8, 2), np.int8))
    x = RNG.standard_normal((4, 64), dtype=np.float32)
    model, pairs = both(module, x, x[:1] * 9)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    (quantize,) = nodes(model, "QuantizeLinear")
    assert len(quantize.inputs) == 2
    assert quantize.attributes.get_int("block_size") == 64
    stored = [node.inputs[0].dtype for node in nodes(model, "DequantizeLinear")]
    assert sorted(stored) == [ir.DataType.INT8, ir.DataType.INT4]


@pytest.mark.parametrize(
    ("block_size", "shape", "grain"),
    [
        ([4, 64], [4, 64], PerTensor()),
        ([1, 64], [4, 64], PerGroup(-1, 64)),
        ([1, 1, 64], ["n", 5, 64], PerGroup(-1, 64)),
        ([1, 32], [4, 64], PerGroup(-1, 32)),
        ([4, 1], [4, 64], PerAxis(1)),
    ],
)
def test_block_sizes_of_torchao(block_size, shape, grain):
    from qcompiler.from_torch.scales import grain_of

    assert grain_of(block_size, ir.Value(shape=ir.Shape(shape)), None) == grain


def test_blocks_in_two_directions_have_no_onnx_form():
    from qcompiler.from_torch.scales import grain_of

    with pytest.raises(ValueError, match=r"no ONNX form for blocks of \[2, 32\]"):
        grain_of([2, 32], ir.Value(shape=ir.Shape([4, 64])), None)

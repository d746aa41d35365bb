"""Torch's quantized ops become Q and DQ: the same integers, in the ranges that torch gave them."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import run
from quantized_torch import Of, Q, both, nodes, torch

import qcompiler
from qcompiler.frontend import load_model
from qcompiler.ir.errors import ModelError

RNG = np.random.default_rng(0)


def assert_same_integers(ours, theirs, steps):
    """Equal; 1 apart only where `steps`, the unrounded quotient, is a tie in float32."""
    assert ours.dtype == theirs.dtype
    apart = np.abs(ours.astype(int) - theirs.astype(int))
    tie = np.abs(np.abs(steps - np.trunc(steps)) - 0.5) < 1e-4
    assert np.all((apart == 0) | (apart == 1) & tie)


def per_tensor(x):
    return Q.quantize_per_tensor(x, 0.021, 3, -127, 127, torch.int8)


def per_tensor_tensor(x, scale, zero):
    return Q.quantize_per_tensor.tensor(x, scale, zero, 5, 250, torch.uint8)


def per_channel(x, scale, zero):
    return Q.quantize_per_channel(x, scale, zero, 1, -127, 127, torch.int8)


def per_token(x, scale, zero):
    return Q.quantize_per_token(x, scale, zero, -127, 127, torch.int8)


def per_group(x, scale, zero):
    return Q.quantize_per_channel_group(x, scale, zero, -127, 127, torch.int8, 8)


SCALES = RNG.uniform(0.01, 0.03, 16)


@pytest.mark.parametrize(
    ("function", "scale", "zero", "low", "high"),
    [
        (per_tensor, 0.021, 3, -127, 127),
        (per_tensor_tensor, np.float64([0.021]), [100], 5, 250),
        (per_channel, SCALES, np.zeros(16, np.int64), -127, 127),
        (per_token, SCALES[:6, None], np.full((6, 1), 7), -127, 127),
        (per_group, SCALES[:12].reshape(6, 2), np.zeros((6, 2), np.int64), -127, 127),
    ],
)
def test_ranges_narrower_than_the_type(function, scale, zero, low, high):
    constants = {} if function is per_tensor else {"scale": scale, "zero": zero}
    x = RNG.normal(0, 3, (6, 16)).astype(np.float32)
    model, [(ours, theirs)] = both(Of(function, **constants), x, dynamic=False)
    expanded = np.repeat(scale, 8, axis=1) if function is per_group else scale
    assert_same_integers(ours, theirs, x / np.asarray(expanded))
    assert (ours.min(), ours.max()) == (low, high)
    (quantize,) = nodes(model, "QuantizeLinear")
    assert quantize.outputs[0] is model.graph.outputs[0]
    assert quantize.metadata_props["quantized_range"] == f"{low}..{high}"


def test_the_whole_range_needs_no_clip_and_a_pair_stays_one():
    def pair(x, low):
        stored = Q.quantize_per_tensor(x, 0.1, 0, low, 127, torch.int8)
        return Q.dequantize_per_tensor(stored, 0.1, 0, low, 127, torch.int8)

    x = RNG.normal(0, 20, (5, 16)).astype(np.float32)
    for low, clips in ((-128, 0), (-127, 1)):
        model, pairs = both(Of(lambda x, low=low: pair(x, low)), x, x[:2])
        assert len(nodes(model, "Clip")) == clips
        (dequantize,) = nodes(model, "DequantizeLinear")
        assert dequantize.inputs[0].producer().op_type == "QuantizeLinear"
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
            assert ours.min() == np.float32(low) * np.float32(0.1)


def test_ties_are_at_most_one_apart():
    x = ((np.arange(-100, 100) + 0.5) * 0.1).astype(np.float32)[None]
    stored = lambda x: Q.quantize_per_tensor(x, 0.1, 0, -128, 127, torch.int8)  # noqa: E731
    _, [(ours, theirs)] = both(Of(stored), x)
    assert_same_integers(ours, theirs, x / 0.1)
    exact = lambda x: Q.quantize_per_tensor(x, 0.25, 0, -128, 127, torch.int8)  # noqa: E731
    _, [(ours, theirs)] = both(Of(exact), x * 2.5)
    np.testing.assert_array_equal(ours, theirs)


def test_int8_pairs_before_data_movement_open():
    def moved(x):
        stored = Q.quantize_per_tensor(x, 0.1, 4, -127, 127, torch.int8)
        wide = Q.dequantize_per_tensor(stored, 0.1, 4, -127, 127, torch.int8)
        return torch.exp(wide.reshape(-1, 4, 4).transpose(1, 2))

    x = RNG.standard_normal((5, 16), dtype=np.float32)
    model, pairs = both(Of(moved), x, x[:2])
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    (quantize,) = nodes(model, "QuantizeLinear")
    assert quantize.outputs[0].dtype is ir.DataType.UINT8
    assert quantize.inputs[2].const_value.numpy() == 132
    assert quantize.metadata_props["quantized_range"] == "1..255"


def dynamic_tensor(x):
    scale, zero = Q.choose_qparams(x, 0, 255, 2**-12, torch.uint8)
    stored = Q.quantize_per_tensor.tensor(x, scale, zero, 0, 255, torch.uint8)
    return Q.dequantize_per_tensor.tensor(stored, scale, zero, 0, 255, torch.uint8)


def dynamic_symmetric(x):
    scale, zero = Q.choose_qparams_symmetric(x, -127, 127, 2**-12, torch.int8)
    stored = Q.quantize_per_tensor.tensor(x, scale, zero, -127, 127, torch.int8)
    return Q.dequantize_per_tensor.tensor(stored, scale, zero, -127, 127, torch.int8)


def dynamic_token(x):
    scale, zero = Q.choose_qparams_per_token(x, torch.int8)
    stored = Q.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    return Q.dequantize_per_token(stored, scale, zero, -128, 127, torch.int8, torch.float32)


def dynamic_token_asymmetric(x):
    scale, zero = Q.choose_qparams_per_token_asymmetric(x, torch.int8)
    stored = Q.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    return Q.dequantize_per_token(stored, scale, zero, -128, 127, torch.int8, torch.float32)


@pytest.mark.parametrize(
    "function", [dynamic_tensor, dynamic_symmetric, dynamic_token, dynamic_token_asymmetric]
)
def test_scales_computed_as_it_runs(function):
    x = RNG.standard_normal((4, 16), dtype=np.float32)
    model, pairs = both(Of(function), x, x[:1] * 9, x[:3] * 1e-5, np.abs(x) + 1)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-12)
    (quantize,), (dequantize,) = nodes(model, "QuantizeLinear"), nodes(model, "DequantizeLinear")
    assert quantize.inputs[1] is dequantize.inputs[1]
    by_token = "token" in function.__name__
    assert quantize.attributes.get_int("block_size", 0) == (16 if by_token else 0)
    # What is symmetric has no zero point: ORT takes blocked int8 without one as what it is.
    assert (len(quantize.inputs) == 2) == (function in (dynamic_symmetric, dynamic_token))
    if by_token:
        empty = np.zeros((0, 16), np.float32)
        assert run(model, {model.graph.inputs[0].name: empty})[0].shape == (0, 16)


@pytest.mark.parametrize(
    ("low", "high", "torch_type", "storage", "middle"),
    [(-8, 7, "int8", ir.DataType.INT4, 0), (0, 15, "uint8", ir.DataType.UINT4, 8)],
)
def test_weights_of_four_bits_keep_four(low, high, torch_type, storage, middle):
    def linear(x, weight, scale, zero):
        dtype = getattr(torch, torch_type)
        ends = (low, high, dtype, 32, torch.float32)
        wide = Q.dequantize_per_channel_group(weight, scale, zero, *ends)
        return torch.nn.functional.linear(x, wide)

    weight = RNG.integers(low, high + 1, (1024, 1024)).astype(torch_type)
    scale = RNG.uniform(0.01, 0.02, (1024, 32)).astype(np.float32)
    module = Of(linear, weight=weight, scale=scale, zero=np.full((1024, 32), middle, np.int32))
    model, pairs = both(module, RNG.standard_normal((3, 1024), dtype=np.float32))
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    (dequantize,) = nodes(model, "DequantizeLinear")
    stored = dequantize.inputs[0].const_value
    assert (stored.dtype, stored.nbytes) == (storage, weight.size // 2)
    assert len(dequantize.inputs) == (3 if middle else 2)
    assert not nodes(model, "Cast")
    assert set(model.graph.initializers) == {v.name for v in dequantize.inputs}


class Trained(torch.nn.Module):
    """A convolution and a linear layer as convert_pt2e leaves them."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(1)
        for name, shape in (("conv", (8, 3, 3, 3)), ("linear", (10, 8))):
            stored = rng.integers(-127, 128, shape).astype(np.int8)
            self.register_buffer(f"{name}_weight", torch.from_numpy(stored))
            scale = rng.uniform(0.001, 0.002, shape[0])
            self.register_buffer(f"{name}_scale", torch.from_numpy(scale))
            self.register_buffer(f"{name}_zero", torch.zeros(shape[0], dtype=torch.int64))
        bias = rng.integers(-9000, 9000, 8).astype(np.int32)
        self.register_buffer("bias", torch.from_numpy(bias))

    def weight(self, name):
        parts = [getattr(self, f"{name}_{part}") for part in ("weight", "scale", "zero")]
        return Q.dequantize_per_channel(*parts, 0, -127, 127, torch.int8)

    def forward(self, x):
        x = pair(x, 0.03, 128)
        scale = self.conv_scale * 0.03
        ends = (0, -(2**31), 2**31 - 1, torch.int32)
        bias = Q.dequantize_per_channel(self.bias, scale, self.conv_zero, *ends)
        y = torch.nn.functional.conv2d(x, self.weight("conv"), bias)
        y = pair(torch.relu(y), 0.01, 0)
        y = pair(torch.nn.functional.adaptive_avg_pool2d(y, 1).flatten(1), 0.01, 0)
        return pair(torch.nn.functional.linear(y, self.weight("linear")), STEP, 128)


STEP = 0.004


def pair(x, scale, zero):
    stored = Q.quantize_per_tensor(x, scale, zero, 0, 255, torch.uint8)
    return Q.dequantize_per_tensor(stored, scale, zero, 0, 255, torch.uint8)


def test_a_quantized_network_compiles(tmp_path):
    x = RNG.standard_normal((3, 3, 12, 12), dtype=np.float32)
    model, pairs = both(Trained(), x, x[:1])
    weights = [node.inputs[0].const_value for node in nodes(model, "DequantizeLinear")]
    stored = [weight.dtype for weight in weights if weight is not None]
    assert sorted(stored) == [ir.DataType.INT8, ir.DataType.INT8, ir.DataType.INT32]
    report = qcompiler.compile(model, "x86-int8", tmp_path / "b", timing=False)
    session = qcompiler.load(report.bundle)
    (feed,) = session.get_inputs()
    for (ours, theirs), rows in zip(pairs, (3, 1), strict=True):
        compiled = session.run(None, {feed.name: x[:rows]})[0]
        # An average or a product that falls on a tie may round to the other side.
        assert np.abs(ours - theirs).max() <= 1.01 * STEP
        assert np.abs(compiled - theirs).max() <= 1.01 * STEP


def test_int16():
    stored = lambda x: Q.quantize_per_tensor(x, 1e-3, 0, -32768, 32767, torch.int16)  # noqa: E731
    x = RNG.standard_normal((2, 16), dtype=np.float32)
    _, [(ours, theirs)] = both(Of(stored), x)
    assert_same_integers(ours, theirs, x / 1e-3)


def test_what_has_no_quantize_linear_is_named():
    stored = lambda x: Q.quantize_per_tensor(  # noqa: E731
        x, 0.1, 0, -448, 448, torch.float8_e4m3fn
    ).to(torch.float32)
    message = r"quantize_per_tensor \(.*\) to ONNX: no QuantizeLinear makes FLOAT8E4M3FN as torch"
    with pytest.raises(ModelError, match=message):
        load_model(Of(stored).eval(), (torch.zeros(2, 4),))


def test_tokens_of_varying_size_are_refused():
    module, x = Of(dynamic_token).eval(), torch.zeros(2, 16)
    with pytest.raises(ModelError, match=r"a token of varying size .*: fix the last dimension"):
        load_model(module, (x,), ({1: torch.export.Dim.AUTO},))

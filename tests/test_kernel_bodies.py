"""Every kernel against its function's body in ONNX Runtime: the reference is the body itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from golden import sqnr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from instruction_sets import compiled_for_here, each_isa, offer
from kernel_models import (
    AGAIN,
    BIAS,
    DOMAIN,
    DYNAMIC,
    MATMULS,
    PER_TENSOR,
    QUANTIZES,
    RELU,
    REQUANTIZED,
    SMOOTHED,
    STORED,
    matmul,
    model_of,
    session,
    stored,
    weights,
)

from qcompiler.ir.region import Region, Step
from qcompiler.session_options import new_session_options
from qcompiler.targets.library import KernelCache, build_library

STORED += [stored(24, 40, *RELU, anchor="QMatMulU8S8")]
STORED += [dataclasses.replace(stored(63, 192), anchor="QMatMulU8S8", widths=(48, 96, 48))]
STORED += [dataclasses.replace(stored(20, 96, *AGAIN), anchor="QMatMulU8U8", widths=(48, 48))]


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("library") / "kernels.so"
    regions = [
        *QUANTIZES, *SMOOTHED, *MATMULS, *PER_TENSOR, *STORED, *DYNAMIC, *REQUANTIZED,
    ]  # fmt: skip
    with compiled_for_here():
        build_library(regions, DOMAIN, path, cache=KernelCache())
    return path


def assert_computes_its_body(region, rank, feeds, library, isa):
    """On one thread and on two; scales are multiplied in another order, and sums are exact."""
    expected = session(region, rank, 1).run(None, feeds)
    for threads in (1, 2):
        natives = session(region, rank, threads, library, isa).run(None, feeds)
        for native, want in zip(natives, expected, strict=True):
            assert native.shape == want.shape
            assert np.array_equal(native, want) or sqnr(want, native) >= 60
            np.testing.assert_allclose(native, want, rtol=1e-4, atol=1e-4)


leading = st.lists(st.integers(0, 21), min_size=1, max_size=3)


@each_isa("Quantize")
@settings(deadline=None, max_examples=120)
@example([1], QUANTIZES[6], 0, 0.0).via("one row")
@example([0], QUANTIZES[4], 0, 0.0).via("an empty batch")
@example([2, 0, 3], SMOOTHED[4], 0, 0.0).via("an empty batch inside")
@example([257], SMOOTHED[5], 0, 1.0).via("more than a tile of tiles")
@given(leading, st.sampled_from([*QUANTIZES, *SMOOTHED]), st.integers(0, 2**32 - 1),
       st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e30]))  # fmt: skip
def test_quantize(library, isa, shape, region, seed, magnitude):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal([*shape, region.size("K")]) * magnitude).astype(np.float32)
    expected = session(region, len(shape) + 1, 1).run(None, {"x": x})
    for threads in (1, 2):
        native = session(region, len(shape) + 1, threads, library, isa).run(None, {"x": x})
        for got, want in zip(native, expected, strict=True):
            np.testing.assert_array_equal(got, want)


@each_isa("Quantize")
def test_quantize_rounds_ties_like_its_body(library, isa):
    region = Region("Quantize", (("K", 64),))
    x = (np.arange(4 * 64, dtype=np.float32).reshape(4, 64) - 128) / 2
    x[:, 0] = (127, 63.5, 127 / 3, 1e-3)
    expected = session(region, 2, 1).run(None, {"x": x})
    native = session(region, 2, 1, library, isa).run(None, {"x": x})
    np.testing.assert_array_equal(native[0], expected[0])
    np.testing.assert_array_equal(native[1], expected[1])


@each_isa("QMatMulW8A8")
@settings(deadline=None, max_examples=150)
@example([1], MATMULS[7], 0).via("one row")
@example([0], MATMULS[7], 0).via("an empty batch")
@example([9], MATMULS[3], 0).via("just over a tile")
@example([300], MATMULS[7], 0).via("several blocks of rows")
@example([300], MATMULS[-1], 0).via("several results")
@example([700], DYNAMIC[0], 0).via("more rows than are quantized at once")
@example([33], DYNAMIC[-1], 0).via("long rows, quantized by the tasks")
@example([16], DYNAMIC[3], 0).via("few rows, quantized before")
@example([0], DYNAMIC[3], 0).via("an empty batch to be quantized")
@given(leading, st.sampled_from([*MATMULS, *DYNAMIC]), st.integers(0, 2**32 - 1))
def test_matmul(library, isa, shape, region, seed):
    rng = np.random.default_rng(seed)
    k, n = region.size("K"), region.size("N")
    feeds = {
        "q": rng.integers(0, 256, [*shape, k]).astype(np.uint8),
        "s": rng.uniform(0.01, 0.02, [*shape, 1]).astype(np.float32),
    }
    if region in DYNAMIC:
        feeds = {"x": rng.standard_normal([*shape, k], np.float32)}
    for index, kind in enumerate(region.extras):
        if kind == "tensor":
            feeds[f"extra{index}"] = rng.standard_normal([*shape, n]).astype(np.float32)
    assert_computes_its_body(region, len(shape) + 1, feeds, library, isa)


@each_isa("QMatMulW8A8")
@settings(deadline=None, max_examples=100)
@example([1], REQUANTIZED[3], 0).via("one row")
@example([1], REQUANTIZED[8], 0).via("a row that does not lie on the stack with another")
@example([0], REQUANTIZED[3], 0).via("an empty batch")
@example([9], REQUANTIZED[2], 0).via("just over a tile")
@example([33], REQUANTIZED[3], 0).via("just enough rows for tasks of whole rows")
@example([300], REQUANTIZED[3], 0).via("tasks of whole rows")
@example([300], REQUANTIZED[5], 0).via("tasks of whole rows, stored beside, times factors")
@example([100], REQUANTIZED[9], 0).via("large weights, stored beside")
@example([1100], REQUANTIZED[9], 0).via("large weights and results, stored beside")
@example([1100], REQUANTIZED[10], 0).via("large weights and results")
@given(leading, st.sampled_from(REQUANTIZED), st.integers(0, 2**32 - 1))
def test_a_result_that_is_quantized(library, isa, shape, region, seed):
    """The floats are those of a product, which differ in their last bits: few integers by one."""
    rng = np.random.default_rng(seed)
    feeds = {
        "q": rng.integers(0, 256, [*shape, region.size("K")]).astype(np.uint8),
        "s": rng.uniform(0.01, 0.02, [*shape, 1]).astype(np.float32),
    }
    for index, kind in enumerate(region.extras):
        if kind == "tensor":
            feeds[f"extra{index}"] = rng.standard_normal([*shape, region.size("N")], np.float32)
    expected = session(region, len(shape) + 1, 1).run(None, feeds)
    for threads in (1, 2):
        natives = session(region, len(shape) + 1, threads, library, isa).run(None, feeds)
        for name, native, want in zip(region.outputs, natives, expected, strict=True):
            assert (native.shape, native.dtype) == (want.shape, want.dtype)
            if name == "yq":
                difference = np.abs(native.astype(int) - want)
                assert difference.max(initial=0) <= 1
                assert (difference != 0).sum() <= 1 + native.size / 500
            else:
                np.testing.assert_allclose(native, want, rtol=1e-4, atol=1e-4)


@each_isa("QMatMulU8S8")
@settings(deadline=None, max_examples=80)
@example([1], PER_TENSOR[4], 255, 0).via("one row")
@example([1], PER_TENSOR[11], 255, 0).via("one row, shifted weights")
@example([0], PER_TENSOR[11], 3, 0).via("an empty batch, shifted weights")
@example([300], PER_TENSOR[12], 77, 0).via("several results, shifted weights")
@example([4100], PER_TENSOR[8], 255, 0).via("more rows than lie on the stack")
@example([0], PER_TENSOR[4], 3, 0).via("an empty batch")
@example([9], PER_TENSOR[3], 0, 0).via("just over a tile")
@example([300], PER_TENSOR[4], 128, 0).via("several blocks of rows")
@example([33], PER_TENSOR[-1], 255, 0).via("more columns than lie on the stack")
@given(leading, st.sampled_from(PER_TENSOR), st.sampled_from([0, 1, 128, 255]),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_matmul_with_one_scale(library, isa, shape, region, zero, seed):
    rng = np.random.default_rng(seed)
    feeds = {
        "q": rng.integers(0, 256, [*shape, region.size("K")]).astype(np.uint8),
        "s": np.array(rng.uniform(0.01, 0.02), np.float32),
        "z": np.array(zero, np.uint8),
    }
    for index, kind in enumerate(region.extras):
        if kind == "tensor":
            feeds[f"extra{index}"] = rng.standard_normal([*shape, region.size("N")], np.float32)
    expected = session(region, len(shape) + 1, 1).run(None, feeds)
    for threads in (1, 2):
        natives = session(region, len(shape) + 1, threads, library, isa).run(None, feeds)
        for native, want in zip(natives, expected, strict=True):
            assert native.shape == want.shape
            assert np.array_equal(native, want) or sqnr(want, native) >= 60
            np.testing.assert_allclose(native, want, rtol=1e-4, atol=1e-4)


@each_isa("QMatMulU8S8")
@settings(deadline=None, max_examples=60)
@example([1], STORED[3], 255, 0).via("one row")
@example([0], STORED[3], 3, 0).via("an empty batch")
@example([9], STORED[4], 0, 0).via("just over a tile")
@example([300], STORED[4], 128, 0).via("several blocks of rows")
@example([300], STORED[-1], 77, 0).via("several results")
@given(leading, st.sampled_from(STORED), st.sampled_from([0, 1, 128, 255]),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_matmul_with_integers_as_result(library, isa, shape, region, zero, seed):
    """Equal integers: kernel and body round the same floats, and ties to even."""
    rng = np.random.default_rng(seed)
    feeds = {
        "q": rng.integers(0, 256, [*shape, region.size("K")]).astype(np.uint8),
        "s": np.array(rng.uniform(0.01, 0.02), np.float32),
        "z": np.array(zero, np.uint8),
    }
    expected = session(region, len(shape) + 1, 1).run(None, feeds)
    for threads in (1, 2):
        natives = session(region, len(shape) + 1, threads, library, isa).run(None, feeds)
        for native, want in zip(natives, expected, strict=True):
            assert native.dtype == want.dtype == np.uint8
            np.testing.assert_array_equal(native, want)


@each_isa("QMatMulW8A8")
def test_integers_as_result_of_scales_per_token(tmp_path, isa):
    """The body multiplies by one scale after the other, the kernel by both: ties may differ."""
    region, path, rng = stored(65, 49), tmp_path / "kernels.so", np.random.default_rng(5)
    build_library([region], DOMAIN, path, cache=KernelCache())
    feeds = {
        "q": rng.integers(0, 256, (200, 65)).astype(np.uint8),
        "s": rng.uniform(0.01, 0.02, (200, 1)).astype(np.float32),
    }
    (want,) = session(region, 2, 1).run(None, feeds)
    (native,) = session(region, 2, 2, path, isa).run(None, feeds)
    difference = np.abs(native.astype(int) - want)
    assert difference.max() <= 1
    assert (difference != 0).mean() < 1e-3


@each_isa("QMatMulU8S8")
def test_ties_and_large_numbers_are_rounded_as_onnx_does(tmp_path, isa):
    """As a division of float32, ties to even, and beyond what int32 holds."""
    region = Region("QMatMulU8S8", (("K", 4), ("N", 16)), ("tensor", "channel", "channel"),
                    (Step("Add", (0, -1)), Step("QuantizeLinear", (1, -2, -3))))  # fmt: skip
    path = tmp_path / "kernels.so"
    build_library([region], DOMAIN, path, cache=KernelCache())
    scale, zero = (weights(region)[f"extra{i}"] for i in (1, 2))
    feeds = {
        "q": np.zeros((6, 4), np.uint8), "s": np.array(1, "f4"), "z": np.array(0, "u1"),
        "extra0": np.outer([0.5, 1.5, -2.5, 3e9, -1e30, 1e30], scale).astype(np.float32),
    }  # fmt: skip
    (native,) = session(region, 2, 1, path, isa).run(None, feeds)
    quotient = np.rint(feeds["extra0"] / scale)
    np.testing.assert_array_equal(native, np.clip(quotient + zero, 0, 255).astype(np.uint8))


@each_isa("QMatMulU8S8")
@pytest.mark.parametrize(("name", "value"), [("s", np.ones(2, "f4")), ("z", np.ones(2, "u1"))])
def test_one_scale_means_one(library, isa, name, value):
    """What the graph says of a shape is not what comes."""
    feeds = {"q": np.zeros((2, 3), np.uint8), "s": np.ones(1, "f4"), "z": np.ones(1, "u1")}
    model = onnx.load_from_string(model_of(PER_TENSOR[1], 2))
    for operand in model.graph.input:
        if operand.name in "sz":
            operand.type.tensor_type.ClearField("shape")
    options = new_session_options()
    offer(options, library, isa)
    run = ort.InferenceSession(model.SerializeToString(), options).run
    assert run(None, feeds)[0].shape == (2, 5)
    with pytest.raises(
        ort.capi.onnxruntime_pybind11_state.InvalidArgument, match=f"input {name} .*hold"
    ):
        run(None, feeds | {name: value})


@each_isa("QMatMulW8A8")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_large_numbers(tmp_path, isa, approximate):
    gelu = Step("Gelu", (1,), (("approximate", approximate),))
    region = matmul(4, 16, ("tensor",), BIAS, gelu)
    path = tmp_path / "kernels.so"
    build_library([region], DOMAIN, path, cache=KernelCache())
    large = np.float32([np.inf, 3e38, 1e30, 1e5, 100, 30, 6, 5, -5, -6, -30, -100, -1e5, -1e30,
                        -3e38, 0])  # fmt: skip
    feeds = {"q": np.full((1, 4), 128, np.uint8), "s": np.ones((1, 1), np.float32)}
    (result,) = session(region, 2, 1, path, isa).run(None, feeds | {"extra0": large[None]})
    np.testing.assert_allclose(result[0], np.where(large > 0, large, 0), rtol=2e-6, atol=2e-6)

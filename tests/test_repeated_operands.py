"""Operands of a product that are the same for the whole batch, against bodies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import test_qmatmul_w4 as w4
from hypothesis import example, given, settings
from hypothesis import strategies as st
from instruction_sets import compiled_for_here, each_isa, offer
from kernel_models import BIAS, DOMAIN, REPEATED, session

from qcompiler.ir.joined_regions import dilation_of_windows, pads_of_windows
from qcompiler.ir.region import Step
from qcompiler.session_options import new_session_options
from qcompiler.targets.library import KernelCache, build_library

OF_4_BITS = w4.product(63, 47, 16, ("channel", "repeated"), BIAS, Step("Add", (1, -2)))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("library") / "kernels.so"
    with compiled_for_here():
        build_library(REPEATED, DOMAIN, path, cache=KernelCache())
    return path


def feeds_of(region, batch, rows, own, seed):
    """For a result of [*batch, rows, N]; the last `own` of these dimensions do not repeat."""
    rng = np.random.default_rng(seed)
    k, n, sizes = region.size("K"), region.size("N"), dict(region.sizes)
    tokens = rows
    if "R" in sizes:
        reach = (sizes["R"] - 1) * dilation_of_windows(region) + 1
        tokens = (rows - 1) * sizes["S"] + reach - sum(pads_of_windows(region))
    x = rng.standard_normal([*batch, max(tokens, 0), k // sizes.get("R", 1)], np.float32)
    one_scale = region.anchor in ("QMatMulU8S8", "QMatMulU8U8")
    feeds = {
        "x": x,
        "q": rng.integers(0, 256, [*batch, rows, k]).astype(np.uint8),
        "s": rng.uniform(0.01, 0.02, [] if one_scale else [*batch, rows, 1]).astype(np.float32),
        "z": np.array(77, np.uint8),
    }
    shape = [*batch, rows, n]
    for index, kind in enumerate(region.extras):
        some = shape if kind == "tensor" else shape[-own:]
        feeds[f"extra{index}"] = rng.standard_normal(some).astype(np.float32)
    return feeds


def given_to(session, feeds):
    return {operand.name: feeds[operand.name] for operand in session.get_inputs()}


def agree(native, want):
    assert (native.shape, native.dtype) == (want.shape, want.dtype)
    if want.dtype == np.uint8:  # rounded from floats that differ in their last bits
        difference = np.abs(native.astype(int) - want)
        assert difference.max(initial=0) <= 1
        assert (difference != 0).sum() <= 1 + native.size / 500
    else:
        np.testing.assert_allclose(native, want, rtol=1e-4, atol=1e-4)


@each_isa("QMatMulW8A8")
@settings(deadline=None, max_examples=120)
@example([4], 100, 2, REPEATED[1], 0).via("several periods")
@example([1], 100, 2, REPEATED[1], 0).via("one period")
@example([3], 1, 2, REPEATED[3], 0).via("periods of one row")
@example([0], 5, 2, REPEATED[3], 0).via("an empty batch")
@example([2], 0, 2, REPEATED[1], 0).via("no rows")
@example([2, 3], 40, 2, REPEATED[4], 0).via("two dimensions that repeat, several results")
@example([2, 3], 40, 3, REPEATED[5], 0).via("a batch within what does not repeat")
@example([3], 700, 2, REPEATED[3], 0).via("periods of several tasks")
@example([3], 700, 2, REPEATED[10], 0).via("windows with zeros, of several tasks")
@example([3], 500, 2, REPEATED[6], 0).via("shifted weights")
@example([3], 50, 2, REPEATED[8], 0).via("results that are quantized, stored beside")
@given(st.lists(st.integers(0, 3), min_size=1, max_size=2), st.integers(1, 70),
       st.integers(1, 3), st.sampled_from(REPEATED), st.integers(0, 2**32 - 1))  # fmt: skip
def test_repeated_operands(library, isa, batch, rows, own, region, seed):
    own = min(own, len(batch) + 1)
    feeds = feeds_of(region, batch, rows, own, seed)
    reference = session(region, len(batch) + 2, 1)
    feeds = given_to(reference, feeds)
    expected = reference.run(None, feeds)
    for threads in (1, 2):
        natives = session(region, len(batch) + 2, threads, library, isa).run(None, feeds)
        for native, want in zip(natives, expected, strict=True):
            agree(native, want)


@each_isa("QMatMulW8A8")
def test_leading_dimensions_of_one_repeat_too(library, isa):
    feeds = given_to(session(REPEATED[1], 4, 1), feeds_of(REPEATED[1], [3, 2], 33, 2, 0))
    (plain,) = session(REPEATED[1], 4, 1, library, isa).run(None, feeds)
    feeds["extra1"] = feeds["extra1"][None]
    (native,) = session(REPEATED[1], 4, 1, library, isa).run(None, feeds)
    np.testing.assert_array_equal(native, plain)


@each_isa("QMatMulW8A8")
@pytest.mark.parametrize("shape", [(32, 49), (33, 48), (2, 33, 49), (1, 1, 1, 33, 49)])
def test_others_are_refused(library, isa, shape):
    feeds = given_to(session(REPEATED[1], 3, 1), feeds_of(REPEATED[1], [3], 33, 2, 0))
    feeds["extra1"] = np.zeros(shape, np.float32)
    with pytest.raises(Exception, match=r"input 5 has shape .*result's last dimensions"):
        session(REPEATED[1], 3, 1, library, isa).run(None, feeds)


@each_isa("QMatMulW4A8")
@pytest.mark.parametrize("region", [OF_4_BITS, w4.requantized(OF_4_BITS, ("y", "yq", "ys"))])
def test_weights_of_4_bits(tmp_path, isa, region):
    build_library([region], w4.DOMAIN, tmp_path / "kernels.so", cache=KernelCache())
    model = onnx.load_from_string(w4.model_of(region))
    for operand in [*model.graph.input, *model.graph.output]:
        operand.type.tensor_type.ClearField("shape")
    results = []
    for path in (None, tmp_path / "kernels.so"):
        options = new_session_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if path is not None:
            offer(options, path, isa)
        found = ort.InferenceSession(model.SerializeToString(), options)
        feeds = given_to(found, feeds_of(region, [3], 40, 2, 0))
        results.append(found.run(None, feeds))
    for want, native in zip(*results, strict=True):
        agree(native, want)

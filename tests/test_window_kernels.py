"""Products that read windows of their input where they lie, against their bodies."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from instruction_sets import compiled_for_here, each_isa, offer
from kernel_models import DOMAIN, PADDED, WINDOWED, model_of, session
from test_kernel_bodies import assert_computes_its_body

from qcompiler.ir.joined_regions import dilation_of_windows, pads_of_windows
from qcompiler.session_options import new_session_options
from qcompiler.targets.library import KernelCache, build_library


def of_stored(region):
    """The one that reads what has zeros around it already."""
    kept = tuple(pair for pair in region.attributes if pair[0] != "pads")
    return dataclasses.replace(region, attributes=kept)


def window_count(region, tokens):
    """How many windows there are of so many rows."""
    reach = (region.size("R") - 1) * dilation_of_windows(region) + 1
    return max(0, (tokens + sum(pads_of_windows(region)) - reach) // region.size("S") + 1)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("library") / "kernels.so"
    with compiled_for_here():
        regions = dict.fromkeys([*WINDOWED, *PADDED, *map(of_stored, PADDED)])
        build_library(list(regions), DOMAIN, path, cache=KernelCache())
    return path


def feeds_of(region, batch, tokens, seed):
    rng = np.random.default_rng(seed)
    taps, n = region.size("R"), region.size("N")
    x = rng.standard_normal([*batch, tokens, region.size("K") // taps], np.float32)
    feeds = {"x": x}
    count = window_count(region, tokens)
    for index, kind in enumerate(region.extras):
        if kind == "tensor":
            feeds[f"extra{index}"] = rng.standard_normal([*batch, count, n]).astype(np.float32)
    return feeds


@each_isa("QMatMulW8A8")
@settings(deadline=None, max_examples=150)
@example([], 1, WINDOWED[0], 0).via("one row")
@example([2], 2, WINDOWED[1], 0).via("fewer rows than a window has")
@example([2], 3, WINDOWED[1], 0).via("one window of each batch")
@example([0], 9, WINDOWED[1], 0).via("an empty batch")
@example([3, 0], 9, WINDOWED[1], 0).via("an empty batch inside")
@example([7], 12, WINDOWED[1], 0).via("batches that are quantized together, rows left over")
@example([3], 300, WINDOWED[3], 0).via("tasks that end within a batch")
@example([], 3000, WINDOWED[2], 0).via("more rows than are quantized at once")
@example([2], 100, WINDOWED[4], 0).via("long rows, and some that no window reads")
@example([], 1, PADDED[1], 0).via("one row, zeros around it")
@example([2], 1, PADDED[4], 0).via("one row and some of the zeros behind it")
@example([3], 300, PADDED[3], 0).via("batches of several tasks, zeros around each")
@example([30], 5, PADDED[3], 0).via("tasks of several batches")
@example([], 3000, PADDED[2], 0).via("more rows than are quantized at once, zeros around them")
@example([0], 9, PADDED[1], 0).via("an empty batch, zeros around it")
@example([2], 0, PADDED[2], 0).via("nothing but zeros, of no rows")
@example([3], 2, PADDED[6], 0).via("windows before the first row and behind the last")
@example([2], 40, PADDED[5], 0).via("several results of causal windows")
@example([3], 300, WINDOWED[6], 0).via("holes, tasks that end within a batch")
@example([2], 8, WINDOWED[6], 0).via("fewer rows than a window with holes reaches over")
@example([2], 20, WINDOWED[7], 0).via("windows with holes, one of which fits the memory for them")
@example([3], 300, PADDED[7], 0).via("causal windows with holes, tasks of some of a batch")
@example([30], 5, PADDED[8], 0).via("holes and zeros, tasks of several batches")
@example([2], 0, PADDED[8], 0).via("fewer zeros than a window with holes reaches over")
@given(st.lists(st.integers(0, 3), max_size=2), st.integers(1, 40),
       st.sampled_from([*WINDOWED, *PADDED]), st.integers(0, 2**32 - 1))  # fmt: skip
def test_a_product_of_windows(library, isa, batch, tokens, region, seed):
    feeds = feeds_of(region, batch, tokens, seed)
    assert_computes_its_body(region, len(batch) + 2, feeds, library, isa)


@each_isa("QMatMulW8A8")
@pytest.mark.parametrize("region", PADDED)
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e-30, 1.0])
def test_zeros_that_are_not_stored_do_what_others_do(library, isa, region, value):
    """Equal to the last bit, where rows are not numbers too."""
    feeds = feeds_of(region, [2], 9, 0)
    feeds["x"][:, [0, 1, -1]] *= np.float32(value)
    stored = {**feeds, "x": np.pad(feeds["x"], ((0, 0), pads_of_windows(region), (0, 0)))}
    for threads in (1, 2):
        expected = session(of_stored(region), 3, threads, library, isa).run(None, stored)
        natives = session(region, 3, threads, library, isa).run(None, feeds)
        for native, want in zip(natives, expected, strict=True):
            np.testing.assert_array_equal(native, want)


@each_isa("QMatMulW8A8")
@pytest.mark.parametrize("shape", [(21,), (4, 20), (2, 4, 22)])
@pytest.mark.parametrize("region", [WINDOWED[1], PADDED[1]])
def test_windows_are_of_rows_of_the_right_length(library, isa, shape, region):
    model = onnx.load_from_string(model_of(region, 2))
    for operand in model.graph.input:
        operand.type.tensor_type.ClearField("shape")
    options = new_session_options()
    offer(options, library, isa)
    run = ort.InferenceSession(model.SerializeToString(), options).run
    feeds = {"x": np.zeros(shape, np.float32), "extra1": np.zeros((1, 47), np.float32)}
    with pytest.raises(Exception, match="two dimensions or more, the last 21"):
        run(None, feeds)

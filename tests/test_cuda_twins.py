"""The ops of a library for GPUs in a session without its provider."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cuda_library import (
    GELU,
    H200,
    PRODUCTS,
    QUANTIZE,
    QUANTIZE_FP8,
    W8,
    N,
    constants_of,
    expected_of,
    feed_of,
    model_of,
    open_session,
    run_op,
)
from stand_in import Bench

from qcompiler.ir.region import Region

# --- twins ------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", [*PRODUCTS, GELU], ids=lambda region: region.name)
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
def test_twins_of_products(region: Region, rows: int, with_twins: Path, bench: Bench) -> None:
    """On a machine with a GPU a session on the CPU runs them."""
    driver, constants = bench.driver(H200), constants_of(region)
    run = open_session(bench.library(with_twins), model_of(region, constants))
    feed = feed_of(region, rows)
    y = np.concatenate(run_op(run, feed), axis=-1)
    expected = expected_of(region, constants, feed)
    np.testing.assert_allclose(y, expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max(initial=1))
    assert driver.get("allocations") == 0
    assert driver.launched() == []


def test_twins_of_quantize(with_twins: Path, bench: Bench) -> None:
    bench.driver(H200)
    library = bench.library(with_twins)
    x = feed_of(QUANTIZE, 5)["x"]
    x[1] = 0
    x[2] = np.float16(6e-8)
    wide, largest = x.astype(np.float32), np.maximum(np.abs(x).astype(np.float32).max(1), 1e-20)
    for region, top in ((QUANTIZE, 127), (QUANTIZE_FP8, 448)):
        q, s = run_op(open_session(library, model_of(region, {})), {"x": x})
        scale = (largest / np.float32(top))[:, None]
        np.testing.assert_array_equal(s, scale)
        if region is QUANTIZE:
            np.testing.assert_array_equal(q, np.rint(wide / scale) + 128)
        else:
            np.testing.assert_array_equal(q, (wide / scale).astype(ml_dtypes.float8_e4m3fn))


def test_shapes_are_inferred(with_twins: Path, bench: Bench) -> None:
    bench.driver(H200)
    run = open_session(bench.library(with_twins), model_of(W8, constants_of(W8)))
    assert [output.shape for output in run.get_outputs()] == [["m", N]]

"""Libraries for GPUs where those of one machine differ: what is registered for which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from cuda_library import (
    A100,
    DOMAIN,
    H200,
    REGIONS,
    T4,
    W4,
    W4_ODD,
    constants_of,
    expected_of,
    feed_of,
    model_of,
    open_session,
    run_op,
)
from numpy_kernels import emulate
from stand_in import Bench, Runtime

from qcompiler.ir.region import Region
from qcompiler.session_options import new_session_options
from qcompiler.targets import cuda


def check(
    y: Any, region: Region, constants: dict[str, Any], feed: dict[str, Any], part: float = 2e-3
) -> None:
    expected = expected_of(region, constants, feed)
    np.testing.assert_allclose(y, expected, rtol=part, atol=part * np.abs(expected).max())


def test_gpus_that_cannot_run_it(on_cpu: Path, bench: Bench) -> None:
    """The name is registered, because GPU 1 can run it; a session on another cannot be made."""
    bench.driver(T4, H200)
    library = bench.library(on_cpu)
    model = model_of(W4, constants_of(W4))
    message = (
        "there is no kernel for GPU 0: T4 has compute capability 7.5, and kernels need 8.0 or "
        r"newer.  GPU 1 \(Stand-in\) has one: choose it by device_id of the CUDA provider or by "
        "CUDA_VISIBLE_DEVICES; or, for function bodies on GPU 0, set the session config entry "
        "qcompiler.device_id to 0 before .*, or QCOMPILER_ISA=none"
    )
    with pytest.raises(Exception, match=f"{W4.name}: {message}"):
        open_session(library, model)
    Runtime(library).set_device(2)
    with pytest.raises(Exception, match=rf"{W4.name}: there is no GPU 2"):
        open_session(library, model)


def options_on(device: str) -> ort.SessionOptions:
    options = new_session_options()
    options.add_session_config_entry("qcompiler.device_id", device)
    return options


@pytest.mark.parametrize("able", [0, 1])
def test_bodies_run_on_the_gpu_that_runs_no_kernels(
    able: int, on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where options name the GPU of their sessions; said once of each GPU that lacks kernels."""
    driver = bench.driver(*((H200, T4) if able == 0 else (T4, H200)))
    library, constants, feed = bench.library(on_cpu), constants_of(W4_ODD), feed_of(W4_ODD, 3)
    emulate(driver, W4_ODD, "sm_90a")
    model, runtime = model_of(W4_ODD, constants, body=True), Runtime(library)
    for ordinal in (0, 1, 1, 0):
        runtime.set_device(ordinal)
        session = open_session(library, model, options_on(str(ordinal)))
        # A body's sums are of float16.
        check(run_op(session, feed)[0], W4_ODD, constants, feed, part=1e-2)
        assert bool(driver.launched()) == (ordinal == able)
    assert capfd.readouterr().err == (
        f"{DOMAIN}: {len(REGIONS)} of {len(REGIONS)} ops run as their function bodies"
        f"{'' if able else ' on GPU 1'}, without kernels: T4 has compute capability 7.5, and "
        "kernels need 8.0 or newer\n"
    )


def test_kernels_of_the_gpu_that_options_name(on_cpu: Path, bench: Bench) -> None:
    """What is registered for an A100 runs on an H200, too, from the H200's own machine code."""
    driver, library = bench.driver(A100, H200), bench.library(on_cpu)
    model, runtime = model_of(W4, constants_of(W4)), Runtime(library)
    for named, ordinal in ((0, 0), (0, 1), (1, 0), (1, 1)):
        emulate(driver, W4, ("sm_80", "sm_90a")[ordinal])
        runtime.set_device(ordinal)
        session = open_session(library, model, options_on(str(named)))
        feed = feed_of(W4, 70)
        check(run_op(session, feed)[0], W4, constants_of(W4), feed)
        wanted = cuda.launches(W4, ("sm_80", "sm_90a")[ordinal])
        assert driver.launched()[0].symbol in {one.symbol for one in wanted}


@pytest.mark.parametrize("device", ["-1", "one", "", "1 2", "99999", "123456789012345678"])
def test_what_is_no_number_of_a_gpu(device: str, on_cpu: Path, bench: Bench) -> None:
    bench.driver(H200)
    with pytest.raises(Exception, match=r"qcompiler.device_id=.* is no number of a GPU"):
        open_session(bench.library(on_cpu), model_of(W4, constants_of(W4)), options_on(device))


def test_no_gpu_of_that_number(
    on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.driver(H200)
    constants, feed = constants_of(W4_ODD), feed_of(W4_ODD, 3)
    model = model_of(W4_ODD, constants, body=True)
    session = open_session(bench.library(on_cpu), model, options_on("7"))
    check(run_op(session, feed)[0], W4_ODD, constants, feed, part=1e-2)
    assert "on GPU 7, without kernels: there is no such GPU" in capfd.readouterr().err

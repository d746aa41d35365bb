"""Libraries for GPUs on several of them, on several streams, in captures, and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
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
    SMALL,
    T4,
    W4,
    W4_ODD,
    W8,
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

CONTEXTS = (0x1000, 0x1001)


def check(
    y: Any, region: Region, constants: dict[str, Any], feed: dict[str, Any], part: float = 2e-3
) -> None:
    expected = expected_of(region, constants, feed)
    np.testing.assert_allclose(y, expected, rtol=part, atol=part * np.abs(expected).max())


def test_sessions_on_two_gpus(on_cpu: Path, bench: Bench) -> None:
    """Each has the kernels of its architecture, its weights and its modules in its own context."""
    driver, library = bench.driver(A100, H200), bench.library(on_cpu)
    runtime, sessions, constants = Runtime(library), [], []
    for ordinal, arch in enumerate(("sm_80", "sm_90a")):
        emulate(driver, W4, arch)
        runtime.set_device(ordinal)
        constants.append(constants_of(W4, ordinal))
        sessions.append(open_session(library, model_of(W4, constants[-1])))
    assert (driver.get("modules"), driver.get("allocations")) == (2, 4)
    for ordinal in (1, 0, 1):
        for rows in (1, 12, 70):
            feed = feed_of(W4, rows)
            (y,) = run_op(sessions[ordinal], feed)
            check(y, W4, constants[ordinal], feed)
            wanted = next(
                one
                for one in cuda.launches(W4, ("sm_80", "sm_90a")[ordinal])
                if one.max_rows is None or rows <= one.max_rows
            )
            launched = driver.launched()
            assert {one.context for one in launched} == {CONTEXTS[ordinal]}
            assert launched[0].symbol == wanted.symbol
            assert launched[0].grid[2] == wanted.splits
    sessions.pop()
    assert driver.get("allocations") == 2
    sessions.pop()
    assert (driver.get("used"), driver.get("allocations")) == (0, 0)


def test_two_gpus_of_a_kind_do_not_share_modules(on_cpu: Path, bench: Bench) -> None:
    driver, library = bench.driver(H200, H200), bench.library(on_cpu)
    emulate(driver, W4, "sm_90a")
    runtime, sessions = Runtime(library), []
    for ordinal in (0, 1, 1, 0):
        runtime.set_device(ordinal)
        sessions.append(open_session(library, model_of(W4, constants_of(W4))))
    assert driver.get("modules") == 2
    for session, context in zip(sessions, (0, 1, 1, 0), strict=True):
        feed = feed_of(W4, 3)
        check(run_op(session, feed)[0], W4, constants_of(W4), feed)
        assert {one.context for one in driver.launched()} == {CONTEXTS[context]}


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


def test_threads_on_streams_of_their_own(on_cpu: Path, bench: Bench) -> None:
    """What a run launches is on the stream of that run: products, and the sums of their parts."""
    driver, library = bench.driver(H200, H200), bench.library(on_cpu)
    emulate(driver, SMALL, "sm_90a")
    runtime, sessions, constants = Runtime(library), [], constants_of(SMALL)
    for ordinal in (0, 1):
        runtime.set_device(ordinal)
        sessions.append(open_session(library, model_of(SMALL, constants)))
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            runtime.set_stream(0x5000 + number)
            for rows in (1, 9, 12, 40):
                feed = feed_of(SMALL, rows)
                check(run_op(sessions[number % 2], feed)[0], SMALL, constants, feed)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    launched = driver.launched()
    assert {(one.stream, one.context) for one in launched} == {
        (0x5000 + number, CONTEXTS[number % 2]) for number in range(4)
    }
    counts = [sum(one.stream == 0x5000 + number for one in launched) for number in range(4)]
    assert counts == [counts[0]] * 4
    assert counts[0] > 4  # some have parts of K to add
    assert runtime.buffers == 0


@pytest.mark.parametrize("region", [W4, W8, SMALL], ids=lambda region: region.name)
def test_runs_can_be_captured(region: Region, on_cpu: Path, bench: Bench) -> None:
    """They ask the driver for nothing that a capture forbids: to allocate, load, copy or wait."""
    driver, library, constants = bench.driver(H200), bench.library(on_cpu), constants_of(region)
    emulate(driver, region, "sm_90a")
    run = open_session(library, model_of(region, constants))
    driver.set("is_capturing", 1)
    try:
        with pytest.raises(Exception, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
            open_session(library, model_of(region, constants))
        for rows in (0, 1, 8, 9, 64, 65, 300):
            feed = feed_of(region, rows)
            (y,) = run_op(run, feed)
            if rows:
                check(y, region, constants, feed)
    finally:
        driver.set("is_capturing", 0)


@pytest.mark.parametrize(
    ("what", "reason"),
    [("gives null", "its allocator gave none"), ("fails", "the arena is full")],
)
def test_no_scratch_buffer(what: str, reason: str, on_cpu: Path, bench: Bench) -> None:
    """Nothing is launched, nothing given back that was not given, and the next run works."""
    driver, library, constants = bench.driver(H200), bench.library(on_cpu), constants_of(SMALL)
    emulate(driver, SMALL, "sm_90a")
    run, runtime = open_session(library, model_of(SMALL, constants)), Runtime(library)
    splits = next(one for one in cuda.launches(SMALL, "sm_90a") if one.combine).splits
    feed, size = feed_of(SMALL, 9), splits * 9 * SMALL.size("N") * 4
    runtime.let_scratch(what)
    with pytest.raises(
        Exception,
        match=rf"{SMALL.name}: cannot allocate a workspace of {size} bytes for 9 rows on GPU 0: "
        rf"run fewer rows at once, or raise gpu_mem_limit of the CUDA provider \({reason}\)",
    ):
        run_op(run, feed)
    assert driver.launched() == []
    assert (runtime.buffers, runtime.freed_nulls) == (0, 0)
    runtime.let_scratch("as ort")
    check(run_op(run, feed)[0], SMALL, constants, feed)
    driver.let_fail("cuLaunchKernel", 1)
    with pytest.raises(Exception, match="cannot launch"):
        run_op(run, feed)
    assert (runtime.buffers, runtime.freed_nulls) == (0, 0)


# --- forks ------------------------------------------------------------------------------------

_BEGIN = """
import os, pathlib, sys, threading, time
import numpy as np
import onnxruntime as ort
from stand_in import Driver, Gpu
library, model = sys.argv[1:]
driver = Driver(pathlib.Path(os.environ["QC_STAND_IN"]), [Gpu()])
options = ort.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 4, 1
options.register_custom_ops_library(library)
def session():
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
def wait(child):
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
_RUNS_IN_CHILD = """
run = session()
child = os.fork()
if child:
    wait(child)
try:
    run.run(None, {"x": np.zeros((2, 1088), np.float16), "extra0": np.zeros(200, np.float16)})
except Exception as error:
    print(error, file=sys.stderr)
del run
os._exit(0)
"""
_FORKS_WHILE_LOADING = """
driver.set("load_milliseconds", 1500)
thread = threading.Thread(target=session)
thread.start()
while not driver.get("modules"):
    time.sleep(0.01)
child = os.fork()
if child:
    wait(child)
again = ort.SessionOptions()
again.register_custom_ops_library(library)
os._exit(0)
"""


def fork(program: str, library: Path, folder: Path) -> str:
    """What a program that forks, and its child, wrote to stderr."""
    (folder / "model.onnx").write_bytes(model_of(W4, constants_of(W4)))
    paths = os.pathsep.join((".", str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN + program, str(library), str(folder / "model.onnx")],
        capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_session_of_before_a_fork_says_so(on_cpu: Path, bench: Bench, tmp_path: Path) -> None:
    """It cannot run in the child, and nothing crashes where it is dropped."""
    bench.driver(H200)
    told = fork(_RUNS_IN_CHILD, bench.library(on_cpu), tmp_path)
    reason = "this process was forked from one that had opened the GPUs"
    assert f"{W4.name}: cannot ask for the GPU: {reason}" in told


def test_a_fork_while_another_thread_loads_kernels(
    on_cpu: Path, bench: Bench, tmp_path: Path
) -> None:
    """What that thread holds nobody gives back in the child, which must not wait for it."""
    bench.driver(H200)
    told = fork(_FORKS_WHILE_LOADING, bench.library(on_cpu), tmp_path)
    assert "forked from one that had opened the GPUs" in told

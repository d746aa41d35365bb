"""Libraries for GPUs on several of them, on several streams, in captures, and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_library import (
    A100,
    H200,
    SMALL,
    W4,
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
from qcompiler.targets import cuda

CONTEXTS = (0x1000, 0x1001)


def check(y: Any, region: Region, constants: dict[str, Any], feed: dict[str, Any]) -> None:
    expected = expected_of(region, constants, feed)
    np.testing.assert_allclose(y, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


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

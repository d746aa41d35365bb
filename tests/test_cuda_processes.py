"""Libraries for GPUs, with a stand-in for the driver: forks, GPUs that differ, and NaN."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from cuda_library import (
    A100,
    H200,
    constants_of,
    feed_of,
    half,
    model_of,
    open_session,
    run_op,
)
from stand_in import Bench, StandInBackend, build_for_cpu

from qcompiler.runtime import _find_cuda
from qcompiler.session_options import new_session_options
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.library import build_library

DOMAIN = "qcompiler.0c0da000"
W8 = half("QMatMulW8A8", {"K": 64, "N": 16})
QUANTIZE = half("Quantize", {"K": 64})


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whose ops run in the CPU provider, and one as it is shipped, with twins."""
    folder = tmp_path_factory.mktemp("libraries")
    cache, made = KernelCache(folder / "cache"), {n: folder / f"{n}.so" for n in ("gpu", "twins")}
    build_for_cpu(made["gpu"], [W8, QUANTIZE], DOMAIN, cache)
    build_library([W8, QUANTIZE], DOMAIN, made["twins"], cache=cache, arch=StandInBackend())
    return made


def open_plainly(model: bytes) -> ort.InferenceSession:
    """Function bodies, as they are written."""
    options = new_session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def test_isa_override_where_gpus_differ(
    libraries, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that were ruled out run on no GPU of the machine, whichever is there too."""
    bench.driver(A100, H200)
    monkeypatch.setenv("QCOMPILER_ISA", "sm_90a")
    message = "there is no kernel for GPU 0 under QCOMPILER_ISA=sm_90a: A100 has .*GPU 1 .Stand-in"
    options, model = new_session_options(), model_of(W8, constants_of(W8))
    options.register_custom_ops_library(str(bench.library(libraries["gpu"])))
    # What it was when the ops were registered counts, for what is registered depends on it.
    monkeypatch.delenv("QCOMPILER_ISA")
    with pytest.raises(Exception, match=f"{W8.name}: {message}"):
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


_FORKS_LATE = """
import os, pathlib, sys
import onnxruntime as ort
from stand_in import Driver, Gpu
driver = Driver(pathlib.Path(os.environ["QC_STAND_IN"]), [Gpu()])
options = ort.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    ort.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
except Exception as error:
    print(error, file=sys.stderr)
os._exit(0)
"""
_FORKS = """
import os, pathlib, sys
import onnxruntime as ort
from stand_in import Driver, Gpu
driver = Driver(pathlib.Path(os.environ["QC_STAND_IN"]), [Gpu()])
ort.SessionOptions().register_custom_ops_library(sys.argv[1])
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
ort.SessionOptions().register_custom_ops_library(sys.argv[1])
os._exit(0)  # ONNX Runtime's own threads, which it would wait for, are the parent's
"""


def test_a_child_of_a_fork_runs_bodies_and_says_so(libraries, bench: Bench) -> None:
    bench.driver(H200)
    paths = f".{os.pathsep}{Path(__file__).parent}"
    command = [sys.executable, "-c", _FORKS, str(bench.library(libraries["gpu"]))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ops run as their function bodies") == 1
    assert "forked from one that had opened the GPUs" in done.stderr


def test_a_session_with_options_of_before_a_fork_says_so(
    libraries, bench: Bench, tmp_path: Path
) -> None:
    """Its ops are registered, and have no body any more."""
    bench.driver(H200)
    (tmp_path / "model.onnx").write_bytes(model_of(W8, constants_of(W8)))
    paths = f".{os.pathsep}{Path(__file__).parent}"
    done = subprocess.run(
        [sys.executable, "-c", _FORKS_LATE, str(bench.library(libraries["gpu"])),
         str(tmp_path / "model.onnx")],
        capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{W8.name}: there is no GPU 0: this process was forked from one" in done.stderr


def test_twins_of_quantize_pass_over_nan(libraries, bench: Bench) -> None:
    """A NaN and what infinity leaves are the lowest integer, as in the function's body.

    Where there is nothing but NaN the scale is, too.
    """
    bench.driver(H200)
    feed = feed_of(QUANTIZE, 3)
    feed["x"][0, 5], feed["x"][1, 7], feed["x"][2] = np.nan, np.inf, np.nan
    run = open_session(bench.library(libraries["twins"]), model_of(QUANTIZE, {}))
    q, s = (array.copy() for array in run_op(run, feed))
    body = open_plainly(model_of(QUANTIZE, {}, body=True))
    for got, wanted in zip((q, s), body.run(None, feed), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert (q[0, 5], q[1, 7], q[1, 6]) == (0, 0, 128)


def test_what_preload_prints_is_its_own(capsys) -> None:
    """ONNX Runtime prints what it does not find; other threads are not silenced for that."""

    found = []

    class Runtime:
        @staticmethod
        def preload_dlls(cuda: bool = True, *, directory: str = "here") -> None:
            print("Failed to load libcudnn.so.9")
            found.append(f"{cuda} {directory}")
            sys.stdout.write("another thread's\n")

    _find_cuda(Runtime)
    assert found == ["True here"]
    assert capsys.readouterr().out == "another thread's\n"
    _find_cuda(object())  # an older ONNX Runtime, which has none

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from cuda_library import DOMAIN, REGIONS
from golden import model_of
from hypothesis import settings
from spiked_models import compile_spiked
from stand_in import Bench, NoCompiler, StandInBackend, build_for_cpu, names_of_kernels

import qcompiler
from qcompiler.report import Report
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.library import build_library

# The same examples at every run, so that a failure is the change's;
# HYPOTHESIS_PROFILE=explore looks for new ones.
# How long an example takes is the machine's: no deadline.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 8), dtype=np.float32)
CONV_W = RNG.standard_normal((4, 2, 3, 3), dtype=np.float32)
IMAGE = RNG.standard_normal((1, 2, 8, 8), dtype=np.float32)
MATMUL = "g (float[m,64] x) => (float[m,8] y) { y = MatMul (x, w) }"
CONV = "g (float[n,2,8,8] x) => (float[n,4,6,6] y) { c = Conv (x, w) r = Relu (c) y = Neg (r) }"

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"


@pytest.fixture(autouse=True, scope="session")
def untimed() -> Iterator[None]:
    """Kernels are chosen by the cost model, except where a test is about timing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcompiler.chooser.runs_here", lambda target: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def of_no_terminal() -> Iterator[None]:
    """Tables are as wide as in a file, whatever terminal, or process of xdist, tests run in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def unspoiled() -> Iterator[None]:
    """Times are kept, however busy the machine is that runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("measure", "whole"):
            patch.setattr(f"qcompiler.timing.{module}.are_busy", lambda load: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def cubins_without_code() -> Iterator[None]:
    """Bundles for GPUs get the names of their kernels; TVM and nvcc would take half a minute each.

    What they make is tested by itself, in `test_cuda_kernels.py` and `test_cuda_library.py`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcompiler.targets.cuda.backend.find_cubin_compiler", NoCompiler)
        patch.setattr("qcompiler.targets.cuda.backend.CudaBackend.source", names_of_kernels)
        yield


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory) -> KernelCache:
    return KernelCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory, kernel_cache) -> Path:
    """A library for GPUs whose ops run in the CPU provider."""
    path = tmp_path_factory.mktemp("library") / "on_cpu.so"
    build_for_cpu(path, REGIONS, DOMAIN, kernel_cache)
    return path


@pytest.fixture(scope="session")
def with_twins(tmp_path_factory, kernel_cache) -> Path:
    """A library for GPUs as it is shipped, but for the driver: on the CPU the twins run."""
    path = tmp_path_factory.mktemp("library") / "with_twins.so"
    build_library(REGIONS, DOMAIN, path, cache=kernel_cache, arch=StandInBackend())
    return path


@pytest.fixture(scope="session")
def drivers(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("drivers")


@pytest.fixture
def bench(tmp_path, monkeypatch, drivers) -> Iterator[Bench]:
    """A machine with GPUs that are not there, see `stand_in.py`."""
    monkeypatch.delenv("QCOMPILER_ISA", raising=False)
    bench = Bench(tmp_path, monkeypatch, drivers)
    yield bench
    bench.check()


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Report:
    """The example compiled for x86-int8."""
    output = tmp_path_factory.mktemp("digits") / "digits.x86-int8"
    return qcompiler.compile(
        DIGITS / "digits.onnx", "x86-int8", output, calibration=DIGITS / "calib"
    )


@pytest.fixture(scope="session")
def arm_digits(tmp_path_factory) -> Path:
    """The example for arm-int8, its convolution float: compiled in a tenth of a second."""
    output = tmp_path_factory.mktemp("digits") / "digits.arm-int8"
    recipe = qcompiler.Recipe(keep_float=("Conv",))
    return qcompiler.compile(DIGITS / "digits.onnx", "arm-int8", output, recipe=recipe).bundle


def mlp(seed: int = 0, depth: int = 64, width: int = 48) -> ir.Model:
    """Two linear layers with a GELU between and a residual around, dynamic in its rows."""
    rng = np.random.default_rng(seed)
    return model_of(
        f"g (float[m,{depth}] x) => (float[m,{depth}] y) "
        "{ p = MatMul (x, w) a = Add (p, b) h = Gelu (a) q = MatMul (h, v) c = Add (q, d) "
        "y = Add (c, x) }",
        {
            "w": rng.standard_normal((depth, width), dtype=np.float32),
            "b": rng.standard_normal(width, dtype=np.float32),
            "v": rng.standard_normal((width, depth), dtype=np.float32),
            "d": rng.standard_normal(depth, dtype=np.float32),
        },
    )


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    """Nothing was compiled, rounded or timed before."""
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def empty_folder(tmp_path, monkeypatch) -> None:
    """The test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def matmul(tmp_path):
    path = tmp_path / "matmul.onnx"
    ir.save(model_of(MATMUL, {"w": W}), path)
    return path


@pytest.fixture
def conv(tmp_path):
    path = tmp_path / "conv.onnx"
    ir.save(model_of(CONV, {"w": CONV_W}), path)
    return path


@pytest.fixture
def bundle(matmul, tmp_path):
    return qcompiler.compile(matmul, "arm-int8", tmp_path / "bundle").bundle


@pytest.fixture
def spiked(tmp_path) -> tuple[Path, Path]:
    """A model of which one node errs, and its bundle, see `spiked_models.py`."""
    return compile_spiked(tmp_path)


def samples(folder, *arrays):
    folder.mkdir()
    for index, content in enumerate(arrays):
        np.savez(folder / f"{index}.npz", **content)
    return folder

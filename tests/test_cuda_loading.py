"""Bundles for GPUs where the driver has one: whether their kernels, twins or bodies run."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from conftest import mlp
from cuda_library import H200, T4
from stand_in import Bench, StandInBackend

import qcompiler
from qcompiler import installed
from qcompiler.ir.errors import BundleError, RuntimeMissingError
from qcompiler.registration import CUDA, is_registered
from qcompiler.runtime import Manifest, open_altered

X = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
NO_GPU = f"ONNX Runtime could not make its {CUDA} .*pip install 'onnxruntime-gpu"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a library that finds the driver of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcompiler.targets.cuda.backend.CudaBackend", StandInBackend)
        output = tmp_path_factory.mktemp("bundle") / "m.cuda-int4"
        return qcompiler.compile(mlp(depth=128, width=192), "cuda-int4", output).bundle


@pytest.fixture
def with_provider(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    """A GPU, and an ONNX Runtime that claims to have the CUDA provider, but cannot make it."""
    bench.driver(H200)
    names = [CUDA, "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: names)


def options_of(bundle: Path, **given: object) -> ort.SessionOptions:
    """What `load` made of fresh options."""
    options = ort.SessionOptions()
    qcompiler.load(bundle, session_options=options, **given)
    return options


def bodies(bundle: Path) -> np.ndarray:
    session = qcompiler.load(bundle, native=False, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


@pytest.mark.usefixtures("with_provider")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_no_gpu_in_onnxruntime(bundle: Path) -> None:
    """Kernels are registered; without a GPU their twins would run, so the session has none."""
    with pytest.warns(UserWarning, match=f"{NO_GPU}.*; running without kernels"):
        session = qcompiler.load(bundle)
    np.testing.assert_array_equal(session.run(None, {"x": X})[0], bodies(bundle))
    options = ort.SessionOptions()
    with pytest.warns(UserWarning, match=f"{NO_GPU}.*slow twins .* native=False"):
        twins = qcompiler.load(bundle, session_options=options)
    assert is_registered(options, Manifest.read(bundle).library)
    assert not np.array_equal(twins.run(None, {"x": X})[0], bodies(bundle))


@pytest.mark.usefixtures("with_provider")
def test_on_the_cpu_bodies_run_where_there_is_a_gpu(bundle: Path) -> None:
    """Their twins are up to 500 times slower."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = options_of(bundle, providers=["CPUExecutionProvider"])
        altered = open_altered(bundle, (bundle / "model.onnx").read_bytes())
    assert not is_registered(options, Manifest.read(bundle).library)
    np.testing.assert_array_equal(altered.run(None, {"x": X})[0], bodies(bundle))


@pytest.mark.parametrize("able", [0, 1])
@pytest.mark.usefixtures("with_provider")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_the_gpu_of_the_session_is_asked(
    able: int, bundle: Path, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    """A GPU below 8.0 beside one that runs the kernels: no name is registered for it."""
    bench.driver(*((H200, T4) if able == 0 else (T4, H200)))
    # Where a library lies is what a process knows it by, and this one saw another driver.
    copy = Path(shutil.copytree(bundle, bench.folder / bundle.name))
    library = Manifest.read(copy).library
    for number in (0, 1, 1):
        for device in (number, str(number)):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                options = options_of(copy, providers=[(CUDA, {"device_id": device})])
            assert is_registered(options, library) == (number == able)
            # That it has no CUDA provider matters only where a kernel was registered for it.
            assert any("slow twins" in str(one.message) for one in told) == (number == able)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert is_registered(options_of(copy), library) == (able == 0)  # the first
    assert capfd.readouterr().err.count("T4 has compute capability 7.5") == 1


# --- which package to install -----------------------------------------------------------------


@pytest.fixture
def of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all packages with ONNX Runtime the one for GPUs is installed."""
    monkeypatch.setattr(installed, "_is_installed", lambda name: name == "onnxruntime-gpu")


@pytest.mark.usefixtures("of_gpus")
def test_an_old_onnxruntime_of_gpus(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To install `onnxruntime` beside it would break both."""
    with pytest.warns(UserWarning, match="no CUDA.*: pip uninstall onnxruntime-gpu, then"):
        qcompiler.load(bundle)
    monkeypatch.setattr(ort, "__version__", "1.20.1")
    with pytest.raises(BundleError, match="this is 1.20.1; pip install -U onnxruntime-gpu$"):
        qcompiler.load(bundle)
    with pytest.raises(RuntimeMissingError, match=r": pip install -U onnxruntime-gpu$"):
        installed.check_onnxruntime()


@pytest.mark.usefixtures("of_gpus")
def test_a_broken_onnxruntime_of_gpus(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ort, "InferenceSession")
    with pytest.raises(RuntimeMissingError, match="--force-reinstall onnxruntime-gpu$"):
        qcompiler.load(bundle)

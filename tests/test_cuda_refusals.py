"""What a library for GPUs says where its kernels cannot run, or fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from cuda_library import (
    B200,
    DOMAIN,
    H200,
    L40S,
    QUANTIZE,
    REGIONS,
    SMALL,
    T4,
    W4,
    W4_ODD,
    W8,
    K,
    N,
    constants_of,
    expected_of,
    feed_of,
    model_of,
    open_session,
    run_op,
)
from numpy_kernels import emulate
from stand_in import Bench, Gpu, StandInBackend

from qcompiler.ir.region import Region
from qcompiler.session_options import new_session_options
from qcompiler.targets import cuda
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.library import build_library

# --- what cannot run --------------------------------------------------------------------------


def runs_body(library: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What a library says while a session of it runs function bodies; nothing the second time."""
    constants, feed = constants_of(W4_ODD), feed_of(W4_ODD, 3)
    model = model_of(W4_ODD, constants, body=True)
    (y,) = run_op(open_session(library, model), feed)
    np.testing.assert_allclose(y, expected_of(W4_ODD, constants, feed), rtol=5e-3, atol=5e-3)
    told = capfd.readouterr().err
    open_session(library, model)
    assert capfd.readouterr().err == ""
    return told


ALL = len(REGIONS)
SAID = f"{DOMAIN}: {ALL} of {ALL} ops run as their function bodies, without kernels: "


def test_no_driver(
    on_cpu: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QC_STAND_IN", "/nowhere/libcuda.so.1")
    told = runs_body(bench.library(on_cpu), capfd)
    assert told == SAID + (
        "there is no NVIDIA driver (libcuda.so.1 cannot be loaded): install it; a container gets "
        "that of its host (docker run --gpus all)\n"
    )


def test_a_driver_too_old(on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.driver(H200).set("version", 12080)
    told = runs_body(bench.library(on_cpu), capfd)
    assert told == SAID + (
        "the NVIDIA driver is too old (for CUDA 12.8, the kernels were compiled with 13.0): "
        "update it\n"
    )


def test_a_driver_that_lacks_a_function(
    on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.driver(H200, flags=("-DOLD_DRIVER",))
    told = runs_body(bench.library(on_cpu), capfd)
    assert told == SAID + "the NVIDIA driver is too old (it has no cuCtxGetCurrent): update it\n"


def test_a_driver_that_fails(on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.driver(H200).let_fail("cuInit", 201)
    told = runs_body(bench.library(on_cpu), capfd)
    assert told == SAID + (
        "the NVIDIA driver does not work (cuInit: CUDA_ERROR_INVALID_CONTEXT): nvidia-smi may say "
        "more\n"
    )


def test_no_gpu(
    on_cpu: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.driver()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runs_body(bench.library(on_cpu), capfd) == SAID + "there is no NVIDIA GPU\n"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert runs_body(bench.library(on_cpu), capfd) == SAID + (
        "there is no NVIDIA GPU under CUDA_VISIBLE_DEVICES=7: without it there may be one\n"
    )


def test_a_gpu_below_sm_80(on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.driver(T4)
    told = runs_body(bench.library(on_cpu), capfd)
    assert told == SAID + "T4 has compute capability 7.5, and kernels need 8.0 or newer\n"


def test_no_cubin_for_the_gpu(
    on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.driver(B200)
    told = runs_body(bench.library(on_cpu), capfd)
    assert told == SAID + (
        "B200 has compute capability 10.0 and 227 KiB of shared memory, and there are kernels for "
        "sm_90a, sm_89, sm_80\n"
    )


def test_kernels_that_do_not_fit_the_gpu(
    on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only those that ask for less shared memory are registered."""
    needs = max(launch.shared_bytes for launch in cuda.launches(W4, "sm_80"))
    driver, library = bench.driver(Gpu(8, 6, "Small", needs - 1)), bench.library(on_cpu)
    driver.know_all(QUANTIZE, "sm_80")
    run_op(open_session(library, model_of(QUANTIZE, {})), feed_of(QUANTIZE, 2))
    assert len(driver.launched()) == 1
    assert "Small has compute capability 8.6 and" in capfd.readouterr().err
    constants, feed = constants_of(W4), feed_of(W4, 2)
    (y,) = run_op(open_session(library, model_of(W4, constants, body=True)), feed)
    assert driver.launched() == []
    np.testing.assert_allclose(y, expected_of(W4, constants, feed), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("isa", ["none", "sm_89", "sm_80"])
def test_isa_override(
    isa: str, on_cpu: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    driver, library = bench.driver(L40S), bench.library(on_cpu)
    driver.know_all(W4, "sm_80")
    monkeypatch.setenv("QCOMPILER_ISA", isa)
    run = open_session(library, model_of(W4, constants_of(W4), body=True))
    run_op(run, feed_of(W4, 2))
    assert len(driver.launched()) == (isa != "none")
    assert capfd.readouterr().err == ""


def test_an_unknown_isa(on_cpu: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.driver(H200)
    monkeypatch.setenv("QCOMPILER_ISA", "avx2")
    with pytest.raises(Exception, match="avx2 is no instruction set.* none, sm_90a, sm_89, sm_80"):
        open_session(bench.library(on_cpu), model_of(W4, constants_of(W4)))


# --- what goes wrong --------------------------------------------------------------------------


def test_out_of_memory(on_cpu: Path, bench: Bench) -> None:
    driver, layout = bench.driver(H200), cuda.packing(W4)
    driver.set("memory", 1000)
    message = (
        f"cannot allocate {layout.weight_bytes} bytes for weights on GPU 0, where 1000 of 1000 are "
        r"free: CUDA_ERROR_OUT_OF_MEMORY \(out of memory\)"
    )
    library = bench.library(on_cpu)
    with pytest.raises(Exception, match=f"{W4.name}: {message}"):
        open_session(library, model_of(W4, constants_of(W4)))
    driver.set("memory", layout.weight_bytes + 10)
    with pytest.raises(Exception, match=f"{layout.scale_bytes} bytes for scales .* where 10 of"):
        open_session(library, model_of(W4, constants_of(W4)))
    assert driver.get("allocations") == 0


def test_no_memory_for_a_workspace(on_cpu: Path, bench: Bench) -> None:
    """ONNX Runtime's allocator has a limit: the op says so, and goes on with fewer rows."""
    limit = ort.OrtArenaCfg({"max_mem": 1 << 17, "arena_extend_strategy": 1})
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0,
                              ort.OrtMemType.DEFAULT)  # fmt: skip
    ort.create_and_register_allocator(place, limit)
    options = new_session_options()
    options.add_session_config_entry("session.use_env_allocators", "1")
    driver, constants = bench.driver(H200), constants_of(SMALL)
    emulate(driver, SMALL, "sm_90a")
    run = open_session(bench.library(on_cpu), model_of(SMALL, constants), options)
    few, many = (launch for launch in cuda.launches(SMALL, "sm_90a") if launch.combine)
    rows = many.max_rows
    assert rows is not None
    size = many.splits * rows * SMALL.size("N") * 4
    assert size > 1 << 17
    for _ in range(2):
        with pytest.raises(Exception, match=f"{SMALL.name}: cannot allocate a workspace of {size} "
                           f"bytes for {rows} rows on GPU 0: run fewer rows .*memory"):  # fmt: skip
            run_op(run, feed_of(SMALL, rows))
        assert driver.launched() == []
    feed = feed_of(SMALL, 9)
    (y,) = run_op(run, feed)
    assert [one.symbol for one in driver.launched()] == [few.symbol, few.combine]
    expected = expected_of(SMALL, constants, feed)
    np.testing.assert_allclose(y, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        ("cuDevicePrimaryCtxRetain", 2, "cannot use GPU 0: CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuModuleLoadData", 209,
         r"cannot load the sm_90a kernels on GPU 0 \(Stand-in\): CUDA_ERROR_NO_BINARY_FOR_GPU"),
        ("cuModuleGetFunction", 500, f"cannot find the kernel {W4.name}_.*: CUDA_ERROR_NOT_FOUND"),
        ("cuFuncSetAttribute", 1, r"cannot give .* \d+ bytes of shared memory: CUDA_ERROR_INVALID"),
        ("cuMemcpyHtoD_v2", 719, r"cannot copy \d+ bytes of weights to GPU 0: unknown error"),
    ],
)  # fmt: skip
def test_a_session_that_cannot_be_made(
    function: str, code: int, message: str, on_cpu: Path, bench: Bench
) -> None:
    driver, library = bench.driver(H200), bench.library(on_cpu)
    driver.let_fail(function, code)
    with pytest.raises(Exception, match=f"{DOMAIN}.{W4.name}: {message}"):
        open_session(library, model_of(W4, constants_of(W4)))
    assert driver.get("allocations") == 0
    driver.let_fail("", 0)
    open_session(library, model_of(W4, constants_of(W4)))


def test_a_launch_that_fails(on_cpu: Path, bench: Bench) -> None:
    driver = bench.driver(H200)
    driver.know_all(W4, "sm_90a")
    run = open_session(bench.library(on_cpu), model_of(W4, constants_of(W4)))
    launch = cuda.launches(W4, "sm_90a")[0]
    driver.let_fail("cuLaunchKernel", 1)
    with pytest.raises(
        Exception,
        match=rf"{W4.name}: cannot launch {launch.symbol} for 3 rows \(grid 13 x 1 x 1, "
        rf"{launch.threads} threads, {launch.shared_bytes} bytes of shared memory\): "
        r"CUDA_ERROR_INVALID_VALUE \(what it means\)",
    ):
        run_op(run, feed_of(W4, 3))
    driver.let_fail("", 0)
    run_op(run, feed_of(W4, 3))


@pytest.mark.parametrize(
    ("region", "changed", "message"),
    [
        (W4, {"x": ["m", "k"]}, r"input x has shape \[2, 1096\]; its last dimension must be 1088"),
        (W8, {"s": ["n", 1]}, r"input s has shape \[3, 1\]; it must hold 2 values"),
        (W4, {"extra0": ["n"]}, r"input extra0 has shape \[201\]; it must hold 200 values"),
        (W8, {"extra1": ["n", N]}, r"input extra1 has shape \[3, 200\]; it must hold 400 values"),
    ],
)
def test_wrong_shapes(
    region: Region, changed: dict[str, list[Any]], message: str, on_cpu: Path, with_twins: Path,
    bench: Bench,
) -> None:  # fmt: skip
    bench.driver(H200)
    ((name, _),) = changed.items()
    feed = feed_of(region, 2)
    wrong = [
        size + (8 if name == "x" else 1) if isinstance(axis, str) and axis != "m" else size
        for size, axis in zip(feed[name].shape, changed[name], strict=True)
    ]
    feed[name] = np.ones(wrong, feed[name].dtype)
    for library in (on_cpu, with_twins):
        run = open_session(
            bench.library(library), model_of(region, constants_of(region), **changed)
        )
        with pytest.raises(Exception, match=f"{region.name}: {message}"):
            run_op(run, feed)


def test_weights_must_be_initializers(on_cpu: Path, with_twins: Path, bench: Bench) -> None:
    bench.driver(H200)
    constants = constants_of(W8)
    for library in (on_cpu, with_twins):
        copy = bench.library(library)
        with pytest.raises(Exception, match="input w must be an initializer"):
            open_session(copy, model_of(W8, {"ws": constants["ws"]}, w=[K, N]))
        wrong = constants | {"ws": constants["ws"][:-1]}
        with pytest.raises(Exception, match=r"ws has shape \[199\]; it must be \[200\]"):
            open_session(copy, model_of(W8, wrong))


def test_without_the_provider_nothing_is_registered(
    tmp_path: Path, kernel_cache: KernelCache, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library as it is shipped, in an ONNX Runtime that has no CUDA."""
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    backend = StandInBackend()
    backend.flags = ()
    build_library(REGIONS, DOMAIN, tmp_path / "lib.so", cache=kernel_cache, arch=backend)
    assert runs_body(tmp_path / "lib.so", capfd) == SAID + (
        "this ONNX Runtime has no CUDAExecutionProvider: pip uninstall onnxruntime, then pip "
        "install 'onnxruntime-gpu[cuda,cudnn]'\n"
    )

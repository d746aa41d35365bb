"""Bundles for GPUs on a machine without one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import mlp

import qcompiler
from qcompiler.cli import targets as targets_command
from qcompiler.ir.errors import QCompilerError, ToolchainError
from qcompiler.targets.catalog import TARGETS, built_isas
from qcompiler.targets.library import KernelCache, build_library


@pytest.fixture(scope="module", params=["cuda-int8", "cuda-int4", "cuda-fp8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundle") / f"m.{request.param}"
    report = qcompiler.compile(mlp(depth=128, width=192), request.param, output)
    ours = [d for d in report.decisions if d.op.startswith(("QMatMul", "Quantize"))]
    assert [d.action for d in ours] == ["kernel"] * (2 if request.param == "cuda-int4" else 4)
    return output


def test_the_manifest_lists_what_is_in_the_library(bundle: Path) -> None:
    library = json.loads((bundle / "manifest.json").read_text())["library"]
    eight_zero = [] if bundle.name.endswith("fp8") else ["sm_80"]
    assert library["isa"] == ["sm_90a", "sm_89", *eight_zero]
    assert library["machine"] == "linux-x86_64"
    assert (bundle / library["file"]).is_file()


def test_bodies_run_in_the_cpu_provider(bundle: Path) -> None:
    x = np.random.default_rng(0).standard_normal((9, 128)).astype(np.float32)
    (y,) = qcompiler.load(bundle, native=False).run(None, {"x": x})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (again,) = qcompiler.load(bundle).run(None, {"x": x})
    np.testing.assert_array_equal(y, again)
    assert np.isfinite(y).all()


def test_an_onnxruntime_without_cuda_is_said(bundle: Path) -> None:
    with pytest.warns(
        UserWarning,
        match="this onnxruntime has no CUDAExecutionProvider: pip uninstall onnxruntime, then pip "
        r"install 'onnxruntime-gpu\[cuda,cudnn\]'; running without kernels",
    ):
        qcompiler.load(bundle)


def test_no_cuda_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise ToolchainError("no CUDA compiler: install the CUDA toolkit")

    monkeypatch.setattr("qcompiler.targets.cuda.backend.find_cubin_compiler", none)
    model, why = mlp(depth=128, width=192), "no CUDA compiler: install the CUDA toolkit"
    report = qcompiler.compile(model, "cuda-int4", tmp_path / "b")
    assert why in {decision.why for decision in report.decisions if decision.action == "body"}
    assert list((tmp_path / "b").glob("*.so")) == []
    with pytest.raises(QCompilerError, match=why):
        qcompiler.compile(model, "cuda-int4", tmp_path / "c", strict=True)
    assert not (tmp_path / "c").exists()


def test_no_library_for_arm(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="there are no kernels for arm yet"):
        build_library([], "d", tmp_path / "l.so", cache=KernelCache(tmp_path), arch="arm")


def test_what_is_built() -> None:
    assert built_isas(TARGETS["cuda-int4"]) == ("sm_90a", "sm_89", "sm_80")
    assert built_isas(TARGETS["cuda-fp8"]) == ("sm_90a", "sm_89")
    assert built_isas(TARGETS["arm-int8"]) == ()


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 5), ()),
        ((8, 0), ("sm_80",)),
        ((8, 6), ("sm_80",)),
        ((8, 9), ("sm_89", "sm_80")),
        ((9, 0), ("sm_90a",)),
        ((10, 0), ()),
        (None, ()),
    ],
)
def test_what_a_gpu_runs(
    capability: tuple[int, int] | None, runs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets_command, "gpu_capability", lambda: capability)
    assert targets_command._gpu_variants(TARGETS["cuda-int4"]) == runs


def test_attention_has_no_kernel_there(tmp_path: Path) -> None:
    recipe = qcompiler.Recipe(attention="float32")
    with pytest.raises(qcompiler.QCompilerError, match="cuda-int8 has no kernel of attention"):
        qcompiler.compile(mlp(), "cuda-int8", tmp_path / "b", recipe=recipe)

"""Tasks of `benchmarks/cuda.py` that run apart: what one breaks is lost to no other."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stand_in import NoCompiler, names_of_kernels

from qcompiler.ir.region import HALF, Region
from qcompiler.targets import cuda

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import cuda_cubins
import cuda_tasks

BENCHMARKS = str(Path(cuda_tasks.__file__).parent)
CHILD = f"""
import os, subprocess, sys, time
sys.path.insert(0, {BENCHMARKS!r})
from cuda_tasks import CudaError, be_child

def die():
    os.kill(os.getpid(), 9)

def lose_the_gpu():
    raise CudaError("cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS")

runs = {{"a": lambda: [{{"x": 1}}], "wrong": lambda: 1 / 0, "lost": lose_the_gpu, "dies": die,
         "sleeps": lambda: time.sleep(60),
         "starts": lambda: subprocess.run(["sleep", "60"]) and []}}
be_child([(name, runs[name]) for name in sys.argv[1].split(",")], int(sys.argv[2]))
"""


def found(tmp_path: Path, tasks: str, seconds: float = 60) -> list[str]:
    script, told = tmp_path / "child.py", []
    script.write_text(CHILD)

    def tell(one: dict[str, Any]) -> None:
        told.append(f"{one['task']}: {one.get('problem', one.get('rows'))}")

    end = time.monotonic() + seconds
    cuda_tasks.run_apart([sys.executable, str(script), tasks], tasks.split(","), end, tell)
    return told


def test_a_task_that_fails_is_told_and_the_others_run(tmp_path: Path) -> None:
    assert found(tmp_path, "a,wrong,a,lost,a,dies,a,lost") == [
        "a: [{'x': 1}]",
        "wrong: ZeroDivisionError: division by zero",
        "a: [{'x': 1}]",
        "lost: cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS",
        "a: [{'x': 1}]",
        "dies: its process ended with status -9",
        "a: [{'x': 1}]",
        "lost: cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS",
    ]


def test_time_that_is_up(tmp_path: Path) -> None:
    begin = time.monotonic()
    told = found(tmp_path, "a,sleeps,a,a", seconds=4)
    assert told == ["a: [{'x': 1}]", "sleeps: stopped: the time was up",
                    "a: not run: the time was up", "a: not run: the time was up"]  # fmt: skip
    assert time.monotonic() - begin < 30
    begin = time.monotonic()
    assert found(tmp_path, "starts", seconds=4) == ["starts: stopped: the time was up"]
    assert time.monotonic() - begin < 30
    assert found(tmp_path, "a", seconds=0) == ["a: not run: the time was up"]


def test_a_child_that_cannot_begin(tmp_path: Path) -> None:
    told: list[Any] = []
    command = [sys.executable, "-c", "import sys; sys.exit('no GPU')"]
    cuda_tasks.run_apart(command, ["a", "b"], time.monotonic() + 60, told.append)
    assert [one["problem"] for one in told] == ["its process ended with status 1"] * 2


def test_an_error_of_the_driver_is_the_last_thing() -> None:
    told: list[Any] = []

    def lost() -> Any:
        raise cuda_tasks.CudaError("gone")

    assert not cuda_tasks.run_here([("a", lost), ("b", list)], told.append)
    assert told == [{"task": "a", "problem": "gone"}]


# --- cubins that were compiled beforehand ---------------------------------------------------------

REGION = Region("Quantize", (("K", 64),), flags=(HALF,))


def test_a_pack_of_cubins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "source", lambda region, arch: names_of_kernels(None, region, arch))
    path, told = tmp_path / "cubins.zip", []
    cuda_cubins.prepare(path, [REGION, REGION], ["sm_80"], NoCompiler(), told.append)
    assert told == [f"{REGION.name} for sm_80: 0 KiB"]
    packed = cuda_cubins.Packed(path)
    assert packed.name == "no compiler"
    compiled = cuda_cubins.Compiled(NoCompiler())
    assert packed.cubin(REGION, "sm_80") == compiled.cubin(REGION, "sm_80")
    with pytest.raises(cuda_cubins.PackError, match=f"has no kernels of {REGION.name} for sm_90a"):
        packed.cubin(REGION, "sm_90a")
    monkeypatch.setattr(cuda_cubins, "_sources", lambda: "others")
    with pytest.raises(cuda_cubins.PackError, match="made of other sources .* --prepare it again"):
        cuda_cubins.Packed(path)


def test_what_is_no_pack(tmp_path: Path) -> None:
    path = tmp_path / "cubins.zip"
    for content in (None, b"no zip"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(cuda_cubins.PackError, match="is no file of cubins .*: make it with"):
            cuda_cubins.Packed(path)

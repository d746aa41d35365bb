"""What `benchmarks/cuda.py` compares with: peers, whole models, and what is wanted of ours."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
from stand_in import StandInBackend

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import cuda_clock
import cuda_models
import cuda_peers
import cuda_tasks
import cuda_wanted
from cuda_graphs import Sizes


def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kind one, with few runs."""
    small = {
        "decode": (cuda_models.decoder, Sizes("d", 1, 64, 4, 2, 128, 100), {"past": 3}),
        "encode": (cuda_models.encoder, Sizes("e", 1, 64, 2, 2, 128, 100),
                   {"batch": 2, "tokens": 5}),
    }  # fmt: skip
    monkeypatch.setattr(cuda_models, "CASES", small)
    monkeypatch.setattr(cuda_models, "settled", lambda replay: replay())


def model_rows(folder: Path, targets: tuple[str, ...], provider: str) -> list[Any]:
    """The row of each task, or its problem."""
    found: list[Any] = []
    tasks = cuda_models.model_tasks(lambda: folder, provider, targets)
    cuda_tasks.run_here(tasks, found.append)
    assert [each["task"] for each in found] == [name for name, _ in tasks]
    return [each["rows"][0] if "rows" in each else each["problem"] for each in found]


def test_prepared_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where they are timed nothing is built or compiled any more."""
    small_models(monkeypatch)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "model.onnx").write_text("of another time")
    told: list[str] = []
    cuda_models.prepare_models(tmp_path, told.append, ("arm-int8",))
    assert [line.partition(":")[0] for line in told] == [
        f"{name}, {form}" for name in ("decode", "encode")
        for form in ("ORT FP32", "ORT FP16", "ORT MatMulNBits", "arm-int8")
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "arm-int8", "four_bits.onnx", "half.onnx", "model.onnx"
    ]  # fmt: skip
    cases = {name: (lambda sizes: 1 / 0, *rest) for name, (_, *rest) in cuda_models.CASES.items()}
    monkeypatch.setattr(cuda_models, "CASES", cases)
    monkeypatch.setattr(cuda_models.qcompiler, "compile", None)
    rows = model_rows(tmp_path, ("arm-int8",), "CPUExecutionProvider")
    assert len(rows) == 8
    assert all(row["milliseconds"] > 0 for row in rows)


def test_whole_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each form of each, small and on the CPU: that it is built, converted, compiled and run."""
    small_models(monkeypatch)
    rows = model_rows(tmp_path, ("arm-int8", "nothing"), "CPUExecutionProvider")
    for row in rows:
        if isinstance(row, str):
            assert "unknown target 'nothing'" in row
        else:
            assert row["milliseconds"] > 0, row
    known = [row for row in rows if not isinstance(row, str)]
    assert [row["model"] for row in known] == ["decode"] * 4 + ["encode"] * 4
    for row in model_rows(tmp_path, ("arm-int8",), "NoneExecutionProvider"):
        assert row["problem"].endswith("has no NoneExecutionProvider: onnxruntime-gpu has")


def test_bodies_are_not_timed_for_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A bundle for GPUs whose kernels cannot run is a problem, not a time."""
    small_models(monkeypatch)
    monkeypatch.setattr("qcompiler.targets.cuda.backend.CudaBackend", StandInBackend)
    bundle = cuda_models._ours(
        lambda: cuda_models._made(tmp_path / "m.onnx", lambda: cuda_models.encoder(
            Sizes("e", 1, 64, 2, 2, 128, 100))), tmp_path, "cuda-int8",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="no kernel was registered"):
        cuda_models._session(bundle, "CPUExecutionProvider")


# --- peers ------------------------------------------------------------------------------------


def test_peers_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each says so in its row, and is no problem of the run."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(cuda_peers, "_ort_time", lambda *_: pytest.fail("there is no CUDA here"))
    found: list[dict[str, Any]] = []
    tasks = cuda_peers.peer_tasks()
    assert cuda_tasks.run_here(tasks, found.append)
    assert len({name for name, _ in tasks}) == len(tasks) == len(found)
    said = [row["problem"] for each in found for row in each["rows"]]
    assert len(said) == len(tasks)
    assert all(one.startswith("no torch (") or "has no CUDAExecutionProvider" in one
               for one in said)  # fmt: skip


class Torch:
    """As much of torch as a peer's time asks for; `call` says what is wrong."""

    class cuda:  # noqa: N801
        @staticmethod
        def synchronize() -> None: ...

        class Stream(contextlib.nullcontext):  # type: ignore[type-arg]
            def synchronize(self) -> None: ...

        class CUDAGraph:
            def replay(self) -> None: ...

        class Event:
            def __init__(self, enable_timing: bool) -> None: ...

            def record(self) -> None: ...

            def elapsed_time(self, end: Any) -> float:
                return 32.0

        @staticmethod
        def stream(stream: Any) -> Any:
            return contextlib.nullcontext()

        graph = stream


def test_a_peer_that_fails_is_told_and_one_that_breaks_the_gpu_ends_its_process() -> None:
    def call(index: int) -> None:
        if said:
            raise RuntimeError(said)

    said = ""
    row = cuda_peers._torch_time(Torch, "p", (1, 2, 3), call)
    assert row["microseconds"] == pytest.approx(2000)
    said = "no such kernel"
    assert cuda_peers._torch_time(Torch, "p", (1, 2, 3), call)["problem"] == "no such kernel"
    said = "CUDA error: an illegal memory access was encountered"
    found: list[dict[str, Any]] = []
    tasks = [("p", lambda: [cuda_peers._torch_time(Torch, "p", (1, 2, 3), call)]), ("q", list)]
    assert not cuda_tasks.run_here(tasks, found.append)
    assert [each["task"] for each in found] == ["p"]
    assert "RuntimeError: CUDA error: an illegal" in found[0]["problem"]


def test_a_time_is_that_of_clocks_that_have_settled() -> None:
    """The first tenth of a second does not count, nor does one run that was disturbed."""
    given = iter([0.02] * 5 + [0.01] * 3 + [0.5] + [0.01] * 90)
    assert cuda_clock.settled(lambda: next(given)) == 0.01
    assert len(list(given)) >= 80


def test_what_is_wanted() -> None:
    times = [{"region": "QMatMulW4A16_K8_N4_G128_f16", "rows": 16, "microseconds": 2.0},
             {"region": "QMatMulFp8_K8_N8_f16", "rows": 8, "microseconds": 2.0},
             {"copy_bytes_per_second": 1e12}]  # fmt: skip
    peers = [{"peer": "cuBLAS fp16", "shape": [16, 8, 4], "microseconds": 6.0},
             {"peer": "cuBLASLt fp8", "shape": [8, 8, 8], "microseconds": 2.0},
             {"peer": "cuBLASLt fp8", "shape": [8, 8, 9], "microseconds": 1.0},
             {"peer": "torchao int4", "shape": [16, 8, 4], "problem": "none"}]  # fmt: skip
    models = [
        {"model": "m", "contender": c, "milliseconds": t}
        for c, t in (
            ("ORT FP32", 1.0),
            ("ORT FP16", 4.0),
            ("ORT MatMulNBits", 3.0),
            ("cuda-int4", 2.0),
        )
    ]
    parts = {"times": [{"rows": times}], "peers": [{"rows": peers}, {"problem": "late"}],
             "models": [{"rows": models}]}  # fmt: skip
    assert cuda_wanted.lines_of(parts) == [
        "LOW  QMatMulW4A16_K8_N4_G128_f16, 16 rows, cuBLAS fp16 / ours: 3.00, wanted 3.30",
        "ok   QMatMulFp8_K8_N8_f16, 8 rows, cuBLASLt fp8 / ours: 1.00, wanted 0.90",
        "ok   m, the faster of ORT's / cuda-int4: 1.50, wanted 1.00",
    ]
    assert cuda_wanted.wanted({}) == []

"""`benchmarks/cuda.py` with a stand-in for the GPU: it finds what is wrong, and runs to its end."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda_library import memory
from numpy_kernels import emulate, emulate_conv
from stand_in import Bench, Driver, Gpu, NoCompiler, names_of_kernels

from qcompiler.ir.region import Region
from qcompiler.targets import cuda
from qcompiler.targets.cuda.norm_plan import NORMS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import cuda as benchmark
import cuda_bench
import cuda_checkers
import cuda_convs
import cuda_cubins
import cuda_device
import cuda_norms
import cuda_tasks

H200 = Gpu()


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    monkeypatch.setattr(cuda, "source", lambda region, arch: names_of_kernels(None, region, arch))
    monkeypatch.setattr(benchmark, "find_cubin_compiler", NoCompiler)
    monkeypatch.setattr(benchmark, "run_apart", run_together)
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    bench = Bench(tmp_path, monkeypatch, tmp_path_factory.mktemp("drivers"))
    yield bench
    bench.check()


def run_together(command: list[str], names: list[str], end: float, tell: Any) -> None:
    """In the place of `run_apart`: the stand-in's kernels are functions of this process."""
    part, driver = command[command.index("--part") + 1], command[command.index("--driver") + 1]
    options = argparse.Namespace(driver=driver, prepared=None, seed=3, until=0.0)
    cuda_tasks.run_here(benchmark.Parts(options).tasks(part), tell)


def numbers(driver: Driver) -> list[dict[str, Any]]:
    """What the part of this name finds."""
    found: list[dict[str, Any]] = []
    run_together(["--part", "numbers", "--driver", str(driver.path)], [], 0, found.append)
    assert not [each for each in found if "problem" in each]
    return [row for each in found for row in each["rows"]]


def emulate_quantize(driver: Driver, region: Region) -> None:
    k, fp8 = region.size("K"), region.anchor == "QuantizeFp8"
    for launch in cuda.launches(region, "sm_90a"):

        def run(values: list[int], grid: Any, launch: cuda.Launch = launch) -> None:
            given = dict(zip(launch.parameters, values, strict=True))
            rows = given["rows"]
            x = memory(given["x"], np.float16, rows, k).astype(np.float32)
            s = np.abs(x).max(1, keepdims=True) / np.float32(448 if fp8 else 127)
            memory(given["s"], np.float32, rows, 1)[:] = s
            q = (x / s).astype(ml_dtypes.float8_e4m3fn) if fp8 else np.rint(x / s) + 128
            memory(given["q"], ml_dtypes.float8_e4m3fn if fp8 else np.uint8, rows, k)[:] = q

        driver.know(launch.symbol, len(launch.parameters), run)


def emulate_norm(driver: Driver, region: Region, spoilt: str = "") -> None:
    k, fp8 = region.size("K"), region.anchor.endswith("Fp8")
    for launch in cuda.launches(region, "sm_90a"):

        def run(values: list[int], grid: Any, launch: cuda.Launch = launch) -> None:
            given = dict(zip(launch.parameters, values, strict=True))
            rows = given.pop("rows")

            def at(name: str, *shape: int, kind: Any = np.float16) -> Any:
                return memory(given[name], kind, *shape)

            if "a" in given:
                at("x", rows, k)[:] = at("a", rows, k).astype("f4") + at("b", rows, k)
            x = at("x", rows, k).astype(np.float64)
            x -= x.mean(1, keepdims=True) if "beta" in given else 0
            y = x / np.sqrt(np.square(x).mean(1, keepdims=True) + 1e-5) * at("gamma", k)
            at("y", rows, k)[:] = y + (at("beta", k) if "beta" in given else 0)
            z = at("y", rows, k).astype("f4") * (at("extra0", k) if "extra0" in given else 1)
            s = np.abs(z).max(1, keepdims=True) / np.float32(448 if fp8 else 127)
            at("s", rows, 1, kind=np.float32)[:] = s
            kind = ml_dtypes.float8_e4m3fn if fp8 else np.uint8
            at("q", rows, k, kind=kind)[:] = (z / s).astype(kind) if fp8 else np.rint(z / s) + 128
            if spoilt:
                at(spoilt, rows, 1 if spoilt == "s" else k, kind={"s": np.float32, "q": kind}.get(
                    spoilt, np.float16))[-1] = 3  # fmt: skip

        driver.know(launch.symbol, len(launch.parameters), run)


@pytest.mark.parametrize("spoilt", ["x", "y", "q", "s"])
def test_wrong_norms(spoilt: str, bench: Bench) -> None:
    driver, (region, *_) = bench.driver(H200), cuda_norms.norms_to_check()
    emulate_norm(driver, region, spoilt)
    kernels = on(driver).kernels(region)
    rng = np.random.default_rng(0)
    assert not cuda_norms.NormProblem(kernels, 5, rng).error(rng) <= benchmark.TOLERANCE


@pytest.mark.parametrize("which", [2, 5, 6, 7, 8, 9])
def test_wrong_convolutions(which: int, bench: Bench) -> None:
    for factor in (1, 2):
        driver = bench.driver(H200)
        conv, shape = cuda_convs.convs_to_check(small=True)[which]
        emulate_conv(driver, conv, factor)
        kernels = tuple(on(driver).kernels(region) for region in (conv.image, conv.region))
        rng = np.random.default_rng(0)
        problem = cuda_convs.ConvProblem(conv, kernels, shape, rng)
        assert (problem.error(rng) <= benchmark.TOLERANCE) == (factor == 1)


def emulate_all(driver: Driver, but: str = "") -> None:
    for region in benchmark.regions_to_check(small=True):
        if region.anchor.startswith("Quantize"):
            emulate_quantize(driver, region)
        elif region.anchor in NORMS:
            emulate_norm(driver, region)
        elif region.name != but:
            emulate(driver, region, "sm_90a")
    for conv, _ in benchmark.convs_to_check(small=True):
        emulate_conv(driver, conv)


def check_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three products and a convolution in `numbers`, instead of all."""
    regions, convs = benchmark.regions_to_check(small=True), cuda_convs.convs_to_check(small=True)
    monkeypatch.setattr(benchmark, "regions_to_check", lambda small: [*regions[:2], regions[8]])
    monkeypatch.setattr(benchmark, "convs_to_check", lambda small: convs[:1])


def on(driver: Driver) -> benchmark.Bench:
    cubins = cuda_cubins.Compiled(NoCompiler())
    return benchmark.Bench(cuda_device.Device(str(driver.path)), "sm_90a", cubins, 1)


def test_right_numbers(bench: Bench) -> None:
    driver = bench.driver(H200)
    emulate_all(driver)
    found = numbers(driver)
    assert len(found) > 40
    convs = [conv.region for conv, _ in cuda_convs.convs_to_check(small=True)]
    assert {row["region"] for row in found} == {
        region.name for region in (*benchmark.regions_to_check(small=True), *convs)
    }
    assert max(row["error"] for row in found) <= benchmark.TOLERANCE


@pytest.mark.parametrize("fault", ["a hundredth", "a row too many", "a row too few"])
def test_wrong_numbers(fault: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    check_few(monkeypatch)
    driver, region = bench.driver(H200), benchmark.regions_to_check(small=True)[1]
    emulate_all(driver, but=region.name)
    n = region.size("N")
    good: dict[str, Any] = {}

    class Recorder:
        def know(self, symbol: str, arguments: int, run: Any) -> None:
            good[symbol] = arguments, run

    def spoil(symbol: str, parameters: tuple[str, ...]) -> None:
        def run(values: list[int], grid: Any) -> None:
            good[symbol][1](values, grid)
            given = dict(zip(parameters, values, strict=True))
            if "y" not in given:
                return
            rows = given["rows"]
            y = memory(given["y"], np.float16, rows + 1, n)
            if fault == "a hundredth":
                y[:rows] *= np.float16(1.01)
            elif fault == "a row too many":
                y[rows] = 0
            else:
                y[rows - 1] = np.nan

        driver.know(symbol, good[symbol][0], run)

    emulate(Recorder(), region, "sm_90a")  # type: ignore[arg-type]
    for launch in cuda.launches(region, "sm_90a"):
        spoil(launch.symbol, launch.parameters)
        if launch.combine is not None:
            spoil(launch.combine, launch.combine_parameters)
    found = numbers(driver)
    assert len({row["region"] for row in found}) == 4
    wrong = {row["region"] for row in found if not row["error"] <= benchmark.TOLERANCE}
    assert wrong == {region.name}


def test_times_and_the_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    driver = bench.driver(H200)
    check_few(monkeypatch)
    emulate_all(driver)
    small = ((1024, 128),)
    monkeypatch.setattr(benchmark, "W4_SHAPES", small)
    monkeypatch.setattr(benchmark, "EIGHT_BIT_SIZES", (256,))
    monkeypatch.setattr(cuda_bench, "ROTATED", 1 << 18)
    monkeypatch.setattr(cuda_bench, "COPIED", 1 << 12)
    emulate(driver, benchmark.w4(1024, 128), "sm_90a")
    right, wrong = (benchmark.eight_bit(anchor, 256, 256) for anchor in benchmark.EIGHT_BIT)
    emulate(driver, right, "sm_90a")
    driver.know_all(wrong, "sm_90a")  # which stores nothing
    out = tmp_path / "cuda.json"
    monkeypatch.setattr(
        sys, "argv", ["cuda.py", "--json", str(out), "--driver", str(driver.path), "--seed", "3"]
    )
    monkeypatch.setattr(benchmark, "check_with", lambda tool, command, patience: [{"tool": tool}])
    peer = {"peer": "cuBLAS fp16", "shape": [128, 1024, 128], "microseconds": 1e3}
    peers = [("broken", lambda: 1 / 0), ("cuBLAS fp16", lambda: [peer])]
    monkeypatch.setattr(benchmark, "peer_tasks", lambda: peers)
    models = [{"model": "m", "contender": "c", "milliseconds": 1.0}]
    monkeypatch.setattr(benchmark, "model_tasks", lambda folder: [("models", lambda: models)])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    said = str(stopped.value).splitlines()
    assert said[0] == "2 problems:"
    assert said[1].startswith(f"times {wrong.name}: WrongError: not timed: its numbers are off by")
    assert said[2] == "peers broken: ZeroDivisionError: division by zero"
    found = json.loads(out.read_text())
    assert list(found["parts"]) == list(benchmark.SHARES)
    parts = {
        part: [row for task in tasks for row in task.get("rows", [])]
        for part, tasks in found["parts"].items()
    }
    assert (found["device"], found["arch"], found["driver"]) == ("Stand-in", "sm_90a", "13.0")
    assert found["compiler"] == "no compiler"
    assert (parts["models"], parts["peers"]) == (models, [peer])
    assert [row["tool"] for row in parts["checkers"] + parts["races"]] == list(cuda_checkers.TOOLS)
    bandwidth, *rows = parts["times"]
    assert bandwidth["copy_bytes_per_second"] == pytest.approx(2 * 4096 / (1e-3 / 4))
    assert [row["rows"] for row in rows] == [1, 16, 128, 512, 256]
    assert [row["rows"] for row in parts["convolutions"]] == [126]
    # The stand-in's graphs take a millisecond; one holds 16 calls, or one for each set of weights.
    layout = cuda.packing(benchmark.w4(1024, 128))
    sets = -(-(1 << 18) // (layout.weight_bytes + layout.scale_bytes))
    assert rows[0]["microseconds"] == pytest.approx(1e3 / max(16, sets))
    judged = {one["what"].partition(", ")[2]: one for one in found["wanted"]}
    assert set(judged) == {"1 row, of a copy's bandwidth", "128 rows, cuBLAS fp16 / ours"}
    assert judged["128 rows, cuBLAS fp16 / ours"]["found"] == max(16, sets)
    assert list(tmp_path.glob("*.new")) == []


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ((), "benchmarks/cuda.py needs an NVIDIA GPU: cuInit: error"),
        ((Gpu(7, 5, "T4"),), "T4 has compute capability 7.5, and there are kernels for sm_80"),
    ],
)
def test_without_a_gpu_for_it(
    gpus: tuple[Gpu, ...], message: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = bench.driver(*gpus)
    monkeypatch.setattr(sys, "argv", ["cuda.py", "--driver", str(driver.path)])
    with pytest.raises(SystemExit, match=message):
        benchmark.main()


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda.py", "--driver", "/nowhere/libcuda.so.1"])
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU: there is no NVIDIA driver"):
        benchmark.main()


@pytest.mark.parametrize(
    ("said", "bad"),
    [
        ("not installed", False),
        ("ERROR SUMMARY: 0 errors", False),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", False),
        ("ERROR SUMMARY: 10 errors", True),
        ("RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", True),
        ("no summary, exit status 1", True),
        ("stopped after 180 s", False),
    ],
)
def test_what_a_checker_says(said: str, bad: bool) -> None:
    assert cuda_checkers.is_bad(said) == bad


def test_without_the_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_checkers.shutil, "which", lambda name: None)
    assert cuda_checkers.check_with("memcheck", [], 1) == [
        {"tool": "memcheck", "said": "not installed"}
    ]


def test_a_checker_that_takes_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        "#!/bin/sh\n[ $2 = racecheck ] && { sleep 60 & echo $! > $3; wait; }\n"
        "echo '= Device not supported'\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(cuda_checkers.shutil, "which", lambda name: str(program))
    begin, watched = time.monotonic(), tmp_path / "watched"
    (row,) = cuda_checkers.check_with("racecheck", [str(watched)], 1)
    assert row["said"] == "stopped after 1.0 s"
    assert time.monotonic() - begin < 30
    # What it watched would go on, on the GPU on which others are timed.
    state = Path("/proc") / watched.read_text().strip() / "stat"
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() - begin < 30
    with pytest.raises(cuda_checkers.CheckerError, match="no summary, exit status 0"):
        cuda_checkers.check_with("memcheck", [], 60)

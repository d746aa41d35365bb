"""What calibrating ResNet50 costs: memory, by the number of samples, and time, by FP32 passes.

    pip install '.[cpu,zig]' torch
    python benchmarks/calibration.py --json benchmarks/results/calibration.json

Each figure is of a process of its own that reads random pictures from a folder, one by one: their
values make no difference to either.  `--model` takes another model of one picture,
[N, 3, 224, 224].  Times want a quiet machine; memory does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from timing import PEAK, environment

from qcompiler.calibrate import observe
from qcompiler.clipping import Clipping
from qcompiler.frontend import load_model
from qcompiler.ir.stages import Stage
from qcompiler.model_runs import ModelRuns
from qcompiler.pipeline import Pipeline
from qcompiler.samples import Samples

COUNTS = (8, 32, 128, 512)
TIMED = 128
ROUNDS = 5
"""Of timing, in turn; the fastest of each kind counts, and the median."""


def write_pictures(folder: Path) -> None:
    """A folder of so many files for each of the counts, larger ones holding those of smaller."""
    rng = np.random.default_rng(0)
    for count in COUNTS:
        (folder / str(count)).mkdir()
    for index in range(max(COUNTS)):
        file = folder / str(max(COUNTS)) / f"{index:03}.npy"
        np.save(file, rng.standard_normal((1, 3, 224, 224), np.float32))
        for count in COUNTS:
            if index < count < max(COUNTS):
                (folder / str(count) / file.name).hardlink_to(file)


def calibrate(model: Path, pictures: Path) -> float:
    """Seconds to find the ranges that x86-int8 asks for."""
    spent = 0.0

    def timed(graph: Any, names: Sequence[str] | Mapping[str, str | None]) -> Any:
        nonlocal spent
        start = time.perf_counter()
        found = observe(graph, names, Samples(pictures), clipping=Clipping("mse"))
        spent += time.perf_counter() - start
        return found

    Pipeline.default("x86-int8", runs=ModelRuns(timed)).up_to(Stage.QDQ).run(load_model(model))
    return spent


def run_float(model: Path, pictures: Path) -> float:
    """Seconds of as many passes of the FP32 model, from reading the first picture on."""
    session = ort.InferenceSession(model)
    name = session.get_inputs()[0].name
    start = time.perf_counter()
    for file in sorted(pictures.iterdir()):
        session.run(None, {name: np.load(file)})
    return time.perf_counter() - start


def in_a_process(kind: str, model: Path, pictures: Path) -> dict[str, Any]:
    """Seconds and peak memory, with an empty cache of ranges."""
    command = [sys.executable, __file__, "--model", model, "--child", kind, pictures]
    count = int(pictures.name)
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *command], check=True, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"QCOMPILER_CACHE": cache},
        )  # fmt: skip
    seconds, kibibytes = done.stdout.split()[-2:]
    entry = {"samples": count, "seconds": float(seconds), "peak_mib": int(kibibytes) / 1024}
    print(
        f"{kind:10}{count:5} samples  {entry['seconds']:8.1f} s  peak {entry['peak_mib']:7.0f} MiB"
    )
    return entry


def ratio(seconds: Sequence[float]) -> float:
    """Of two figures the first by the second."""
    first, second = seconds
    return first / second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="by default ResNet50, see models.py")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, pictures = arguments.child[0], Path(arguments.child[1])
        print({"calibrate": calibrate, "float": run_float}[kind](arguments.model, pictures))
        return
    model = arguments.model
    if model is None:
        import models

        model = models.resnet50()
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        calibrated = [
            in_a_process("calibrate", model, Path(folder, str(count))) for count in COUNTS
        ]
        timed = [
            (in_a_process("calibrate", model, pictures), in_a_process("float", model, pictures))
            for pictures in [Path(folder, str(TIMED))] * ROUNDS
        ]
    fastest, median = (
        ratio([pick(entry["seconds"] for entry in entries) for entries in zip(*timed, strict=True)])
        for pick in (min, statistics.median)
    )
    print(f"calibration takes {fastest:.2f} times the FP32 passes, by medians {median:.2f}")
    if arguments.json:
        content = environment() | {
            "calibration": calibrated,
            "timed": [{"calibrate": ours, "float": passes} for ours, passes in timed],
            "ratio": fastest,
            "ratio_of_medians": median,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What calibrating ResNet50 costs: memory, by the number of samples, and time, by FP32 passes.

    pip install '.[cpu,zig]' torch
    python benchmarks/calibration.py --json benchmarks/results/calibration.json

Each figure is of a process of its own that reads random pictures one by one: their values make no
difference to either.  `--model` takes another model of one picture, [N, 3, 224, 224].  Times want a
quiet machine; memory does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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


def pictures(count: int) -> Iterator[np.ndarray]:
    """So many of them, one in memory at a time."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.standard_normal((1, 3, 224, 224), np.float32)


def calibrate(model: Path, count: int) -> float:
    """Seconds to find the ranges that x86-int8 asks for."""
    spent = 0.0

    def timed(graph: Any, names: Sequence[str] | Mapping[str, str | None]) -> Any:
        nonlocal spent
        start = time.perf_counter()
        found = observe(graph, names, Samples(lambda: pictures(count)), clipping=Clipping("mse"))
        spent += time.perf_counter() - start
        return found

    Pipeline.default("x86-int8", runs=ModelRuns(timed)).up_to(Stage.QDQ).run(load_model(model))
    return spent


def run_float(model: Path, count: int) -> float:
    """Seconds of as many passes of the FP32 model."""
    session = ort.InferenceSession(model)
    name = session.get_inputs()[0].name
    start = time.perf_counter()
    for picture in pictures(count):
        session.run(None, {name: picture})
    return time.perf_counter() - start


def in_a_process(kind: str, model: Path, count: int) -> dict[str, Any]:
    """Seconds and peak memory, with an empty cache of ranges."""
    command = [sys.executable, __file__, "--model", model, "--child", kind, str(count)]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="by default ResNet50, see models.py")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, count = arguments.child[0], int(arguments.child[1])
        print({"calibrate": calibrate, "float": run_float}[kind](arguments.model, count))
        return
    model = arguments.model
    if model is None:
        import models

        model = models.resnet50()
    calibrated = [in_a_process("calibrate", model, count) for count in COUNTS]
    passes = in_a_process("float", model, TIMED)
    ratio = calibrated[COUNTS.index(TIMED)]["seconds"] / passes["seconds"]
    print(f"calibration takes {ratio:.2f} times the FP32 passes")
    if arguments.json:
        content = environment() | {"calibration": calibrated, "float": passes, "ratio": ratio}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

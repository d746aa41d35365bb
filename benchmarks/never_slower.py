"""Whether a bundle is ever slower than its model: compile each file, time it against FP32 ORT.

    python benchmarks/never_slower.py MODEL.onnx ... --data DIR --bundles DIR --json FILE

`--data` holds a folder of samples for each file, called like it without `.onnx`; they calibrate and
tell the shapes.  For files without one, and that take made-up inputs, those serve.  Bundles that
exist are not compiled again: compile first, and time when the machine is quiet.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

import qcompiler
from qcompiler.bench import Bench, bench
from qcompiler.random_inputs import random_feed

THREADS = (1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--target", default="x86-int8")
    parser.add_argument("--data", type=Path, help="a folder of samples for each model")
    parser.add_argument("--bundles", type=Path, help="where bundles are kept")
    parser.add_argument("--seconds", type=float, default=3.0, help="per model and threads")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    ort.set_default_logger_severity(3)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models:
            samples = samples_of(model, arguments.data, Path(scratch))
            bundle = (arguments.bundles or Path(scratch)) / model.stem
            if not bundle.is_dir():
                qcompiler.compile(model, arguments.target, bundle, calibration=samples)
            if not arguments.compile_only:
                found = bench(bundle, model, threads=THREADS, data=samples,
                              seconds=arguments.seconds)  # fmt: skip
                rows += report(model.stem, found)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def samples_of(model: Path, data: Path | None, scratch: Path, name: str | None = None) -> Path:
    """The folder with samples for a model; made up where there is none, and kept in `scratch`."""
    name = name or model.stem
    if data is not None and (data / name).is_dir():
        return data / name
    folder = scratch / f"{name}-samples"
    if not folder.exists():
        feed, _ = random_feed(ort.InferenceSession(model).get_inputs(), {})
        folder.mkdir()
        np.savez(folder / "0.npz", **feed)
    return folder


def report(name: str, found: Bench) -> list[dict[str, object]]:
    """One row per number of threads, printed too."""
    shapes = ", ".join("x".join(map(str, fed.shape)) for fed in found.inputs if fed.shape)
    rows = []
    for result in found.results:
        row = {
            "model": name, "shapes": shapes, "threads": result.threads,
            "fp32_ms": result.model.median * 1e3, "fp32_fastest_ms": result.model.minimum * 1e3,
            "bundle_ms": result.bundle.median * 1e3,
            "bundle_fastest_ms": result.bundle.minimum * 1e3,
            "speedup": result.speedup, "speedup_of_fastest": result.speedup_of_minima,
        }  # fmt: skip
        rows.append(row)
        slower = "  SLOWER" if max(result.speedup, result.speedup_of_minima) < 1 else ""
        print(f"{name[:30]:31}{shapes[:24]:25}{result.threads} thr  "
              f"{row['fp32_ms']:9.3f} ({row['fp32_fastest_ms']:9.3f}) -> "
              f"{row['bundle_ms']:9.3f} ({row['bundle_fastest_ms']:9.3f}) ms  "
              f"{result.speedup:5.2f} ({result.speedup_of_minima:5.2f}){slower}",
              flush=True)  # fmt: skip
    return rows


if __name__ == "__main__":
    main()

"""Models that other tools quantized: does a bundle agree with its source, and is it ever slower?

    pip install '.[cpu,zig]' nncf onnx
    python benchmarks/imported.py minilm.onnx resnet50.onnx --data DIR --work DIR --compile-only
    python benchmarks/imported.py minilm.onnx resnet50.onnx --data DIR --work DIR --json FILE
    python benchmarks/imported.py --quantized int8.onnx pt2e.pt2 --data DIR --work DIR --json FILE
    python benchmarks/imported.py minilm.onnx --ways --quantized minilm-pt2e-static.pt2 …

Each FP32 model is quantized by ONNX Runtime's tools and, where they are installed, by NNCF and by
onnxsim; models after `--quantized` are taken as they are (`torch_models.py` makes some), and if one
is called like an FP32 model with something behind a hyphen, it is that one's.  Each is compiled for
x86-int8 and compared with its source in ONNX Runtime on the samples, all outputs of it.  Of its
layers it says how many kernels compute, ONNX Runtime's integers, bodies and floats, and why.

The source is run with exact sums (`qcompiler/exact_copy.py`), because where the processor has no
VNNI ONNX Runtime's products of uint8 and int8 saturate.  A quantized model turns a difference in
the last bit into one of a step, wherever a value lies between two, and after some layers such steps
are as large as its rounding itself, most of all where one scale is computed for a whole tensor.
How much that makes is said by the source with its biases and norms moved by a last bit, by ONNX
Runtime with its optimizers off, and by the bundle without kernels, whose floats are ONNX Runtime's.
What matters then is that the bundle is as near to the FP32 model as its source.

Times are those of the source as it comes, and once more with exact sums where its own saturate.

`--data` holds a folder of samples for each file, called like it without `.onnx`; a quantized model
without one is fed made-up inputs.  Files that exist in `--work` are not made again: compile first
(`--untimed` says how they agree, too), and time when the machine is quiet (`--times-only`), some
`--ways` at a time: rows of other models stay in the file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from contenders import Feeds
from imported_agreement import agreements, layers
from imported_ways import WAYS
from never_slower import THREADS, samples_of
from timing import environment

import qcompiler
from qcompiler.bench import bench
from qcompiler.frontend import onnx_file
from qcompiler.timing.exact_source import exact_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", type=Path, nargs="*", help="FP32, to be quantized")
    parser.add_argument("--quantized", type=Path, nargs="+", default=[], help="taken as they are")
    parser.add_argument("--data", type=Path, required=True, help="a folder of samples per model")
    parser.add_argument("--work", type=Path, required=True, help="for quantized models and bundles")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=3.0, help="per model and threads")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--no-timing", action="store_true", help="choose kernels by cost model")
    parser.add_argument("--untimed", action="store_true", help="agreement and layers alone")
    parser.add_argument("--times-only", action="store_true", help="agreement stays as in the file")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    ort.set_default_logger_severity(4)
    rows = kept(arguments.json)
    for source, data, original in sources(arguments, rows):
        try:
            bundle = compiled(source, arguments.work / source.stem, data, not arguments.no_timing)
            if not arguments.compile_only:
                seconds = 0.0 if arguments.untimed else arguments.seconds
                known = rows.get(source.stem, {}) if arguments.times_only else {}
                row = measure(source, bundle, data, original, seconds, known)
                rows[source.stem] = row | {"chosen_by_timing": not arguments.no_timing}
        except Exception as error:
            # One model that cannot be had is no reason to measure no other.
            print(f"{source.stem}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            rows[source.stem] = {"error": f"{type(error).__name__}: {error}"[:300]}
        write(arguments.json, rows)
    write(arguments.json, rows)


def write(file: Path | None, rows: dict[str, dict[str, Any]]) -> None:
    """All rows so far."""
    if file is not None:
        result = environment() | {
            "quantized_by": tools(),
            "load": os.getloadavg(),
            "rows": [{"model": model} | row for model, row in rows.items()],
        }
        file.write_text(json.dumps(result, indent=1) + "\n")


def kept(file: Path | None) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run, by model."""
    rows = json.loads(file.read_text())["rows"] if file is not None and file.exists() else []
    return {row["model"]: row for row in rows}


def sources(
    arguments: argparse.Namespace, rows: dict[str, dict[str, Any]]
) -> Iterator[tuple[Path, Path, Path | None]]:
    """Every quantized model, the folder of its samples, and the FP32 model where it is at hand.

    Those that cannot be had get a row that says why.
    """
    for model in arguments.models:
        data = arguments.data / model.stem
        for way in arguments.ways:
            source = arguments.work / f"{model.stem}-{way}.onnx"
            if why := not_made(model, way, source, samples_in(data)):
                rows[source.stem] = {"error": f"not made: {why}"}
                print(f"{source.stem}: not made: {why}", flush=True)
            else:
                yield source, data, model
    floats = {model.stem: model for model in arguments.models}
    for model in arguments.quantized:
        original = next(
            (f for stem, f in floats.items() if model.stem.startswith(f"{stem}-")), None
        )
        stem = model.stem if original is None else original.stem
        try:
            with onnx_file(model) as file:
                data = samples_of(file, arguments.data, arguments.work, stem)
        except Exception as error:
            why = f"not taken: {type(error).__name__}: {str(error)[:300]}"
            rows[model.stem] = {"error": why}
            print(f"{model.stem}: {why}", flush=True)
        else:
            yield model, data, original


def samples_in(data: Path) -> list[Feeds]:
    return [dict(np.load(file)) for file in sorted(data.glob("*.npz"))]


def compiled(source: Path, bundle: Path, data: Path, timing: bool) -> Path:
    """The bundle of a model, compiled now if there was none; of `data` only the sizes matter."""
    if not bundle.is_dir():
        options = {"timing": timing, "calibration": data}
        report = qcompiler.compile(source, "x86-int8", bundle, **options)
        print(source.stem, report.notes or "", (report.choices or {}).get("lost") or "", flush=True)
    return bundle


def not_made(model: Path, way: str, output: Path, samples: list[Feeds]) -> str:
    """Why there is no quantized model, or "" if there is; it is made now if there was none."""
    if not output.exists():
        try:
            WAYS[way](model, output, samples)
        except Exception as error:
            # What a tool cannot do to a model is its own affair.
            return f"{type(error).__name__}: {str(error)[:200]}"
    return "" if output.exists() else "no file was written"


def measure(
    source: Path, bundle: Path, data: Path, original: Path | None, seconds: float,
    known: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Agreement on the samples, layers, and times on one and two threads if any; printed too.

    Args:
        source: What the bundle was made of, which is in ONNX or torch's.
        bundle: Its folder.
        data: A folder of samples.
        original: The FP32 model, if there is one.
        seconds: For each number of threads; 0 for no times.
        known: Its row of another run, whose agreement is taken over.
    """
    found = {name: value for name, value in known.items() if "sqnr_db" in str(value)}
    with onnx_file(source) as file:
        found = found or agreements(file, bundle, original, samples_in(data))
        row: dict[str, Any] = {"model": source.stem, **found, **layers(bundle)}
        if seconds:
            row["ms"] = times(bundle, file, data, seconds)
        with exact_source(file) as copy:
            if seconds and copy is not None:
                row["ms_with_exact_sums"] = times(bundle, copy, data, seconds)
    listed = "  ".join(
        f"{name.replace('_', ' ')} {value['sqnr_db']:.1f} dB {value['cosine']:.5f}"
        for name, value in row.items() if isinstance(value, dict) and "sqnr_db" in value
    )  # fmt: skip
    timed = "  ".join(
        f"{kind.removeprefix('ms').replace('_', ' ').strip()} {threads} thr {t['source']:7.2f} -> "
        f"{t['bundle']:7.2f} ms {t['ratio']:.2f} ({t['ratio_of_fastest']:.2f})"
        for kind in ("ms", "ms_with_exact_sums")
        for threads, t in row.get(kind, {}).items()
    )
    print(f"{source.stem:34}{timed}  {listed}  {row['layers']}", flush=True)
    return row


def times(bundle: Path, source: Path, data: Path, seconds: float) -> dict[int, dict[str, Any]]:
    """Milliseconds per number of threads; a ratio below 1 means that the bundle is faster."""
    found = bench(bundle, source, threads=THREADS, data=data, seconds=seconds)
    return {
        result.threads: {
            "source": result.model.median * 1e3, "bundle": result.bundle.median * 1e3,
            "ratio": 1 / result.speedup, "ratio_of_fastest": 1 / result.speedup_of_minima,
            "quartiles": sorted(1 / ratio for ratio in result.spread), "rounds": result.rounds,
        }
        for result in found.results
    }  # fmt: skip


def tools() -> dict[str, str]:
    """Versions of who quantized the models, as far as they are installed."""
    return {
        name: importlib.metadata.version(name)
        for name in ("onnxruntime", "nncf", "onnxsim", "torch", "torchao")
        if importlib.util.find_spec(name) is not None
    }


if __name__ == "__main__":
    main()

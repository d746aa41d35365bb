"""Models that other tools quantized: does a bundle agree with its source, and is it ever slower?

    pip install '.[cpu,zig]' nncf onnx
    python benchmarks/imported.py minilm.onnx resnet50.onnx --data DIR --work DIR --compile-only
    python benchmarks/imported.py minilm.onnx resnet50.onnx --data DIR --work DIR --json FILE

Each FP32 model is quantized by ONNX Runtime's tools and, where it is installed, by NNCF; each of
those models is compiled for x86-int8 and compared with itself in ONNX Runtime on the samples.  A
quantized model turns a difference in the last bit into one of a step, wherever a value lies between
two: how far ONNX Runtime is from itself with its optimizers off says how much that makes.

`--data` holds a folder of samples for each file, called like it without `.onnx`.  Files that exist
in `--work` are not made again: compile first, and time when the machine is quiet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from contenders import Feeds
from never_slower import THREADS
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import qcompiler
from qcompiler.bench import bench


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Samples, one by one."""

    def __init__(self, samples: list[Feeds]) -> None:
        self._left: Iterator[Feeds] = iter(samples)

    def get_next(self) -> Feeds | None:
        """The next sample, None after the last."""
        return next(self._left, None)


def static(
    activations: QuantType, form: QuantFormat, **options: Any
) -> Callable[[Path, Path, list[Feeds]], None]:
    def quantize(model: Path, output: Path, samples: list[Feeds]) -> None:
        only = options.get("op_types_to_quantize", [])
        ops = {node.op_type for node in onnx.load(model, load_external_data=False).graph.node}
        if only and not ops & set(only):
            raise ValueError(f"it has no {', '.join(only)}")
        quantize_static(model, output, Reader(samples), form, activation_type=activations,
                        weight_type=QuantType.QInt8, **options)  # fmt: skip

    return quantize


def dynamic(weights: QuantType, per_channel: bool) -> Callable[[Path, Path, list[Feeds]], None]:
    def quantize(model: Path, output: Path, samples: list[Feeds]) -> None:
        quantize_dynamic(model, output, weight_type=weights, per_channel=per_channel)

    return quantize


def by_nncf(model: Path, output: Path, samples: list[Feeds]) -> None:
    import nncf

    content = onnx.load(model)
    is_transformer = not any(node.op_type == "Conv" for node in content.graph.node)
    kind = nncf.ModelType.TRANSFORMER if is_transformer else None
    dataset = nncf.Dataset(samples)
    onnx.save(nncf.quantize(content, dataset, model_type=kind, subset_size=len(samples)), output)


WAYS: dict[str, Callable[[Path, Path, list[Feeds]], None]] = {
    "ort-dynamic": dynamic(QuantType.QInt8, per_channel=True),
    "ort-dynamic-uint8": dynamic(QuantType.QUInt8, per_channel=False),
    "ort-static-qdq": static(QuantType.QUInt8, QuantFormat.QDQ, per_channel=True),
    "ort-static-qdq-int8": static(QuantType.QInt8, QuantFormat.QDQ, per_channel=True),
    "ort-static-qdq-matmul": static(
        QuantType.QUInt8, QuantFormat.QDQ, per_channel=True, op_types_to_quantize=["MatMul"],
        extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
    ),
    "ort-static-qoperator": static(QuantType.QUInt8, QuantFormat.QOperator),
    "nncf": by_nncf,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="a folder of samples per model")
    parser.add_argument("--work", type=Path, required=True, help="for quantized models and bundles")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=3.0, help="per model and threads")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--no-timing", action="store_true", help="choose kernels by cost model")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    ort.set_default_logger_severity(3)
    rows = []
    for model in arguments.models:
        data = arguments.data / model.stem
        samples = [dict(np.load(file)) for file in sorted(data.glob("*.npz"))]
        for way in arguments.ways:
            source = arguments.work / f"{model.stem}-{way}.onnx"
            bundle = source.with_suffix("")
            if made(model, way, source, samples) and not bundle.is_dir():
                report = qcompiler.compile(
                    source, "x86-int8", bundle, timing=not arguments.no_timing
                )
                print(source.stem, report.notes or "", (report.choices or {}).get("lost") or "")
            if bundle.is_dir() and not arguments.compile_only:
                rows.append(measure(source, bundle, data, samples, arguments.seconds))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def made(model: Path, way: str, output: Path, samples: list[Feeds]) -> bool:
    """Whether there is a quantized model, made now if there was none."""
    if not output.exists():
        try:
            WAYS[way](model, output, samples)
        except Exception as error:
            # What a tool cannot do to a model is its own affair.
            print(f"{output.stem}: not made: {type(error).__name__}: {str(error)[:200]}")
    return output.exists()


def measure(
    source: Path, bundle: Path, data: Path, samples: list[Feeds], seconds: float
) -> dict[str, Any]:
    """Agreement on the samples, and times on one and two threads; printed too."""
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = outputs(ort.InferenceSession(source), samples)
    row: dict[str, Any] = {
        "model": source.stem,
        "bundle": agreement(expected, outputs(qcompiler.load(bundle), samples)),
        "itself": agreement(expected, outputs(ort.InferenceSession(source, plain), samples)),
        "ms": {},
    }
    for result in bench(bundle, source, threads=THREADS, data=data, seconds=seconds).results:
        row["ms"][result.threads] = {
            "source": result.model.median * 1e3, "bundle": result.bundle.median * 1e3,
            "ratio": 1 / result.speedup, "ratio_of_fastest": 1 / result.speedup_of_minima,
        }  # fmt: skip
    agreements = "  ".join(
        f"{name} {row[name]['sqnr_db']:6.1f} dB {row[name]['cosine']:.5f}"
        for name in ("bundle", "itself")
    )
    times = "  ".join(
        f"{threads} thr {t['source']:7.2f} -> {t['bundle']:7.2f} ms "
        f"{t['ratio']:.2f} ({t['ratio_of_fastest']:.2f})"
        for threads, t in row["ms"].items()
    )
    print(f"{source.stem:34}{agreements}  {times}", flush=True)
    return row


def outputs(session: ort.InferenceSession, samples: list[Feeds]) -> np.ndarray[Any, Any]:
    """The first result for every sample, in one row."""
    return np.concatenate([session.run(None, sample)[0].ravel() for sample in samples])


def agreement(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> dict[str, float]:
    """SQNR in dB, at most 200, and cosine."""
    a, b = expected.astype(np.float64), got.astype(np.float64)
    noise = max(np.square(a - b).sum(), np.square(a).sum() * 1e-20)
    cosine = a @ b / np.sqrt(np.square(a).sum() * np.square(b).sum())
    return {"sqnr_db": float(10 * np.log10(np.square(a).sum() / noise)), "cosine": float(cosine)}


if __name__ == "__main__":
    main()

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
are as large as its rounding itself: how far ONNX Runtime is from that as it comes, with exact sums
and with its optimizers off, says how much that makes.  What matters then is that the bundle is as
near to the FP32 model as its source.

Times are those of the source as it comes, and once more with exact sums where its own saturate.

`--data` holds a folder of samples for each file, called like it without `.onnx`; a quantized model
without one is fed made-up inputs.  Files that exist in `--work` are not made again: compile first,
and time when the machine is quiet, some `--ways` at a time: rows of other models stay in the file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from contenders import Feeds
from imported_agreement import agreements, layers
from never_slower import THREADS, samples_of
from onnx.version_converter import convert_version
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from timing import environment

import qcompiler
from qcompiler.bench import bench
from qcompiler.frontend import onnx_file
from qcompiler.timing.exact_source import exact_source


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


def by_onnxsim(name: str, **options: Any) -> Callable[[Path, Path, list[Feeds]], None]:
    def quantize(model: Path, output: Path, samples: list[Feeds]) -> None:
        import onnxsim

        # Before opset 21 it leaves alone what it would store in 4 or 16 bits.
        content = convert_version(onnx.load(model), 21)
        calibration = {"calibration_data": samples} if name in _CALIBRATED else {}
        quantized = getattr(onnxsim, name)(content, **calibration, **options)
        if not {node.op_type for node in quantized.graph.node} - {
            node.op_type for node in content.graph.node
        }:
            raise ValueError("it leaves the model as it is")
        onnx.save(quantized, output)

    return quantize


_CALIBRATED = ("quantize_static", "quantize_static_int16", "quantize_qoperator")

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
    "onnxsim-dynamic": by_onnxsim("quantize_dynamic"),
    "onnxsim-dynamic-fused": by_onnxsim("quantize_dynamic_matmul_integer_to_float"),
    "onnxsim-static": by_onnxsim("quantize_static"),
    "onnxsim-static-full": by_onnxsim("quantize_static", full_graph=True),
    "onnxsim-static-int16": by_onnxsim("quantize_static_int16"),
    "onnxsim-qoperator": by_onnxsim("quantize_qoperator"),
    "onnxsim-weight-only": by_onnxsim("quantize_weight_only"),
    "onnxsim-int8-block": by_onnxsim("quantize_weight_only_int8_block"),
    "onnxsim-int4": by_onnxsim("quantize_weight_only_int4"),
    "onnxsim-matmul-nbits": by_onnxsim("quantize_weight_only_matmul_nbits"),
}  # fmt: skip


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
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    ort.set_default_logger_severity(4)
    rows = kept(arguments.json)
    for source, data, original in sources(arguments):
        try:
            bundle = compiled(source, arguments.work / source.stem, data, not arguments.no_timing)
            if not arguments.compile_only:
                seconds = 0.0 if arguments.untimed else arguments.seconds
                row = measure(source, bundle, data, original, seconds)
                rows[source.stem] = row | {"chosen_by_timing": not arguments.no_timing}
        except Exception as error:
            # One model that cannot be had is no reason to measure no other.
            print(f"{source.stem}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            rows[source.stem] = {"error": f"{type(error).__name__}: {error}"[:300]}
        if arguments.json:
            result = environment() | {
                "quantized_by": tools(),
                "load": os.getloadavg(),
                "rows": [{"model": model} | row for model, row in rows.items()],
            }
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def kept(file: Path | None) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run, by model."""
    rows = json.loads(file.read_text())["rows"] if file is not None and file.exists() else []
    return {row["model"]: row for row in rows}


def sources(arguments: argparse.Namespace) -> Iterator[tuple[Path, Path, Path | None]]:
    """Every quantized model, the folder of its samples, and the FP32 model where it is at hand."""
    for model in arguments.models:
        data = arguments.data / model.stem
        for way in arguments.ways:
            source = arguments.work / f"{model.stem}-{way}.onnx"
            if made(model, way, source, samples_in(data)):
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
            print(
                f"{model.stem}: not taken: {type(error).__name__}: {str(error)[:300]}", flush=True
            )
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
    source: Path, bundle: Path, data: Path, original: Path | None, seconds: float
) -> dict[str, Any]:
    """Agreement on the samples, layers, and times on one and two threads if any; printed too."""
    samples = samples_in(data)
    with onnx_file(source) as file:
        row = {"model": source.stem, **agreements(file, bundle, original, samples)}
        row |= layers(bundle)
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

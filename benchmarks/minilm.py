"""MiniLM-L6-v2 for x86-int8: speed, accuracy and cost of compiling, against ONNX Runtime.

    pip install '.[cpu,zig]' torch transformers tokenizers scipy
    python benchmarks/minilm.py --sts sts-dev.csv --json benchmarks/results/minilm.json

Peers: ORT in FP32 and ORT's dynamic INT8 (per channel, MatMul only), each as exported and with the
SkipLayerNormalization fusion off (it is slower than what it replaces on this model); where openvino
and nncf are installed also OpenVINO in FP32, at its default precision, and NNCF's INT8 (transformer
preset, calibrated with 300 sentences).  Sessions run in turn; the idle threads do not spin.
`--sts` and `--train` are splits of the STS benchmark (tab separated, score and two sentences in
columns 5 to 7).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import QuantType, quantize_dynamic

import qcompiler

SHAPES = ((1, 16), (1, 128), (8, 128))
Make = Callable[[int], ort.InferenceSession]


def options(threads: int) -> ort.SessionOptions:
    result = ort.SessionOptions()
    result.intra_op_num_threads = threads
    result.add_session_config_entry("session.force_spinning_stop", "1")
    result.log_severity_level = 3
    return result


def stock(path: Path, disabled: list[str]) -> Make:
    """Makes sessions of an ONNX file, some of ORT's optimizers off."""
    return lambda threads: ort.InferenceSession(
        path, options(threads), disabled_optimizers=disabled
    )


def bundle(path: Path, native: bool = True) -> Make:
    """Makes sessions of a bundle."""
    return lambda threads: qcompiler.load(path, session_options=options(threads), native=native)


def contenders(model: Path, dynamic: Path, compiled: Path) -> dict[str, Make]:
    """Session makers by name; the first is what ratios refer to."""
    unfused = ["SkipLayerNormFusion"]
    return {
        "ORT FP32": stock(model, []),
        "ORT FP32, SkipLayerNorm off": stock(model, unfused),
        "ORT dynamic INT8": stock(dynamic, []),
        "ORT dynamic INT8, SkipLayerNorm off": stock(dynamic, unfused),
        "qcompiler x86-int8": bundle(compiled),
        "qcompiler, bodies only": bundle(compiled, native=False),
    }


def optional_peers(model: Path, tokenizer_file: Path, train: Path | None) -> dict[str, Make]:
    """OpenVINO's sessions, if it is installed and there is something to calibrate NNCF with."""
    try:
        import nncf  # noqa: F401
        import openvino  # noqa: F401
    except ImportError as error:
        print(f"without OpenVINO: {error}")
        return {}
    if train is None:
        print("without OpenVINO: --train gives no sentences to calibrate with")
        return {}
    from peers import openvino_peers

    sentences = [row[5] for row in read_sts(train)[:300]]
    tokenizer = load_tokenizer(tokenizer_file)
    return openvino_peers(model, [encode(tokenizer, [sentence]) for sentence in sentences])


def read_sts(path: Path) -> list[list[str]]:
    """The rows of a split of the STS benchmark."""
    with path.open(encoding="utf-8") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def load_tokenizer(path: Path) -> Any:
    """The model's tokenizer, padding to the longest and cutting at 128."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    return tokenizer


def encode(tokenizer: Any, sentences: list[str]) -> dict[str, Any]:
    """The model's inputs for a batch of sentences."""
    encoded = tokenizer.encode_batch(sentences)
    return {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
    }


def interleave(sessions: dict[str, Any], feeds: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Milliseconds per run, {"median", "min"} by name, runs alternating for `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(None, feeds)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 7:
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feeds)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {n: {"median": statistics.median(t), "min": min(t)} for n, t in times.items()}


def measure_speed(makers: dict[str, Make], seconds: float) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for threads in (1, 2):
        sessions = {name: make(threads) for name, make in makers.items()}
        for shape in SHAPES:
            feeds = {
                "input_ids": rng.integers(1000, 20000, shape),
                "attention_mask": np.ones(shape, np.int64),
            }
            times = interleave(sessions, feeds, seconds)
            rows.append({"threads": threads, "shape": list(shape), "ms": times})
            base = times["ORT FP32"]
            print(f"\n{shape[0]}x{shape[1]}, {threads} thread{'s' * (threads > 1)}")
            for name, t in times.items():
                ratio = f"{base['median'] / t['median']:.2f} ({base['min'] / t['min']:.2f})"
                print(f"  {name:38}{t['median']:9.2f} ms  min {t['min']:8.2f}   x {ratio}")
    return rows


def measure_opening(makers: dict[str, Make], rounds: int = 7) -> dict[str, float]:
    """Median milliseconds to create a session."""
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            start = time.perf_counter()
            make(1)
            times[name].append(1e3 * (time.perf_counter() - start))
    print("\nsession creation, median ms:")
    for name, values in times.items():
        print(f"  {name:38}{statistics.median(values):9.1f}")
    return {name: statistics.median(values) for name, values in times.items()}


def measure_sts(makers: dict[str, Make], sts: Path, tokenizer_file: Path) -> dict[str, Any]:
    """Spearman's rho on STS-B, and the SQNR of the sentence vectors against ORT FP32."""
    from scipy.stats import spearmanr

    rows, tokenizer = read_sts(sts), load_tokenizer(tokenizer_file)
    scores = [float(row[4]) for row in rows]
    sentences = [row[5] for row in rows] + [row[6] for row in rows]
    order = np.argsort([len(s) for s in sentences])
    result: dict[str, Any] = {}
    reference = None
    print(f"\nSTS-B, {len(rows)} pairs:")
    for name, make in makers.items():
        if name.endswith("off"):
            continue  # the same numbers
        session, vectors = make(2), np.zeros((len(sentences), 384))
        for start in range(0, len(order), 32):
            index = order[start : start + 32]
            feeds = encode(tokenizer, [sentences[i] for i in index])
            hidden, mask = session.run(None, feeds)[0], feeds["attention_mask"]
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            vectors[index] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        reference = vectors if reference is None else reference
        cosine = (vectors[: len(rows)] * vectors[len(rows) :]).sum(1)
        noise = np.square(vectors - reference).sum()
        entry = {
            "spearman": 100 * float(spearmanr(cosine, scores).statistic),
            "sqnr_db": float(10 * np.log10(len(sentences) / noise)) if noise else None,
        }
        result[name] = entry
        noise_text = "" if entry["sqnr_db"] is None else f"  SQNR {entry['sqnr_db']:.1f} dB"
        print(f"  {name:38}{entry['spearman']:9.2f}{noise_text}")
    return result


def measure_compile(model: Path, folder: Path) -> dict[str, Any]:
    """Wall seconds and peak memory of `qcompile`, with an empty and with a filled kernel cache."""
    result = {}
    environment = os.environ | {"QCOMPILER_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "qcompiler.cli", model, "--target", "x86-int8", "-q"]
    print()
    for name in ("cold", "warm"):
        start = time.perf_counter()
        process = subprocess.Popen([*command, "-o", folder / name], env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, f"qcompile failed ({status})"
        entry = {"seconds": time.perf_counter() - start, "peak_mib": usage.ru_maxrss / 1024}
        result[name] = entry
        print(f"compile, {name} cache: {entry['seconds']:.1f} s, peak {entry['peak_mib']:.0f} MiB")
    return result


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sts", type=Path, help="dev split of the STS benchmark")
    parser.add_argument("--train", type=Path, help="train split, to calibrate NNCF with")
    parser.add_argument("--seconds", type=float, default=8.0, help="per shape and thread count")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    model, tokenizer = models.minilm()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        quantize_dynamic(model, folder / "dynamic.onnx", weight_type=QuantType.QInt8,
                         per_channel=True, op_types_to_quantize=["MatMul"])  # fmt: skip
        compiled = measure_compile(model, folder)
        makers = contenders(model, folder / "dynamic.onnx", folder / "warm")
        makers |= optional_peers(model, tokenizer, arguments.train)
        content = {
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
            "versions": {"qcompiler": "0.1.0", "onnxruntime": ort.__version__,
                         "python": platform.python_version()},
            "compile": compiled,
            "session_ms": measure_opening(makers),
            "speed": measure_speed(makers, arguments.seconds),
            "sts": measure_sts(makers, arguments.sts, tokenizer) if arguments.sts else None,
        }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

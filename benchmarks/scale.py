"""What large models cost to compile: python benchmarks/scale.py [--json FILE] [--folder DIR].

1. Files of 500 MB and 3 GB, weights in external data: import, passes, kernels and writing, each in
   a process of its own, without timing candidates and with kernels cached.  Memory is that which
   the process cannot do without (RssAnon, sampled): pages of the model's file that are mapped and
   clean count in its resident size, but the system takes them back when it needs them.
2. Graphs of 1000, 10 000 and 100 000 nodes: processor seconds per pass, and for verifying after it.
   smooth-activations runs the model in ONNX Runtime, which is most of its time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from many_nodes import GraphBuilder
from onnx import TensorProto, helper
from timing import environment

TARGETS = ("x86-int8", "x86-int4")
WIDTH = 4096
FILES = {"warm-up": 3, "500 MB": 8, "3 GB": 45}
"""Weights of 64 MiB in each file."""

NODES = (1000, 10_000, 100_000)


def write_file(path: Path, weights: int) -> int:
    """Blocks of norm, MatMul, Relu and MatMul; the second weight is the same in all. Its bytes."""
    random, shape = np.random.default_rng(0), [WIDTH, WIDTH]
    base = random.standard_normal(shape, dtype=np.float32) / WIDTH**0.5
    initializers, nodes, value = [], [], "x"

    def add(name: str, array: np.ndarray, file: Any) -> None:
        tensor = TensorProto(name=name, dims=array.shape, data_type=TensorProto.FLOAT)
        file.write(bytes(-file.tell() % 4096))
        place = {"location": "weights.bin", "offset": file.tell(), "length": array.nbytes}
        for key, number in place.items():
            tensor.external_data.add(key=key, value=str(number))
        tensor.data_location = TensorProto.EXTERNAL
        array.tofile(file)
        initializers.append(tensor)

    with path.with_name("weights.bin").open("wb") as file:
        add("shared", base, file)
        add("gamma", np.ones(WIDTH, np.float32), file)
        for i in range(weights - 1):
            add(f"w{i}", np.roll(base, i + 1, axis=1), file)
            nodes += [
                helper.make_node("LayerNormalization", [value, "gamma"], [f"n{i}"]),
                helper.make_node("MatMul", [f"n{i}", f"w{i}"], [f"p{i}"]),
                helper.make_node("Relu", [f"p{i}"], [f"r{i}"]),
                helper.make_node("MatMul", [f"r{i}", "shared"], [f"y{i}"]),
            ]
            value = f"y{i}"
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", WIDTH])
        for name in ("x", value)
    ]
    graph = helper.make_graph(nodes, "scale", ends[:1], ends[1:], initializers)
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return sum(file.stat().st_size for file in path.parent.iterdir())


def anonymous_memory() -> int:
    """Bytes of this process that no file holds."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) << 10


def compile_here(source: str, target: str, output: str) -> None:
    """Compile in this process, and print what it took."""
    import qcompiler
    import qcompiler.targets.library  # TVM, which is no part of a model's memory

    at_first = peak = anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        report = qcompiler.compile(source, target, output, timing=False)
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    result = {
        "seconds": seconds,
        "phases": report.seconds,
        "imports_mib": at_first / 2**20,
        "peak_mib": peak / 2**20,
        "resident_peak_mib": report.peak_memory / 2**20,
    }
    print(json.dumps(result))


def measure_file(folder: Path, target: str) -> dict[str, Any]:
    """What compiling the file in `folder` takes in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as output:
        command = [sys.executable, __file__, "--compile", folder / "model.onnx", target]
        run = subprocess.run([*command, f"{output}/bundle"], stdout=subprocess.PIPE, check=True)
        size = sum(file.stat().st_size for file in Path(output, "bundle").iterdir())
    result: dict[str, Any] = json.loads(run.stdout) | {"bundle_bytes": size}
    return result


def measure_files(folder: Path) -> list[dict[str, Any]]:
    """Every file for every target."""
    rows = []
    print(f"{'':22}{'seconds':>9}{'peak':>10}{'imports':>10}{'resident':>10}   MiB; slowest phases")
    for name, weights in FILES.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        size = write_file(place / "model.onnx", weights)
        for target in TARGETS:
            row = {"file": name, "bytes": size, "target": target} | measure_file(place, target)
            slowest = sorted(row["phases"].items(), key=lambda phase: -phase[1])[:4]
            print(
                f"{name:12}{target:10}{row['seconds']:9.1f}{row['peak_mib']:10.0f}"
                f"{row['imports_mib']:10.0f}{row['resident_peak_mib']:10.0f}   "
                + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in slowest)
            )
            rows += [row] if name != "warm-up" else []
        for file in place.iterdir():
            file.unlink()
    return rows


def measure_passes(nodes: int, target: str) -> dict[str, Any]:
    """Processor seconds per pass, and for verifying the model after it."""
    from qcompiler.ir.stages import source_problems, verify
    from qcompiler.pipeline import Pipeline
    from qcompiler.targets.catalog import get_target

    model = GraphBuilder().build(nodes)
    passes, verifying = {}, {}
    known = source_problems(model)
    for step in Pipeline.default(get_target(target)):
        start = time.process_time()
        model = step.rewritten(model).model
        passes[step.name] = time.process_time() - start
        verify(model, step.stage, step.name, known)
        verifying[step.name] = time.process_time() - start - passes[step.name]
    return {"nodes": nodes, "target": target, "passes": passes, "verify": verifying}


def measure_graphs(counts: Sequence[int]) -> list[dict[str, Any]]:
    """Every size for the first target, printed side by side."""
    rows = [measure_passes(count, TARGETS[0]) for count in counts]
    print(f"\n{'seconds per pass + verifying':24}" + "".join(f"{count:>18}" for count in counts))
    for name in rows[0]["passes"]:
        times = "".join(f"{row['passes'][name]:10.3f} +{row['verify'][name]:6.3f}" for row in rows)
        print(f"{name:28}{times}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where 4 GB are free; the system's by default")
    parser.add_argument("--only", choices=("files", "graphs"), help="the others stay in the file")
    parser.add_argument("--nodes", type=int, nargs="*", default=NODES)
    parser.add_argument("--compile", nargs=3, metavar=("MODEL", "TARGET", "OUTPUT"))
    arguments = parser.parse_args()
    if arguments.compile:
        compile_here(*arguments.compile)
        return
    kept = arguments.json is not None and arguments.json.exists()
    result = (json.loads(arguments.json.read_text()) if kept else {}) | environment()
    if arguments.only != "graphs":
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            result["files"] = measure_files(Path(folder))
    if arguments.only != "files":
        result["graphs"] = measure_graphs(arguments.nodes)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What zero points of int4 weights cost while a model runs: the products of one layer, in a chain.

    pip install '.[cpu]'
    python benchmarks/offsets.py bundles/ --build          # some minutes, once
    python benchmarks/offsets.py bundles/ --json FILE      # nothing else on the machine

Each kind of groups (of 32) is compiled for x86-int4 with float activations: of such bodies ONNX
Runtime makes MatMulNBits, at accuracy level 4.  And it is written for ONNX Runtime alone (`--emit
ort`), at the same level, where that op has the zero points.  Sessions take turns; figures are
milliseconds of a chain.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from timing import environment, interleave

import qcompiler

KINDS = {
    "none": {},
    "integer": {"zero_points": "integer"},
    "float": {"zero_points": "float"},
    "float of 8 bits": {"zero_points": "float", "scales": "int8"},
}
"""What a rule for products says of their groups."""

LAYERS = {
    "MiniLM": (384, 384, 384, 384, 384, 1536, 384),
    "SmolLM2": (576, 576, 192, 192, 576, 1536, 576),
}
"""The widths between the products of a layer."""

ROWS = (1, 128)


def chain(widths: tuple[int, ...]) -> onnx.ModelProto:
    """Products of made-up weights, one on the result of the other."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for index, (depth, width) in enumerate(itertools.pairwise(widths)):
        weight = rng.standard_normal((depth, width)).astype(np.float32) / np.sqrt(depth)
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w{index}"))
        nodes.append(helper.make_node("MatMul", [f"x{index}", f"w{index}"], [f"x{index + 1}"],
                                      name=f"product_{index}"))  # fmt: skip
    value = helper.make_tensor_value_info
    first = value("x0", TensorProto.FLOAT, ["n", widths[0]])
    last = value(f"x{len(nodes)}", TensorProto.FLOAT, ["n", widths[-1]])
    graph = helper.make_graph(nodes, "layer", [first], [last], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def build(folder: Path) -> None:
    """Compile every layer in every kind, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for layer, widths in LAYERS.items():
        source = folder / f"{layer}.onnx"
        onnx.save(chain(widths), source)
        for kind, says in KINDS.items():
            _compile(source, _bundle(folder, layer, kind), "bundle", says | {"activation": "float"})
            _compile(source, _file(folder, layer, kind), "ort", says | {"activation": "dynamic"})


def _compile(source: Path, output: Path, emit: str, says: dict[str, str]) -> None:
    rule = {"op": "MatMul", "precision": "int4", "group_size": 32} | says
    if not output.exists():
        recipe = qcompiler.Recipe(nodes=[rule])
        qcompiler.compile(source, "x86-int4", output, recipe=recipe, timing=False, emit=emit)
        print("built", output, flush=True)


def _bundle(folder: Path, layer: str, kind: str) -> Path:
    return folder / f"{layer}, {kind}"


def _file(folder: Path, layer: str, kind: str) -> Path:
    return folder / f"{layer}, {kind}, ort" / "model.onnx"


def sessions(folder: Path, layer: str, threads: int) -> Mapping[str, ort.InferenceSession]:
    """All kinds of a layer, in both forms; the first is what others are compared with."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    opened = {f"bundle, {kind}": qcompiler.load(_bundle(folder, layer, kind),
                                                session_options=options)
              for kind in KINDS}  # fmt: skip
    files = {
        f"ORT, {kind}": ort.InferenceSession(str(_file(folder, layer, kind)), options)
        for kind in KINDS
    }
    return opened | files


def measure(folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of every kind by layer, rows and threads."""
    found = []
    for layer, widths in LAYERS.items():
        for threads in (1, 2):
            opened = sessions(folder, layer, threads)
            for rows in ROWS:
                data = np.random.default_rng(1).standard_normal((rows, widths[0]))
                times = interleave(opened, {"x0": data.astype(np.float32)}, seconds)
                found.append({"layer": layer, "threads": threads, "rows": rows, "ms": times})
                print(f"\n{layer}, {rows} rows, {threads} threads")
                base = next(iter(times.values()))
                for name, t in times.items():
                    ratio = f"{t['median'] / base['median']:.2f} ({t['min'] / base['min']:.2f})"
                    print(f"  {name:28}{t['median']:9.3f} ms  min {t['min']:8.3f}  x {ratio}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where what is compiled lies")
    parser.add_argument("--build", action="store_true", help="compile, and measure nothing")
    parser.add_argument("--seconds", type=float, default=12, help="for each of 8 comparisons")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    if arguments.build:
        return build(arguments.folder)
    rows = measure(arguments.folder, arguments.seconds)
    if arguments.json:
        content = {"environment": environment(), "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()

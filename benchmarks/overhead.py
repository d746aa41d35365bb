"""What a node costs beside its work: python benchmarks/overhead.py [--json FILE].

Sessions with 10 and with 100 copies of an op on one row of 16 values, whose results nobody reads;
the slope between them is the price of one node, its work included (20 to 70 ns), free of what a run
and its outputs cost.  Beside each op of ours stands ONNX Runtime's own for that job, which need not
do as much: MatMulInteger has no scales and no bias.  What ONNX Runtime takes to allocate a result
(170 ns on a Zen 3, by a profiler) is in each price, once per result.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from timing import environment

from qcompiler.ir.region import Region, Step
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.library import build_library

DOMAIN, SIZE, FEW, MANY = "qcompiler.benchmark", 16, 10, 100
QUANTIZE = Region("Quantize", (("K", SIZE),))
PRODUCT = Region("QMatMulW8A8", (("K", SIZE), ("N", SIZE)), ("channel",), (Step("Add", (0, -1)),))
NORM = Region("LayerNorm", (("K", SIZE),), outputs=("y",), attributes=(("epsilon", 1e-5),))
INPUTS = {
    "x": np.linspace(-1, 1, SIZE, dtype=np.float32)[None],
    "q": np.arange(120, 120 + SIZE, dtype=np.uint8)[None],
    "s": np.full((1, 1), 0.1, np.float32),
}
CONSTANTS = {
    "w": np.ones((SIZE, SIZE), np.int8),
    "ws": np.ones(SIZE, np.float32),
    "b": np.ones(SIZE, np.float32),
}


@dataclass(frozen=True)
class Op:
    """An op on these inputs, its results named by the session."""

    label: str
    name: str
    inputs: tuple[str, ...]
    results: int = 1
    domain: str = ""


OPS = [
    Op("ORT Relu", "Relu", ("x",)),
    Op("ORT LayerNormalization", "LayerNormalization", ("x", "b", "b")),
    Op("LayerNorm", NORM.name, ("x", "b", "b"), 1, DOMAIN),
    Op("ORT DynamicQuantizeLinear", "DynamicQuantizeLinear", ("x",), 3),
    Op("Quantize", QUANTIZE.name, ("x",), 2, DOMAIN),
    Op("ORT MatMulInteger", "MatMulInteger", ("q", "w")),
    Op("QMatMulW8A8 + bias", PRODUCT.name, ("q", "s", "w", "ws", "b"), 1, DOMAIN),
]


def value(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, dtype, array.shape)


def session(op: Op, copies: int, library: Path) -> ort.InferenceSession:
    nodes = [
        helper.make_node(
            op.name, op.inputs, [f"y{i}_{j}" for j in range(op.results)], domain=op.domain
        )
        for i in range(copies)
    ]
    given = [name for name in dict.fromkeys(op.inputs) if name in INPUTS]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Identity", [given[0]], ["read"])],
        "overhead",
        [value(name, INPUTS[name]) for name in given],
        [value("read", INPUTS[given[0]])],
        [numpy_helper.from_array(a, name) for name, a in CONSTANTS.items() if name in op.inputs],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    # Else ONNX Runtime makes one node of equal ones.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options)


def bind(opened: ort.InferenceSession) -> ort.IOBinding:
    binding = opened.io_binding()
    for given in opened.get_inputs():
        array = INPUTS[given.name]
        binding.bind_ortvalue_input(given.name, ort.OrtValue.ortvalue_from_numpy(array))
    space = np.empty_like(INPUTS[opened.get_inputs()[0].name])
    binding.bind_ortvalue_output("read", ort.OrtValue.ortvalue_from_numpy(space))
    return binding


def nanoseconds(rounds: int) -> dict[str, dict[str, float]]:
    """The price of one node, {"median", "min"} by op; all sessions take turns."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        build_library([QUANTIZE, PRODUCT, NORM], DOMAIN, library, cache=KernelCache())
        opened = {(op.label, n): session(op, n, library) for op in OPS for n in (FEW, MANY)}
    bound = {key: bind(one) for key, one in opened.items()}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in opened}
    gc.disable()
    for _ in range(rounds):
        for key, one in opened.items():
            start = time.perf_counter()
            one.run_with_iobinding(bound[key])
            times[key].append(time.perf_counter() - start)
    return {
        op.label: {
            name: 1e9 * (pick(times[op.label, MANY]) - pick(times[op.label, FEW])) / (MANY - FEW)
            for name, pick in (("median", statistics.median), ("min", min))
        }
        for op in OPS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    prices = nanoseconds(arguments.rounds)
    print(f"{'one node, its work included':32}{'ns':>8}{'fastest':>9}{'in Relus':>10}")
    for label, price in prices.items():
        relus = price["min"] / prices["ORT Relu"]["min"]
        print(f"{label:32}{price['median']:8.0f}{price['min']:9.0f}{relus:10.2f}")
    if arguments.json:
        result = {"environment": environment(), "nanoseconds": prices}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a node costs beside its work: python benchmarks/overhead.py [--json FILE].

Sessions with 4 and with 20 copies of an op on one row of 16 values; the slope between them is the
price of one node, its work included (a few nanoseconds), free of what a run costs by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from qcompiler.ir.region import Region, Step
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.library import build_library

DOMAIN, SIZE, FEW, MANY = "qcompiler.benchmark", 16, 4, 20
QUANTIZE = Region("Quantize", (("K", SIZE),))
PRODUCT = Region("QMatMulW8A8", (("K", SIZE), ("N", SIZE)), ("channel",), (Step("Add", (0, -1)),))
CONSTANTS = {
    "w": np.ones((SIZE, SIZE), np.int8),
    "ws": np.ones(SIZE, np.float32),
    "b": np.ones(SIZE, np.float32),
}
CALLS = {
    "ORT Relu": ("", "Relu", ["x"], ["y{}"]),
    "Quantize (two outputs)": (DOMAIN, QUANTIZE.name, ["x"], ["y{}", "s{}"]),
    "QMatMulW8A8 + bias": (DOMAIN, PRODUCT.name, ["q", "s", *CONSTANTS], ["y{}"]),
}


def session(call: str, copies: int, library: Path) -> ort.InferenceSession:
    domain, op, inputs, outputs = CALLS[call]
    nodes = [
        helper.make_node(op, inputs, [name.format(i) for name in outputs], domain=domain)
        for i in range(copies)
    ]
    value = helper.make_tensor_value_info
    known = {"x": TensorProto.FLOAT, "q": TensorProto.UINT8, "s": TensorProto.FLOAT}
    result = TensorProto.UINT8 if op == QUANTIZE.name else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "overhead",
        [value(n, known[n], [1, 1 if n == "s" else SIZE]) for n in inputs if n in known],
        [value(f"y{i}", result, [1, SIZE]) for i in range(copies)],
        [numpy_helper.from_array(CONSTANTS[n], n) for n in inputs if n in CONSTANTS],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options)


def bind(opened: ort.InferenceSession) -> ort.IOBinding:
    binding = opened.io_binding()
    for given in opened.get_inputs():
        dtype = np.uint8 if "uint8" in given.type else np.float32
        array = np.ones(given.shape, dtype)
        binding.bind_ortvalue_input(given.name, ort.OrtValue.ortvalue_from_numpy(array))
    for result in opened.get_outputs():
        dtype = np.uint8 if "uint8" in result.type else np.float32
        space = ort.OrtValue.ortvalue_from_shape_and_type([1, SIZE], dtype)
        binding.bind_ortvalue_output(result.name, space)
    return binding


def nanoseconds(runs: int) -> dict[str, float]:
    """Median price of one node, by op; all sessions take turns."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        build_library([QUANTIZE, PRODUCT], DOMAIN, library, cache=KernelCache())
        opened = {
            (call, n): session(call, n, library) for call in CALLS for n in (FEW, MANY)
        }  # fmt: skip
    bound = {key: bind(one) for key, one in opened.items()}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in opened}
    for _ in range(runs):
        for key, one in opened.items():
            start = time.perf_counter()
            one.run_with_iobinding(bound[key])
            times[key].append(time.perf_counter() - start)
    middle = {key: statistics.median(values) for key, values in times.items()}
    return {c: 1e9 * (middle[c, MANY] - middle[c, FEW]) / (MANY - FEW) for c in CALLS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    prices = nanoseconds(arguments.runs)
    for call, price in prices.items():
        print(f"{call:26}{price:8.0f} ns")
    if arguments.json:
        arguments.json.write_text(json.dumps(prices, indent=1) + "\n")


if __name__ == "__main__":
    main()

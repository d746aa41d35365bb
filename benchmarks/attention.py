"""Attention as one kernel, against ONNX Runtime's chain of ops and its MultiHeadAttention.

    python benchmarks/attention.py [--json] [--seconds 3]

`kernel` is our op in float32, `bf16` and `int8` the same where it may round, `chain` its function
body in stock ONNX Runtime (what a model has without the kernel), `fused` com.microsoft's
MultiHeadAttention.  All take [1, tokens, heads, D].  They are run in turn; figures are the best and
the median, in microseconds, and the multiply-adds per second of the best `kernel`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, parser
from onnx_ir import to_proto

from qcompiler.ir import dialect
from qcompiler.ir.region import Region
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.library import build_library

SHAPES = ((12, 128, 32), (12, 128, 64), (6, 1500, 64))
"""Heads, tokens and D of MiniLM, BERT and Whisper tiny."""
DOMAIN = "qcompiler.benchmark"
BURST = 10
PAUSE = 0.02
"""Seconds before a burst of runs, until the threads of the session before sleep."""


def region(d: int, *flags: str) -> Region:
    return Region("Attention", (("D", d),), flags=("ssss", *flags))


def body_model(heads: int, tokens: int, d: int, *flags: str) -> bytes:
    """One call of the region's function."""
    chosen = region(d, *flags)
    function = to_proto(dialect.region_function(chosen, DOMAIN, 21))
    shape = f"float[1,{tokens},{heads},{d}]"
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21, "{DOMAIN}" : 1]>\n'
        f"g ({shape} q, {shape} k, {shape} v) => ({shape} y) <float scale = {{{d**-0.5}}}> "
        f"{{ y = {DOMAIN}.{chosen.name} (q, k, v, scale) }}"
    )
    model.functions.append(function)
    return bytes(model.SerializeToString())


def fused_model(heads: int, tokens: int, d: int) -> bytes:
    """One MultiHeadAttention, which takes and gives [1, tokens, heads * D]."""
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, tokens, heads * d])
        for name in "qkvy"
    }
    node = helper.make_node(
        "MultiHeadAttention", list("qkv"), ["y"], domain="com.microsoft", num_heads=heads
    )
    graph = helper.make_graph([node], "g", [values[name] for name in "qkv"], [values["y"]])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


class Contestant:
    """A session with its inputs bound, so that a run is little more than its op."""

    def __init__(self, model: bytes, threads: int, library: Path | None, feeds: Any) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # The threads of the session before would hold a core that the next one needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if library is not None:
            options.register_custom_ops_library(str(library))
        self._session = ort.InferenceSession(model, options)
        self._binding = self._session.io_binding()
        for value in self._session.get_inputs():
            self._binding.bind_cpu_input(value.name, feeds[value.name].reshape(value.shape))
        self._binding.bind_output("y")
        self.samples: list[float] = []

    def run(self) -> None:
        """A few timed runs, of which the first wakes the threads."""
        time.sleep(PAUSE)
        for _ in range(BURST):
            start = time.perf_counter()
            self._session.run_with_iobinding(self._binding)
            self.samples.append(time.perf_counter() - start)

    def result(self) -> np.ndarray:
        """What one run gives."""
        self._session.run_with_iobinding(self._binding)
        return np.asarray(self._binding.copy_outputs_to_cpu()[0]).ravel()


def measure(shape: tuple[int, int, int], threads: int, library: Path, seconds: float) -> Any:
    heads, tokens, d = shape
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(heads * tokens * d).astype(np.float32) for name in "qkv"}
    contestants = {
        "kernel": Contestant(body_model(*shape), threads, library, feeds),
        "bf16": Contestant(body_model(*shape, "bf16"), threads, library, feeds),
        "int8": Contestant(body_model(*shape, "int8"), threads, library, feeds),
        "chain": Contestant(body_model(*shape), threads, None, feeds),
        "fused": Contestant(fused_model(*shape), threads, None, feeds),
    }
    results = [contestant.result() for contestant in contestants.values()]
    for other in results[1:]:
        np.testing.assert_allclose(results[0], other, rtol=0.03, atol=0.03)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for contestant in contestants.values():
            contestant.run()
    return {
        "shape": shape,
        "threads": threads,
        **{
            name: {"min": min(c.samples), "median": statistics.median(c.samples)}
            for name, c in contestants.items()
        },
    }


def line(row: dict[str, Any]) -> str:
    heads, tokens, d = row["shape"]
    figures = "".join(
        f"  {name} {row[name]['min'] * 1e6:8.1f} {row[name]['median'] * 1e6:8.1f}"
        for name in ("kernel", "bf16", "int8", "chain", "fused")
    )
    rate = 2 * heads * tokens * tokens * d / row["kernel"]["min"] / 1e9
    return f"{heads:3} x {tokens:5} x {d:3}  threads {row['threads']}{figures}  {rate:5.0f} Gmac/s"


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--json", action="store_true", help="print one JSON array")
    arguments.add_argument("--seconds", type=float, default=3.0, help="per shape and threads")
    options = arguments.parse_args()
    rows = []
    with TemporaryDirectory() as folder:
        library = Path(folder, "kernels.so")
        regions = [region(d, *flags) for *_, d in SHAPES for flags in ((), ("bf16",), ("int8",))]
        build_library(regions, DOMAIN, library, cache=KernelCache())
        for shape in SHAPES:
            for threads in (1, 2):
                rows.append(measure(shape, threads, library, options.seconds))
                if not options.json:
                    print(line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()

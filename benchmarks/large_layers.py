"""GPTQ of layers as large models have them, made up: time and memory, and what a model would take.

    python benchmarks/large_layers.py --json FILE                    # of Llama-7B
    python benchmarks/large_layers.py --shape 4096x11008

Each shape [K, N] is rounded in a process of its own, so that its peak memory is its own.  Samples
are made-up rows; of what grows with their number, second moments and the products themselves, some
are measured and the rest is multiplied out.  The projected time of a model is that of all its
layers, one after the other, with the products that run between them; attention is left out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from timing import environment

from qcompiler.ir.types import PerGroup, QuantType
from qcompiler.passes.gptq import GPTQ, round_one
from qcompiler.passes.second_moments import Moments

LLAMA_7B = {"4096x4096": 4 * 32, "4096x11008": 2 * 32, "11008x4096": 32}
"""How many layers of each shape it has; the head is left out."""

TOKENS, SAMPLE = 32 * 512, 512


def measure(k: int, n: int, group: int, rows: int) -> dict[str, Any]:
    """Seconds and MiB of one layer."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((k, n), np.float32)
    scales = np.exp(rng.standard_normal(k, np.float32))

    def samples() -> Iterator[tuple[str, np.ndarray]]:
        for index in range(rows // SAMPLE):
            yield f"sample {index}", rng.standard_normal((SAMPLE, k), np.float32) * scales

    made = list(samples())
    start = time.perf_counter()
    moments = Moments.of(made, k, "x")
    seen = time.perf_counter()
    for _, sample in made:
        _ = sample @ weight
    multiplied = time.perf_counter()
    del made
    type = QuantType(ir.DataType.INT4, granularity=PerGroup(0, group))
    _, note = round_one(weight, type, moments, GPTQ.Options())
    done, all_of_them = time.perf_counter(), TOKENS / rows
    return {
        "moments_seconds": (seen - start) * all_of_them,
        "product_seconds": (multiplied - seen) * all_of_them,
        "gptq_seconds": done - multiplied,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "note": note,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", action="append", help="KxN; by default those of Llama-7B")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rows", type=int, default=2048, help=f"that are measured, of {TOKENS}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"environment": environment(), "tokens": TOKENS, "layers": {}}
    spawn = multiprocessing.get_context("spawn")
    for shape in arguments.shape or LLAMA_7B:
        k, n = map(int, shape.split("x"))
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as executor:
            found = executor.submit(measure, k, n, arguments.group, arguments.rows).result()
        results["layers"][shape] = found
        print(shape, json.dumps(found), flush=True)
    if not arguments.shape:
        hours = sum(
            count * sum(v for key, v in results["layers"][shape].items() if key.endswith("seconds"))
            for shape, count in LLAMA_7B.items()
        )
        results["llama_7b_hours"] = hours / 3600
        print(f"all layers of Llama-7B: {hours / 3600:.1f} hours")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

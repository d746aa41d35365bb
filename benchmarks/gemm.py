"""How near the int8 kernels come to the machine: python benchmarks/gemm.py [--json] [--isa avx2].

Peak is vpdpbusd on registers, or vpmaddubsw, vpmaddwd and vpaddd for AVX2; stream is reading memory
once; both are measured here, on as many threads.  `loop` is the kernel storing its int32 sums, `op`
is Quantize and QMatMul + bias as ONNX Runtime runs them, in one node where a model would have one.
Everything is measured in turn, several times over; figures are the best and the median, in
microseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
from limits import Machine, Samples, aligned, best_isa, pointer
from onnx import TensorProto, helper, numpy_helper

from qcompiler.ir.region import Region, Step
from qcompiler.targets import tir
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.library import build_library
from qcompiler.targets.x86 import ISAS, Isa, supports
from qcompiler.targets.x86.qmatmul import accumulator_function
from qcompiler.targets.x86.tile import tile_shape
from qcompiler.targets.x86.w8_family import most_lacking

SHAPES = ((128, 384, 384), (128, 1536, 384), (512, 1024, 1024))
"""M, N, K."""
GEMV = (1, 4096, 4096)
COPIES = 16
"""Ops per timed run, so that Python's part in it is small; all store into the same memory, as ORT
reuses it between the nodes of a model."""
PAUSE = 0.02
"""Seconds before each measurement: threads of the session before spin for a while, on a core that
the next one needs."""
GEMV_COPIES = 16
"""Each op packs weights of its own: 16 times 16 MiB is as much as
`limits.STREAM_BYTES` and more than any cache holds."""
DOMAIN = "qcompiler.benchmark"


class Loops(Machine):
    """The machine's limits, and one accumulator kernel per shape."""

    def __init__(self, folder: Path, isa: Isa) -> None:
        functions = {f"loop_{m}_{n}_{k}": accumulator_function(k, n, isa) for m, n, k in SHAPES}
        kernels = tir.compile_object(functions, isa.mcpu, isa.features, isa.options)
        super().__init__(folder, isa, [kernels], list(functions))

    def loop(self, shape: tuple[int, int, int], threads: int) -> Callable[[], Samples]:
        """A measurement of one kernel's loop."""
        m, n, k = shape
        columns = tile_shape(n, self.isa).columns
        panels = -(-n // columns)
        # The values do not matter for the time, only where they lie.
        q, y = aligned(np.ones((m, k), np.uint8)), aligned(np.zeros((m, n), np.int32))
        weights = aligned(np.ones((panels * columns, k), np.int8))
        init = aligned(np.zeros(max(panels * columns, m), np.int32))
        # Rows that are split, and lack nothing.
        counts = init if most_lacking("QMatMulW8A8", self.isa) else None
        kernel = getattr(self._library, f"loop_{m}_{n}_{k}")
        arrays = [None if a is None else pointer(a) for a in (q, weights, init, counts, y)]

        def run() -> Samples:
            keep_alive = q, weights, init, y
            assert keep_alive
            return self._measure("measure_loop", kernel, *arrays, m, panels, threads, repeats=100)

        return run


def regions(shape: tuple[int, int, int]) -> list[Region]:
    """What a model would have for Quantize and a matrix multiplication with a bias."""
    _, n, k = shape
    product = Region("QMatMulW8A8", (("K", k), ("N", n)), ("channel",), (Step("Add", (0, -1)),))
    dynamic = dataclasses.replace(product, anchor="DynamicQMatMulW8A8")
    if supports(dynamic) is None:
        return [dynamic]
    return [Region("Quantize", (("K", k),)), product]


def copies_of(shape: tuple[int, int, int]) -> int:
    """How many ops a timed run has."""
    return GEMV_COPIES if shape == GEMV else COPIES


def model(shape: tuple[int, int, int]) -> bytes:
    """Quantize and multiply, `copies_of(shape)` times."""
    _, n, k = shape
    copies = copies_of(shape)
    *quantize, product = regions(shape)
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.integers(-127, 128, (k, n)).astype(np.int8),
        "ws": rng.random(n, np.float32),
        "b": rng.random(n, np.float32),
    }
    initializers = [numpy_helper.from_array(v, name) for name, v in constants.items()]
    nodes = []
    for i in range(copies):
        inputs = ["x"]
        for region in quantize:
            nodes.append(helper.make_node(region.name, inputs, [f"q{i}", f"s{i}"], domain=DOMAIN))
            inputs = [f"q{i}", f"s{i}"]
        nodes.append(
            helper.make_node(product.name, [*inputs, *constants], [f"y{i}"], domain=DOMAIN)
        )
    value = helper.make_tensor_value_info
    outputs = [value(f"y{i}", TensorProto.FLOAT, ["m", n]) for i in range(copies)]
    graph = helper.make_graph(
        nodes, "gemm", [value("x", TensorProto.FLOAT, ["m", k])], outputs, initializers
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return bytes(made.SerializeToString())


def whole_op(shape: tuple[int, int, int], threads: int, library: Path) -> Callable[[], Samples]:
    """A measurement of both ops in ONNX Runtime."""
    m, n, k = shape
    copies = copies_of(shape)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(model(shape), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    x = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(aligned(x)))
    y = ort.OrtValue.ortvalue_from_shape_and_type([m, n], np.float32)
    for i in range(copies):
        binding.bind_ortvalue_output(f"y{i}", y)

    def run() -> Samples:
        samples = []
        session.run_with_iobinding(binding)
        for _ in range(10):
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            samples.append((time.perf_counter() - start) / copies)
        return samples

    return run


def measure(rounds: int, isa: Isa) -> dict[str, Samples]:
    """All samples by name, taken in turn so that a busy moment touches all alike."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        loops = Loops(folder, isa)
        shapes = (*SHAPES, GEMV)
        library = folder / "libbenchmark.so"
        unique = list({region for shape in shapes for region in regions(shape)})
        build_library(unique, DOMAIN, library, cache=KernelCache(folder / "cache"))
        tasks: dict[str, Callable[[], Samples]] = {}
        for threads in (1, 2):
            tasks[f"peak {threads}"] = functools.partial(loops.peak, threads)
            tasks[f"stream {threads}"] = functools.partial(loops.stream, threads)
            for shape in shapes:
                if shape != GEMV:
                    tasks[f"loop {shape} {threads}"] = loops.loop(shape, threads)
                tasks[f"op {shape} {threads}"] = whole_op(shape, threads, library)
        samples: dict[str, Samples] = {task: [] for task in tasks}
        for _ in range(rounds):
            for task, run in tasks.items():
                time.sleep(PAUSE)
                samples[task] += run()
        return samples


def summarize(samples: dict[str, Samples]) -> list[dict[str, Any]]:
    """One row per shape and number of threads; `of_limit` is of peak, or for `GEMV` of stream."""
    best = {name: min(values) * 1e6 for name, values in samples.items()}
    middle = {name: statistics.median(values) * 1e6 for name, values in samples.items()}
    rows = []
    for threads in (1, 2):
        for shape in SHAPES:
            m, n, k = shape
            loop, op = f"loop {shape} {threads}", f"op {shape} {threads}"
            row: dict[str, Any] = {"shape": f"{m}x{n}x{k}", "threads": threads}
            row |= {"loop_us": best[loop], "loop_median_us": middle[loop]}
            row |= {"op_us": best[op], "op_median_us": middle[op]}
            row["of_limit"] = best[f"peak {threads}"] * 2 * m * n * k / best[loop]
            rows.append(row | {"op_to_loop": best[op] / best[loop]})
        _, n, k = GEMV
        op = f"op {GEMV} {threads}"
        row = {"shape": f"1x{n}x{k}", "threads": threads}
        row |= {"op_us": best[op], "op_median_us": middle[op]}
        rows.append(row | {"of_limit": best[f"stream {threads}"] * n * k / best[op]})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Microseconds as best (median)."""

    def timing(row: dict[str, Any], name: str) -> str:
        if f"{name}_us" not in row:
            return "-"
        return f"{row[f'{name}_us']:.1f} ({row[f'{name}_median_us']:.1f})"

    print(f"{'M x N x K':>15} {'threads':>8} {'loop us':>17} {'op us':>17} {'limit':>7} op/loop")
    for row in rows:
        ratio = f"{row['op_to_loop']:.2f}" if "op_to_loop" in row else "-"
        print(
            f"{row['shape']:>15} {row['threads']:8} {timing(row, 'loop'):>17} "
            f"{timing(row, 'op'):>17} {row['of_limit']:7.1%} {ratio:>7}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=5, help="times everything is measured")
    names = [isa.name for isa in ISAS]
    parser.add_argument(
        "--isa", choices=names, default=best_isa().name, help="default: %(default)s"
    )
    arguments = parser.parse_args()
    os.environ["QCOMPILER_ISA"] = arguments.isa
    samples = measure(arguments.rounds, ISAS[names.index(arguments.isa)])
    rows = summarize(samples)
    limits = {
        f"{name}_{unit}_{threads}": 1e-9 / min(samples[f"{name} {threads}"])
        for name, unit in (("peak", "gops"), ("stream", "gb_per_s"))
        for threads in (1, 2)
    }
    if arguments.json:
        json.dump({"limits": limits, "rows": rows}, sys.stdout, indent=1)
        return
    print("  ".join(f"{name} {value:.0f}" for name, value in limits.items()))
    print_table(rows)


if __name__ == "__main__":
    main()

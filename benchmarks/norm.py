"""Residual + LayerNorm + Quantize as one kernel, against its bytes and against ONNX Runtime.

    python benchmarks/norm.py [--json] [--rounds 5] [--isa avx2]

`kernel` is the bare kernel that reads a and b and writes y, q and s; `smoothed` multiplies by one
factor per channel before it quantizes; `stream` is a loop that only adds, with the same traffic: it
reads a and b, and writes y and a quarter as many bytes for q, with ordinary stores, so that both
fetch the lines they write and leave them in a cache for the next op.  Without are s, 4 bytes a row,
and gamma and beta, which are read again for every row but from a cache.

Rows are normally distributed about 0, as a residual stream is, or nearly: rows whose mean is more
than half of their deviation are swept once more (`off centre`).

`op` is the kernel as ONNX Runtime runs it; beside it ORT's own Add and LayerNormalization, the same
with our Quantize after them, and SkipLayerNormalization, which ORT makes of the two.  Everything is
measured in turn, several times over; figures are the best and the median, in microseconds, and the
ratio of medians to our own of that shape.  In an L3 that others use, and in its last megabytes,
medians say more of them than of the kernel.
"""

from __future__ import annotations

import argparse
import ctypes
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
from limits import aligned, best_isa, pointer
from onnx import TensorProto, helper, numpy_helper

from qcompiler.ir.region import Region
from qcompiler.targets import tir
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.library import build_library
from qcompiler.targets.toolchain import find_linker
from qcompiler.targets.x86 import ISAS, Isa
from qcompiler.targets.x86.norm import norm_function

SHAPES = ((128, 384), (128, 1024), (512, 1024), (2048, 1024), (4096, 4096))
"""Rows and columns: 0.6 MB, for an L2; 1.7, 7 and 27 MB, for an L3; and 218 MB."""
IN_ORT = SHAPES[0]
COPIES = 16
"""Ops per timed run, so that Python's part in it is small."""
PAUSE = 0.02
"""Seconds before each measurement, until the threads of the session before sleep."""
PAGE = 4096
"""In bytes.  Where arrays lie in theirs changes times by a fifth: it is the same for all kinds."""
DOMAIN = "qcompiler.benchmark"

KINDS = ("kernel", "off centre", "smoothed", "stream")
ARRAYS = ("a", "b", "gamma", "beta", "smoothing", "y", "q", "s")

Samples = list[float]


def region(k: int, smoothed: bool = False) -> Region:
    return Region(
        "AddLayerNorm",
        (("K", k),),
        extras=("channel",) if smoothed else (),
        outputs=("y", "q", "s"),
        attributes=(("epsilon", 1e-5),),
        flags=("smoothed",) if smoothed else (),
    )


class Work(ctypes.Structure):
    """`struct work` of norm.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("kernel", "smoothed", *ARRAYS)),
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("wide", ctypes.c_int64),
    )


class Loops:
    """The C part of this benchmark, linked with one kernel per width."""

    def __init__(self, folder: Path, isa: Isa) -> None:
        linker, self._wide = find_linker(), isa.vectors == ISAS[0].vectors
        widths = {k for _, k in SHAPES}
        functions = {f"kernel_{k}": norm_function(region(k), isa) for k in widths}
        functions |= {f"smoothed_{k}": norm_function(region(k, True), isa) for k in widths}
        source = Path(__file__).with_suffix(".c").read_text()
        objects = [
            linker.compile(source, {}),
            tir.compile_object(functions, isa.mcpu, isa.features, isa.options),
        ]
        path = folder / "norm.so"
        path.write_bytes(linker.link(objects, ["measure", *functions]))
        self._library = ctypes.CDLL(str(path))

    @functools.cache  # noqa: B019
    def _arrays(self, shape: tuple[int, int], mean: float) -> list[np.ndarray]:
        """Those of a shape, which all kinds share, each from the start of a page on."""
        m, k = shape
        rng = np.random.default_rng(0)
        floats = [rng.standard_normal(size, np.float32) for size in (m * k, m * k, k, k, k)]
        floats[0] += np.float32(mean)
        results = (np.zeros(m * k, np.float32), np.zeros(m * k, np.uint8), np.zeros(m, np.float32))
        return [aligned(array, PAGE) for array in (*floats, *results)]

    def work(self, shape: tuple[int, int], kind: str) -> Work:
        """Arrays of a shape, and what to do with them."""
        m, k = shape
        arrays = self._arrays(shape, 2.0 if kind == "off centre" else 0.0)
        kernel, smoothed = (
            ctypes.cast(getattr(self._library, f"{name}_{k}"), ctypes.c_void_p)
            for name in ("kernel", "smoothed")
        )
        if kind in ("smoothed", "stream"):
            kernel = None
        if kind != "smoothed":
            smoothed = None
        return Work(kernel, smoothed, *map(pointer, arrays), m, k, self._wide)

    def measure(self, work: Work, threads: int) -> Samples:
        """Seconds of each of some repetitions."""
        repeats = max(5, min(200, int(2e8 / (work.rows * work.k * 13))))
        seconds = (ctypes.c_double * repeats)()
        self._library.measure(ctypes.byref(work), threads, repeats, seconds)
        return list(seconds)


def nodes(kind: str, i: int, k: int) -> list[Any]:
    """One op of a kind, with results of its own."""
    make = helper.make_node
    y, q, s = f"y{i}", f"q{i}", f"s{i}"
    if kind == "op":
        return [make(region(k).name, ["a", "b", "gamma", "beta"], [y, q, s], domain=DOMAIN)]
    if kind == "ort skip":
        operands = ["a", "b", "gamma", "beta"]
        return [make("SkipLayerNormalization", operands, [y], domain="com.microsoft")]
    pair = [
        make("Add", ["a", "b"], [f"x{i}"]),
        make("LayerNormalization", [f"x{i}", "gamma", "beta"], [y]),
    ]
    if kind == "ort pair":
        return pair
    return [*pair, make(f"Quantize_K{k}", [y], [q, s], domain=DOMAIN)]


def model(kind: str, shape: tuple[int, int]) -> bytes:
    m, k = shape
    value = helper.make_tensor_value_info
    rng = np.random.default_rng(0)
    constants = [numpy_helper.from_array(rng.random(k, np.float32), n) for n in ("gamma", "beta")]
    outputs = {"y": (TensorProto.FLOAT, k)}
    if kind in ("op", "ort pair, our Quantize"):
        outputs |= {"q": (TensorProto.UINT8, k), "s": (TensorProto.FLOAT, 1)}
    graph = helper.make_graph(
        [node for i in range(COPIES) for node in nodes(kind, i, k)],
        "norm",
        [value(name, TensorProto.FLOAT, [1, m, k]) for name in "ab"],
        [value(f"{o}{i}", t, [1, m, n]) for i in range(COPIES) for o, (t, n) in outputs.items()],
        constants,
    )
    opsets = [helper.make_opsetid(*pair) for pair in (("", 20), (DOMAIN, 1), ("com.microsoft", 1))]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def in_ort(kind: str, shape: tuple[int, int], threads: int, library: Path) -> Callable[[], Samples]:
    """A measurement of one kind of op in ONNX Runtime; the pair stays a pair."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model(kind, shape), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    m, k = shape
    rng = np.random.default_rng(1)
    for name in "ab":
        data = aligned(rng.standard_normal((1, m, k), np.float32))
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(data))
    results = {
        "y": ort.OrtValue.ortvalue_from_shape_and_type([1, m, k], np.float32),
        "q": ort.OrtValue.ortvalue_from_shape_and_type([1, m, k], np.uint8),
        "s": ort.OrtValue.ortvalue_from_shape_and_type([1, m, 1], np.float32),
    }
    for output in session.get_outputs():
        binding.bind_ortvalue_output(output.name, results[output.name[0]])

    def run() -> Samples:
        samples = []
        session.run_with_iobinding(binding)
        for _ in range(20):
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            samples.append((time.perf_counter() - start) / COPIES)
        return samples

    return run


def measure(rounds: int, isa: Isa) -> dict[tuple[str, tuple[int, int], int], Samples]:
    """All samples by name, shape and threads, taken in turn."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        loops, library = Loops(folder, isa), folder / "libbenchmark.so"
        k = IN_ORT[1]
        regions = [region(k), Region("Quantize", (("K", k),))]
        build_library(regions, DOMAIN, library, cache=KernelCache(folder / "cache"))
        tasks: dict[tuple[str, tuple[int, int], int], Callable[[], Samples]] = {}
        for threads in (1, 2):
            for shape in SHAPES:
                for kind in KINDS:
                    work = loops.work(shape, kind)
                    task = functools.partial(loops.measure, work, threads)
                    tasks[kind, shape, threads] = task
            for kind in ("op", "ort pair", "ort pair, our Quantize", "ort skip"):
                tasks[kind, IN_ORT, threads] = in_ort(kind, IN_ORT, threads, library)
        samples: dict[tuple[str, tuple[int, int], int], Samples] = {task: [] for task in tasks}
        for _ in range(rounds):
            for task, run in tasks.items():
                time.sleep(PAUSE)
                samples[task] += run()
        return samples


def summarize(samples: dict[tuple[str, tuple[int, int], int], Samples]) -> list[dict[str, Any]]:
    """One row per measurement; `to_ours` is the ratio of its median to that of our kernel or op."""
    rows = []
    for (kind, shape, threads), values in samples.items():
        ours = samples["kernel" if kind in KINDS else "op", shape, threads]
        row = {"what": kind, "shape": "x".join(map(str, shape)), "threads": threads}
        row |= {"us": 1e6 * min(values), "median_us": 1e6 * statistics.median(values)}
        rows.append(row | {"to_ours": statistics.median(values) / statistics.median(ours)})
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.add_argument("--rounds", type=int, default=5, help="times everything is measured")
    names = [isa.name for isa in ISAS]
    parser.add_argument(
        "--isa", choices=names, default=best_isa().name, help="default: %(default)s"
    )
    arguments = parser.parse_args()
    os.environ["QCOMPILER_ISA"] = arguments.isa
    rows = summarize(measure(arguments.rounds, ISAS[names.index(arguments.isa)]))
    if arguments.json:
        json.dump(rows, sys.stdout, indent=1)
        return
    print(f"{'':24}{'shape':>12}{'threads':>9}{'best us':>11}{'median':>11}{'to ours':>9}")
    for row in rows:
        print(f"{row['what']:24}{row['shape']:>12}{row['threads']:9}{row['us']:11.1f}"
              f"{row['median_us']:11.1f}{row['to_ours']:9.2f}")  # fmt: skip


if __name__ == "__main__":
    main()

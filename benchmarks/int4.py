"""Products by int4 weights in groups of 32: our kernel, ONNX Runtime's MatMulNBits, int8 and float.

    pip install '.[cpu,zig]'
    python benchmarks/int4.py [--json FILE] [--seconds 6]

`qcompiler` quantizes activations per row (QMatMulW4A8, QMatMulW8A8).  MatMulNBits is given the same
int4 weights: at accuracy level 0 it multiplies floats, at 4 activations that it rounds to int8, per
block of K.  Sessions take turns; figures are milliseconds and the error against float64 products of
the same int4 weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx_ir import to_proto
from timing import environment, interleave

from qcompiler.ir import dialect
from qcompiler.ir.region import Region
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.library import build_library

GROUP = 32
SHAPES = ((384, 1536), (576, 1536), (4096, 4096))
"""K and N: of MiniLM, of SmolLM2-135M, of a model of 7B."""
ROWS = (1, 16, 128)
DOMAIN, OPSET = "qcompiler.benchmark", 21
MICROSOFT = "com.microsoft"


class Weights:
    """Made-up weights of one product, as every contender stores them."""

    def __init__(self, k: int, n: int) -> None:
        rng = np.random.default_rng(k + n)
        self.k, self.n = k, n
        self.w = rng.integers(-8, 8, (k, n))
        self.ws = (rng.uniform(0.5, 1.5, (k // GROUP, n)) / (5 * np.sqrt(k))).astype(np.float32)
        self.wide = self.w * np.repeat(self.ws.astype(np.float64), GROUP, axis=0)

    def regions(self) -> dict[str, Region]:
        """Those of the products by int4 and by int8, and of what both read."""
        sizes = (("K", self.k), ("N", self.n))
        return {
            "quantize": Region("Quantize", sizes[:1]),
            "int4": Region("QMatMulW4A8", (*sizes, ("G", GROUP))),
            "int8": Region("QMatMulW8A8", sizes),
        }

    def ours(self, kind: str) -> bytes:
        """Quantize, and the product by weights of this kind."""
        regions = [self.regions()["quantize"], self.regions()[kind]]
        functions = [to_proto(dialect.region_function(r, DOMAIN, OPSET)) for r in regions]
        if kind == "int4":
            packed = helper.make_tensor("w", TensorProto.INT4, (self.k, self.n), self.w.reshape(-1))
            scales = self.ws
        else:
            columns = np.abs(self.wide).max(0) / 127
            packed = numpy_helper.from_array(np.rint(self.wide / columns).astype(np.int8), "w")
            scales = columns.astype(np.float32)
        nodes = [
            helper.make_node(regions[0].name, ["x"], ["q", "s"], domain=DOMAIN),
            helper.make_node(regions[1].name, ["q", "s", "w", "ws"], ["y"], domain=DOMAIN),
        ]
        return self._save(nodes, [packed, numpy_helper.from_array(scales, "ws")], functions)

    def nbits(self, level: int) -> bytes:
        """MatMulNBits, whose weights are [N, K / 32, 16] bytes, two of a column in each."""
        codes = (self.w + 8).astype(np.uint8).T.reshape(self.n, -1, GROUP // 2, 2)
        packed = codes[..., 0] | codes[..., 1] << 4
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "ws"], ["y"], domain=MICROSOFT, K=self.k, N=self.n, bits=4,
            block_size=GROUP, accuracy_level=level,
        )  # fmt: skip
        scales = np.ascontiguousarray(self.ws.T)
        arrays = [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scales, "ws")]
        return self._save([node], arrays)

    def floats(self) -> bytes:
        """A MatMul by what the weights stand for."""
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        return self._save([node], [numpy_helper.from_array(self.wide.astype(np.float32), "w")])

    def _save(
        self, nodes: list[Any], constants: list[Any], functions: list[Any] | None = None
    ) -> bytes:
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            nodes, "product", [value("x", TensorProto.FLOAT, ["m", self.k])],
            [value("y", TensorProto.FLOAT, ["m", self.n])], constants,
        )  # fmt: skip
        domains = [("", OPSET), (DOMAIN, 1), (MICROSOFT, 1)]
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid(*d) for d in domains], ir_version=10,
            functions=functions or [],
        )  # fmt: skip
        return bytes(model.SerializeToString())


def open_all(weights: Weights, library: Path, threads: int) -> Mapping[str, ort.InferenceSession]:
    """A session of each contender; the first is what others are compared with."""
    models = {
        "ORT, MatMul of floats": weights.floats(),
        "ORT, MatMulNBits level 0": weights.nbits(0),
        "ORT, MatMulNBits level 4": weights.nbits(4),
        "qcompiler, int8": weights.ours("int8"),
        "qcompiler, int4": weights.ours("int4"),
    }
    sessions = {}
    for name, model in models.items():
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if name.startswith("qcompiler"):
            options.register_custom_ops_library(str(library))
        sessions[name] = ort.InferenceSession(model, options, ["CPUExecutionProvider"])
    return sessions


def measure(seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Every contender by product, rows and threads."""
    found, products = [], [Weights(k, n) for k, n in SHAPES]
    library = folder / "kernels.so"
    regions = {region for weights in products for region in weights.regions().values()}
    build_library(sorted(regions, key=lambda r: r.name), DOMAIN, library, cache=KernelCache())
    for weights in products:
        for threads in (1, 2):
            sessions = open_all(weights, library, threads)
            for rows in ROWS:
                x = np.random.default_rng(rows).standard_normal((rows, weights.k), np.float32)
                exact = x.astype(np.float64) @ weights.wide
                decibels = {n: _sqnr(exact, s.run(None, {"x": x})[0]) for n, s in sessions.items()}
                times = interleave(sessions, {"x": x}, seconds)
                shape = f"{rows}x{weights.k}x{weights.n}"
                found.append({"shape": shape, "threads": threads, "ms": times, "db": decibels})
                print(f"\n{shape}, {threads} threads")
                base = next(iter(times.values()))
                for name, t in times.items():
                    ratio = f"{base['median'] / t['median']:.2f} ({base['min'] / t['min']:.2f})"
                    print(f"  {name:28}{t['median']:9.3f} ms  min {t['min']:8.3f}   x {ratio:16}"
                          f"{decibels[name]:6.1f} dB")  # fmt: skip
    return found


def _sqnr(exact: np.ndarray, got: np.ndarray) -> float:
    error = float(np.sum((exact - got) ** 2))
    return float(10 * np.log10(np.sum(exact**2) / error)) if error else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each of 18 comparisons")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments.seconds, Path(folder))
    if arguments.json:
        content = {"environment": environment(), "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

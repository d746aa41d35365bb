"""Random operands of a region for its CUDA kernels, and what its function's body says they give."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from qcompiler.ir import dialect
from qcompiler.ir.region import Region
from qcompiler.targets.cuda.packing import FOUR_BITS, pack, pack_scales
from qcompiler.targets.cuda.plan import results_of

Array = NDArray[Any]
DOMAIN = "qcompiler.test"
_DTYPES = {
    "QMatMulW4A16": ml_dtypes.int4,
    "QMatMulW8A8": np.int8,
    "QMatMulFp8": ml_dtypes.float8_e4m3fn,
}


@dataclasses.dataclass
class Operands:
    """One call of a region.

    Attributes:
        device: What the kernels get, by parameter.
        body: What the function gets, in the order of its inputs.
        magnitude: Per result, the sum of the magnitudes of what the product adds up.
    """

    device: dict[str, Array]
    body: dict[str, Array]
    magnitude: Array


def operands_of(region: Region, rows: int, seed: int = 0) -> Operands:
    """Operands of a product for `rows` rows."""
    rng = np.random.default_rng(seed)
    k, n = region.size("K"), region.size("N")
    # Of several magnitudes, so that a wrong row, scale or group shows.
    x = rng.standard_normal((rows, k)) * np.exp(rng.standard_normal((rows, 1)))
    device: dict[str, Array] = {}
    wz = None
    if region.anchor in FOUR_BITS:
        groups, has_zeros = -(-k // region.size("G")), region.anchor == "QMatMulW4Z4A16"
        w = rng.integers(-8, 8, (k, n)).astype(np.int8)
        ws = (rng.random((groups, n)) * 0.02 + 0.002).astype(np.float16)
        device["x"] = x.astype(np.float16)
        body = {"x": device["x"].astype(np.float32), "w": w.astype(ml_dtypes.int4)}
        centred = w
        if has_zeros:
            wz = rng.integers(-8, 8, (groups, n)).astype(np.int8)
            body["wz"] = wz.astype(ml_dtypes.int4)
            centred = w - np.repeat(wz, region.size("G"), 0)[:k]
        wide = np.repeat(ws.astype(np.float32), region.size("G"), 0)[:k] * centred
        magnitude = np.abs(body["x"]) @ np.abs(wide)
    else:
        w, q = _eight_bits(region, rng, x)
        ws = (rng.random(n) * 0.02 + 0.002).astype(np.float32)
        device["q"], device["s"] = q, (rng.random((rows, 1)) * 0.02 + 0.01).astype(np.float32)
        body = {"q": q, "s": device["s"], "w": w}
        real = q.astype(np.float32) - (128 if q.dtype == np.uint8 else 0)
        magnitude = (np.abs(real) * device["s"]) @ (np.abs(w.astype(np.float32)) * ws)
    device |= {
        "w": np.frombuffer(pack(w, region), np.uint8),
        "ws": np.frombuffer(pack_scales(ws, region, wz, w), np.uint8),
    }
    for name, (_, width) in results_of(region).items():
        device[name] = np.full((rows, width), np.nan, np.float16)
    body["ws"] = ws.astype(np.float32)
    for i, kind in enumerate(region.extras):
        shape = (n,) if kind == "channel" else (rows, n)
        device[f"extra{i}"] = rng.standard_normal(shape).astype(np.float16)
        body[f"extra{i}"] = device[f"extra{i}"].astype(np.float32)
    return Operands(device, body, magnitude)


def _eight_bits(region: Region, rng: np.random.Generator, x: Array) -> tuple[Array, Array]:
    k, n = region.size("K"), region.size("N")
    if region.anchor == "QMatMulW8A8":
        weights = rng.integers(-128, 128, (k, n)).astype(np.int8)
        return weights, rng.integers(0, 256, x.shape).astype(np.uint8)
    kind = ml_dtypes.float8_e4m3fn
    return (rng.standard_normal((k, n)) * 50).astype(kind), (x * 50).clip(-448, 448).astype(kind)


def run_body(region: Region, inputs: dict[str, Array], outputs: int = 1) -> list[Array]:
    """The results of the region's function in ONNX Runtime, unoptimized, all floats float32."""
    function = dialect.region_function(region, DOMAIN, 21)
    values = []
    for value in function.inputs:
        tensor = ir.tensor(inputs[str(value.name)], name=value.name)
        values.append(
            ir.Value(name=value.name, const_value=tensor, type=ir.TensorType(tensor.dtype),
                     shape=ir.Shape(tensor.shape))
        )  # fmt: skip
    op = dialect.OPS[region.anchor]
    names = region.outputs or op.outputs[:outputs]
    if region.widths:
        names = op.outputs * len(region.widths)
    results = [
        ir.Value(name=f"r{i}", type=ir.TensorType(op.type_of(name))) for i, name in enumerate(names)
    ]
    node = ir.Node(DOMAIN, region.name, values, outputs=results)
    graph = ir.Graph([], results, nodes=[node], initializers=values,
                     opset_imports={"": 21, DOMAIN: 1}, name="region")  # fmt: skip
    model = ir.Model(graph, ir_version=10, functions=[function])
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [np.asarray(result) for result in session.run(None, {})]

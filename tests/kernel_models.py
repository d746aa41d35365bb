"""Regions with kernels, and a model of each: one call of its function, in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from instruction_sets import offer

from qcompiler.ir import dialect
from qcompiler.ir.region import QUANTIZATION, Region, Step
from qcompiler.session_options import new_session_options
from qcompiler.targets.epilogue import ELEMENTWISE
from qcompiler.targets.x86 import Isa

DOMAIN = "qcompiler.00b0d1e5"
BIAS = Step("Add", (0, -1))


def matmul(k, n, extras=(), *steps):
    return Region("QMatMulW8A8", (("K", k), ("N", n)), extras, steps)


def stored(k, n, *more, anchor="QMatMulW8A8"):
    """A region that quantizes its result by constants, dequantizes it, and goes on with `more`."""
    steps = (Step("QuantizeLinear", (0, -1, -2)), Step("DequantizeLinear", (1, -1, -2)), *more)
    steps = steps if more else steps[:1]
    extras = ("channel",) * -min(arg for step in steps for arg in step.args)
    return Region(anchor, (("K", k), ("N", n)), extras, steps)


def one_step(name):
    """A region that ends in the op `name`, with an operand of each kind where it takes two."""
    if ELEMENTWISE[name].arity == 1:
        return matmul(24, 40, ("channel",), BIAS, Step(name, (1,)))
    # A sum may be 0, so it is not divided by.
    second = (1, -2) if name == "Div" else (-2, 1)
    steps = (Step(name, (0, -1)), Step(name, second))
    return matmul(24, 40, ("channel", "tensor"), *steps)


# Clip's bounds are inputs in ONNX, so no body can be written for a Clip with attributes.
STEPS = [name for name in ELEMENTWISE if name not in ("Clip", *QUANTIZATION)]
QUANTIZES = [Region("Quantize", (("K", k),)) for k in (1, 3, 16, 63, 64, 100, 384)]
SMOOTHED = [dataclasses.replace(r, extras=("channel",), flags=("smoothed",)) for r in QUANTIZES]
MATMULS = [
    matmul(1, 1),
    matmul(3, 5),
    matmul(4, 16, ("channel",), BIAS),
    matmul(63, 47, ("channel", "tensor"), BIAS, Step("Add", (1, -2))),
    matmul(64, 48),
    matmul(65, 49, ("channel",), BIAS),
    matmul(130, 64, ("tensor",), Step("Add", (0, -1))),
    matmul(384, 193, ("channel",), BIAS, Step("Gelu", (1,))),
    matmul(256, 400, ("channel",), BIAS, Step("Gelu", (1,), (("approximate", "tanh"),))),
    *map(one_step, STEPS),
    matmul(24, 40, (), Step("Sigmoid", (0,)), Step("Tanh", (0,)), Step("Mul", (2, 1))),
    Region("QMatMulW8A8", (("K", 63), ("N", 192)), widths=(48, 96, 48)),
    dataclasses.replace(matmul(20, 96, ("channel",), BIAS, Step("Relu", (1,))), widths=(48, 48)),
]
PER_TENSOR = [
    dataclasses.replace(region, anchor=anchor)
    for anchor in ("QMatMulU8S8", "QMatMulU8U8")
    for region in (*MATMULS[:4], MATMULS[7], MATMULS[-1], matmul(5, 4200))
]
AGAIN = (Step("Add", (2, -3)), Step("QuantizeLinear", (3, -4, -5)))
STORED = [
    stored(k, n, *more, anchor=anchor)
    for anchor in ("QMatMulU8S8", "QMatMulU8U8")
    for k, n, more in [(1, 1, ()), (3, 5, AGAIN), (64, 48, ()), (65, 49, AGAIN), (384, 193, AGAIN)]
]
RELU = (Step("Relu", (2,)), Step("QuantizeLinear", (3, -3, -4)))
DYNAMIC = [
    dataclasses.replace(region, anchor="DynamicQMatMulW8A8")
    for region in (MATMULS[0], MATMULS[2], MATMULS[3], MATMULS[7], MATMULS[-1], matmul(4096, 17))
]


def requantized(region, outputs=("yq", "ys"), flags=()):
    """A region that quantizes its result, times a factor of each channel with "smoothed"."""
    extras = (*region.extras, *["channel"] * len(flags))
    return dataclasses.replace(
        region, anchor="RequantizedQMatMulW8A8", extras=extras, outputs=outputs, flags=flags
    )


def windowed(region, taps, step, pads=None, dilation=1):
    """A region that reads windows of `taps` rows, `step` rows apart, with zeros around the rows.

    Rows of a window are `dilation` rows apart.
    """
    given = {"dilations": (dilation,) if dilation > 1 else None, "pads": pads}
    return dataclasses.replace(
        region,
        anchor="WindowedQMatMulW8A8",
        sizes=(*region.sizes, ("R", taps), ("S", step)),
        attributes=tuple((key, value) for key, value in given.items() if value is not None),
    )


WINDOWED = [
    windowed(matmul(1, 1), 1, 1),
    windowed(matmul(63, 47, ("channel", "tensor"), BIAS, Step("Add", (1, -2))), 3, 2),
    windowed(matmul(10, 64), 10, 5),
    windowed(matmul(384, 193, ("channel",), BIAS, Step("Gelu", (1,))), 3, 1),
    windowed(matmul(4096, 17), 2, 3),
    windowed(dataclasses.replace(matmul(20, 96), widths=(48, 48)), 5, 1),
    windowed(matmul(63, 47, ("channel", "tensor"), BIAS, Step("Add", (1, -2))), 3, 2, None, 4),
    windowed(matmul(4096, 17), 4, 1, None, 2),
]

PADDED = [
    windowed(matmul(1, 1), 1, 1, (1, 0)),
    windowed(matmul(63, 47, ("channel", "tensor"), BIAS, Step("Add", (1, -2))), 3, 2, (1, 1)),
    windowed(matmul(10, 64), 10, 5, (3, 17)),
    windowed(matmul(384, 193, ("channel",), BIAS, Step("Gelu", (1,))), 3, 1, (1, 1)),
    windowed(matmul(4096, 17), 2, 3, (0, 2)),
    windowed(dataclasses.replace(matmul(20, 96), widths=(48, 48)), 5, 1, (4, 0)),
    windowed(matmul(12, 20), 2, 3, (5, 9)),
    windowed(matmul(384, 193, ("channel",), BIAS, Step("Relu", (1,))), 3, 1, (16, 0), 8),
    windowed(matmul(20, 30), 5, 2, (3, 4), 3),
]
"""Some of whose windows are zeros throughout."""

REPEATED = [
    matmul(24, 40, ("repeated",), Step("Add", (0, -1))),
    matmul(64, 49, ("channel", "repeated"), BIAS, Step("Gelu", (1,)), Step("Add", (2, -2))),
    matmul(20, 96, ("tensor", "repeated"), Step("Mul", (0, -1)), Step("Add", (1, -2))),
]
REPEATED += [
    dataclasses.replace(REPEATED[1], anchor="DynamicQMatMulW8A8"),
    dataclasses.replace(REPEATED[2], anchor="DynamicQMatMulW8A8", widths=(48, 48)),
    dataclasses.replace(REPEATED[1], anchor="QMatMulU8S8"),
    dataclasses.replace(REPEATED[0], anchor="QMatMulU8U8"),
    requantized(REPEATED[1]),
    requantized(REPEATED[2], ("y", "yq", "ys"), ("smoothed",)),
    windowed(matmul(63, 47, ("repeated",), Step("Add", (0, -1))), 3, 2),
    windowed(REPEATED[1], 2, 1, (1, 2)),
    windowed(REPEATED[1], 2, 1, (0, 3), 2),
]
"""Whose operands have fewer dimensions than the result."""

WIDE = matmul(800, 1000)
"""With weights that an L2 does not hold beside other things."""
ALL = ("y", "yq", "ys")
REQUANTIZED = [
    *map(requantized, (MATMULS[0], MATMULS[1], MATMULS[3], MATMULS[7], MATMULS[8])),
    requantized(MATMULS[7], ALL, ("smoothed",)),
    requantized(MATMULS[6], ALL),
    requantized(MATMULS[2], flags=("smoothed",)),
    requantized(matmul(5, 4096)),
    requantized(WIDE, ALL),
    requantized(WIDE),
]


@functools.cache
def weights(region: Region) -> dict[str, np.ndarray]:
    k, n = region.size("K"), dict(region.sizes).get("N", region.size("K"))
    rng = np.random.default_rng(k * 1000 + n)
    if region.anchor == "Quantize":
        return {
            f"extra{i}": rng.uniform(-2, 2, k).astype(np.float32) for i in range(len(region.extras))
        }
    constants = {
        "w": rng.integers(-127, 128, (k, n)).astype(np.int8),
        "ws": (rng.uniform(0.5, 1.5, n) / (40 * np.sqrt(k))).astype(np.float32),
    }
    if region.anchor == "QMatMulU8U8":
        constants["w"] = rng.integers(0, 256, (k, n)).astype(np.uint8)
        constants["wz"] = rng.choice([0, 1, 127, 128, 255], n).astype(np.uint8)
    for index, kind in enumerate(region.extras):
        if kind == "channel":
            constants[f"extra{index}"] = rng.standard_normal(n).astype(np.float32)
    for _, scale, zero in (step.args for step in region.steps if step.op in QUANTIZATION):
        constants[f"extra{-1 - scale}"] = rng.uniform(0.02, 0.03, n).astype(np.float32)
        constants[f"extra{-1 - zero}"] = rng.choice([0, 100, 128, 255], n).astype(np.float32)
    return constants


def model_of(region: Region, rank: int) -> bytes:
    """One call of the region's function, dynamic in all dimensions but the last."""
    op = dialect.OPS[region.anchor]
    function = dialect.region_function(region, DOMAIN, 21)
    constants = weights(region)
    sizes = dict(region.sizes)
    last = {"x": sizes["K"] // sizes.get("R", 1), "q": sizes["K"], "s": 1, "ys": 1}

    def value(name: str) -> ir.Value:
        if name in constants:
            tensor = ir.tensor(constants[name], name=name)
            return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype),
                            shape=ir.Shape(tensor.shape))  # fmt: skip
        dtype = ir.DataType.FLOAT if name.startswith("extra") else op.type_of(name)
        rows = "r" if name == "x" and "R" in sizes else f"d{rank - 2}"
        shape = [
            *(f"d{i}" for i in range(rank - 2)),
            *[rows] * (rank > 1),
            last.get(name, sizes.get("N")),
        ]
        if "z" in op.inputs and name in ("s", "z"):
            shape = []
        kind = region.extras[int(name[5:])] if name.startswith("extra") else None
        known = None if kind == "repeated" else ir.Shape(shape)
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=known)

    operands = [value(v.name) for v in function.inputs]
    results = [value(name) for name in region.outputs or op.outputs]
    if region.widths:
        results = [value(f"y{i}") for i in range(len(region.widths))]
    for result in results if region.is_quantized else []:
        result.dtype = ir.DataType.UINT8
    if region.widths:
        for result, width in zip(results, region.widths, strict=True):
            result.shape = ir.Shape([*result.shape[:-1], width])
    node = ir.Node(DOMAIN, region.name, operands, outputs=results)
    graph = ir.Graph([v for v in operands if v.const_value is None], results, nodes=[node],
                     initializers=[v for v in operands if v.const_value is not None],
                     opset_imports={"": 21, DOMAIN: 1}, name="region")  # fmt: skip
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[function])).SerializeToString()


@functools.cache
def session(
    region: Region, rank: int, threads: int, library: Path | None = None, isa: Isa | None = None
) -> ort.InferenceSession:
    options = new_session_options()
    options.intra_op_num_threads = threads
    if library is not None:
        offer(options, library, isa)
    return ort.InferenceSession(model_of(region, rank), options)

"""Regions that a library for GPUs is made of in tests, calls of their ops, and what these give."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from stand_in import Gpu

from qcompiler.ir import dialect
from qcompiler.ir.region import HALF, Region, Step
from qcompiler.session_options import new_session_options
from qcompiler.targets import cuda
from qcompiler.targets.cuda.packing import FOUR_BITS, INTEGERS, depth_of
from qcompiler.targets.cuda.plan import results_of

Array = NDArray[Any]

DOMAIN = "qcompiler.0c0da000"
H200 = Gpu()
L40S = Gpu(8, 9, "L40S", 99 * 1024)
A100 = Gpu(8, 0, "A100", 163 * 1024)
T4 = Gpu(7, 5, "T4", 64 * 1024)
B200 = Gpu(10, 0, "B200", 227 * 1024)

K, N = 1088, 200
BIAS_RELU = (Step("Add", (0, -1)), Step("Relu", (1,)))
RESIDUAL = (Step("Add", (0, -1)), Step("Add", (1, -2)))


def half(anchor: str, sizes: dict[str, int], *extras: Any, steps: tuple[Step, ...] = ()) -> Region:
    return Region(anchor, tuple(sizes.items()), extras, steps, flags=(HALF,))


W4 = half("QMatMulW4A16", {"K": K, "N": N, "G": 128}, "channel", steps=BIAS_RELU)
W4_ODD = half("QMatMulW4A16", {"K": 104, "N": 33, "G": 32})
W8 = half("QMatMulW8A8", {"K": K, "N": N}, "channel", "tensor", steps=RESIDUAL)
FP8 = half("QMatMulFp8", {"K": 144, "N": 40})
QUANTIZE = half("Quantize", {"K": K})
QUANTIZE_FP8 = half("QuantizeFp8", {"K": K})
GELU = half(
    "QMatMulW8A8", {"K": 64, "N": 16}, "channel",
    steps=(Step("Mul", (0, -1)), Step("Gelu", (1,)), Step("Tanh", (2,)),
           Step("Clip", (3,), (("max", 0.5),))),
)  # fmt: skip
SMALL = half("QMatMulW4A16", {"K": 1024, "N": 40, "G": 128}, "channel", steps=BIAS_RELU)
SHIFTED = half("QMatMulW4Z4A16", {"K": 1096, "N": 50, "G": 16})
PARTS = dataclasses.replace(
    half("QMatMulW8A8", {"K": 1001, "N": 77}, "channel", steps=BIAS_RELU), widths=(40, 7, 30)
)
PRODUCTS = [W4, W4_ODD, W8, FP8, SHIFTED, PARTS]
REGIONS = [*PRODUCTS, QUANTIZE, QUANTIZE_FP8, GELU, SMALL]

TYPES = {
    "QMatMulW4A16": {"x": np.float16, "y": np.float16},
    "QMatMulW4Z4A16": {"x": np.float16, "y": np.float16},
    "QMatMulW8A8": {"q": np.uint8, "s": np.float32, "y": np.float16},
    "QMatMulFp8": {"q": ml_dtypes.float8_e4m3fn, "s": np.float32, "y": np.float16},
    "Quantize": {"x": np.float16, "q": np.uint8, "s": np.float32},
    "QuantizeFp8": {"x": np.float16, "q": ml_dtypes.float8_e4m3fn, "s": np.float32},
}


def constants_of(region: Region, seed: int = 0) -> dict[str, Array]:
    """Weights [K, N] and scales of a product."""
    rng, sizes = np.random.default_rng(seed), dict(region.sizes)
    if "N" not in sizes:
        return {}
    k, n = sizes["K"], sizes["N"]
    if region.anchor in FOUR_BITS:
        groups = -(-k // sizes["G"])
        found: dict[str, Array] = {
            "w": rng.integers(-8, 8, (k, n)).astype(ml_dtypes.int4),
            "ws": rng.uniform(0.001, 0.01, (groups, n)).astype(np.float16),
        }
        if region.anchor == "QMatMulW4Z4A16":
            found["wz"] = rng.integers(-8, 8, (groups, n)).astype(ml_dtypes.int4)
        return found
    ws = rng.uniform(0.0001, 0.001, n).astype(np.float32)
    if region.anchor == "QMatMulFp8":
        return {"w": rng.standard_normal((k, n)).astype(ml_dtypes.float8_e4m3fn), "ws": ws}
    return {"w": rng.integers(-127, 128, (k, n)).astype(np.int8), "ws": ws}


def model_of(
    region: Region, constants: dict[str, Array], body: bool = False, **changed: list[Any]
) -> bytes:
    """One call of a region's op; `changed` gives inputs other shapes."""
    op, sizes, types = dialect.OPS[region.anchor], dict(region.sizes), dict(TYPES[region.anchor])
    extras = [f"extra{i}" for i in range(len(region.extras))]
    columns = {"x": sizes["K"], "q": sizes["K"], "s": 1}
    results = dict.fromkeys(op.outputs)
    if "N" in sizes:
        columns |= {name: width for name, (_, width) in results_of(region).items()}
        results = dict.fromkeys(results_of(region))
        types |= dict.fromkeys(results, np.float16)
    shapes: dict[str, list[Any]] = {name: ["m", columns[name]] for name in types if name in columns}
    for name, kind in zip(extras, region.extras, strict=True):
        shapes[name] = [sizes["N"]] if kind == "channel" else ["m", sizes["N"]]
    shapes |= changed
    values = [name for name in (*op.inputs, *extras) if name not in constants]

    def value(name: str) -> onnx.ValueInfoProto:
        dtype = types.get(name, constants_of(region).get(name, np.empty(0, np.float16)).dtype)
        return helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shapes[name]
        )

    graph = helper.make_graph(
        [helper.make_node(region.name, [*op.inputs, *extras], list(results), "n", domain=DOMAIN)],
        "test",
        [value(name) for name in values],
        [value(name) for name in results],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if body:
        import onnx_ir as ir

        proto.functions.append(ir.to_proto(dialect.region_function(region, DOMAIN, 21)))
    return bytes(proto.SerializeToString())


def feed_of(region: Region, rows: int) -> dict[str, Array]:
    """Activations and extra operands."""
    rng, sizes = np.random.default_rng(1), dict(region.sizes)
    feed: dict[str, Array] = {}
    for name, dtype in TYPES[region.anchor].items():
        if name in dialect.OPS[region.anchor].inputs:
            shape = (rows, 1 if name == "s" else sizes["K"])
            wide = rng.standard_normal(shape)
            if dtype is np.uint8:
                wide = rng.integers(0, 256, shape)
            feed[name] = np.abs(wide).astype(dtype) if name == "s" else wide.astype(dtype)
    for i, kind in enumerate(region.extras):
        shape = (sizes["N"],) if kind == "channel" else (rows, sizes["N"])
        feed[f"extra{i}"] = rng.standard_normal(shape).astype(np.float16)
    return feed


def anchor_result(region: Region, constants: dict[str, Array], feed: dict[str, Array]) -> Array:
    """What a product is before its epilogue, in double precision."""
    w, ws = constants["w"].astype(np.float64), constants["ws"].astype(np.float64)
    if region.anchor in FOUR_BITS:
        if "wz" in constants:
            wz = constants["wz"].astype(np.float64)
            w = w - np.repeat(wz, region.size("G"), axis=0)[: w.shape[0]]
        wide = w * np.repeat(ws, region.size("G"), axis=0)[: w.shape[0]]
        return np.asarray(feed["x"].astype(np.float64) @ wide)
    q = feed["q"].astype(np.float64) - (128 if feed["q"].dtype == np.uint8 else 0)
    return np.asarray((q @ w) * feed["s"].astype(np.float64) * ws)


def with_epilogue(region: Region, y: Array, extras: list[Array]) -> Array:
    from scipy import special

    ops: dict[str, Any] = {
        "Add": np.add,
        "Mul": np.multiply,
        "Relu": lambda x: np.maximum(x, 0),
        "Gelu": lambda x: x * special.ndtr(x),
        "Tanh": np.tanh,
        "Clip": lambda x: np.minimum(x, 0.5),
    }
    values = [y]
    for step in region.steps:
        args = [values[arg] if arg >= 0 else extras[-1 - arg] for arg in step.args]
        values.append(ops[step.op](*args))
    return values[-1]


def expected_of(region: Region, constants: dict[str, Array], feed: dict[str, Array]) -> Array:
    extras = [feed[f"extra{i}"].astype(np.float64) for i in range(len(region.extras))]
    return with_epilogue(region, anchor_result(region, constants, feed), extras)


def open_session(library: Path, model: bytes, options: Any = None) -> ort.InferenceSession:
    options = options or new_session_options()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_op(session: ort.InferenceSession, feed: dict[str, Array]) -> list[Array]:
    """As `session.run`, for float8 too, which it does not know."""
    values = {name: ort_value(array) for name, array in feed.items()}
    results = session.run_with_ort_values(None, values)
    return [as_array(result) for result in results]


def ort_value(array: Array) -> ort.OrtValue:
    if array.dtype != ml_dtypes.float8_e4m3fn:
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
        array.view(np.uint8), TensorProto.FLOAT8E4M3FN
    )


def as_array(value: ort.OrtValue) -> Array:
    if value.element_type() != TensorProto.FLOAT8E4M3FN:
        return np.asarray(value.numpy())
    return memory(value.data_ptr(), ml_dtypes.float8_e4m3fn, *value.shape()).copy()


def memory(address: int, dtype: Any, *shape: int) -> Array:
    """Device memory, which is the process's."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(buffer, np.uint8).view(dtype).reshape(shape)


def unpacked(region: Region, address: int) -> Array:
    """w [K, N] out of the packed bytes, by the formula of `targets/cuda/packing.py`."""
    layout, (k, n) = cuda.packing(region), np.ix_(range(depth_of(region)), range(region.size("N")))
    packed = memory(address, np.uint8, layout.weight_bytes)
    tile = n // 16 * (layout.depth // layout.tile_depth) + k // layout.tile_depth
    c, d = n % 16, k % layout.tile_depth
    if layout.bits == 4:
        lane = c % 8 * 4 + d % 8 // 2
        words = packed.view("<u4")[tile * 128 + lane * 4 + d // 16]
        bit = 4 * (c // 8 + 2 * (d % 16 // 8)) + 16 * (d % 2)
        return (words >> bit.astype(np.uint32) & 15).astype(np.int64) - 8
    lane = c % 8 * 4 + d % 16 // 4
    dtype = np.int8 if region.anchor in INTEGERS else ml_dtypes.float8_e4m3fn
    return packed[tile * 512 + lane * 16 + (c // 8 + 2 * (d // 16)) * 4 + d % 4].view(dtype)


def unpacked_scales(region: Region, address: int) -> dict[str, Array]:
    """ws, and wz [ceil(K / G), N] if there are zero points."""
    layout, n = cuda.packing(region), np.arange(region.size("N"))
    if layout.bits == 8:
        return {"ws": memory(address, np.float32, layout.columns)[n]}
    groups = -(-region.size("K") // region.size("G"))
    g, n = np.ix_(range(groups), n)
    start = (n // 16 * layout.groups + g) * layout.record_bytes
    place = n % 8 * 2 + n % 16 // 8
    packed = memory(address, np.uint8, layout.scale_bytes)
    found = {"ws": packed.view(np.float16)[start // 2 + place]}
    if layout.record_bytes > 32:
        found["wz"] = (packed[start + 32 + place] >> 4 * (n % 16 // 8)).astype(np.int64) - 8
    return found

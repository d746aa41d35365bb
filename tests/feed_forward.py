"""A feed-forward block of our ops by hand: its regions, models of it, and what it computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from instruction_sets import offer
from onnx import TensorProto, helper, numpy_helper
from raw_kernels import Array, accumulate, quantize
from scipy import special

from qcompiler.ir.region import Region, Step
from qcompiler.session_options import new_session_options
from qcompiler.targets.library import Library
from qcompiler.targets.x86 import Isa

DOMAIN = "qcompiler.0f1e2d3c"
K, F, N = 70, 130, 70
QUANTIZE_K = Region("Quantize", (("K", K),))
QUANTIZE_F = Region("Quantize", (("K", F),))
UP = Region(
    "QMatMulW8A8", (("K", K), ("N", F)), ("channel",), (Step("Add", (0, -1)), Step("Gelu", (1,)))
)
DOWN = Region(
    "QMatMulW8A8",
    (("K", F), ("N", N)),
    ("channel", "tensor"),
    (Step("Add", (0, -1)), Step("Add", (1, -2))),
)
REGIONS = [QUANTIZE_K, QUANTIZE_F, UP, DOWN]


def node(region: Region, inputs: list[str], outputs: list[str]) -> onnx.NodeProto:
    return helper.make_node(region.name, inputs, outputs, domain=DOMAIN)


def model(
    nodes: list[onnx.NodeProto],
    outputs: dict[str, int],
    constants: dict[str, Array],
    inputs: dict[str, tuple[int, list[Any]]] | None = None,
) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    inputs = inputs or {"x": (TensorProto.FLOAT, ["batch", "tokens", K])}
    graph = helper.make_graph(
        nodes,
        "test",
        [value(name, dtype, shape) for name, (dtype, shape) in inputs.items()],
        [value(name, dtype, None) for name, dtype in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


FEED_FORWARD = [
    node(QUANTIZE_K, ["x"], ["q", "s"]),
    node(UP, ["q", "s", "w1", "ws1", "b1"], ["u"]),
    node(QUANTIZE_F, ["u"], ["uq", "us"]),
    node(DOWN, ["uq", "us", "w2", "ws2", "b2", "x"], ["y"]),
]


def feed_forward(x: Array, c: dict[str, Array]) -> Array:
    """What `FEED_FORWARD` computes, floats in double precision between the quantizations."""
    q, s = quantize(x)
    u = accumulate(q, c["w1"]) * (s.astype(np.float64) * c["ws1"]) + c["b1"]
    q, s = quantize((u * special.ndtr(u)).astype(np.float32))
    y: Array = accumulate(q, c["w2"]) * (s.astype(np.float64) * c["ws2"]) + c["b2"] + x
    return y


def session(
    proto: onnx.ModelProto, library: Library | None, threads: int = 1, isa: Isa | None = None
) -> ort.InferenceSession:
    options = new_session_options()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        offer(options, library.path, isa)
    return ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def make_constants() -> dict[str, Array]:
    """The initializers that `FEED_FORWARD` names."""
    rng = np.random.default_rng(0)
    return {
        "w1": rng.integers(-127, 128, (K, F)).astype(np.int8),
        "ws1": rng.random(F, np.float32) / 100,
        "b1": rng.standard_normal(F).astype(np.float32),
        "w2": rng.integers(-127, 128, (F, N)).astype(np.int8),
        "ws2": rng.random(N, np.float32) / 100,
        "b2": rng.standard_normal(N).astype(np.float32),
    }

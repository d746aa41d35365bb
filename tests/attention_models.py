"""Models of one attention, and masks for them."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from instruction_sets import offer

from qcompiler.ir import dialect
from qcompiler.ir.region import Region
from qcompiler.session_options import new_session_options
from qcompiler.targets.x86.isa import Isa

DOMAIN = "qcompiler.0a77e471"


@functools.cache
def session(
    region: Region, mask_rank: int, threads: int, library: Path | None, isa: Isa | None = None
) -> ort.InferenceSession:
    """One call of the region's function with everything dynamic but D."""
    function = dialect.region_function(region, DOMAIN, 21)
    masked, d = region.anchor == "MaskedAttention", region.size("D")

    def value(name: str, rank: int) -> ir.Value:
        shape = [f"{name}{i}" for i in range(rank)]
        fixed: list[str | int] = [*shape[:-1], d if name != "mask" else shape[-1]]
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(fixed))

    scale = ir.Value(name="scale", const_value=ir.tensor(np.float32(0.3), name="scale"),
                     type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))  # fmt: skip
    inputs = [value(name, 4) for name in "qkv"]
    masks = [value("mask", mask_rank)] if masked else []
    result = value("y", 4)
    node = ir.Node(DOMAIN, region.name, [*inputs, scale, *masks], outputs=[result])
    graph = ir.Graph([*inputs, *masks], [result], nodes=[node], initializers=[scale],
                     opset_imports={"": 21, DOMAIN: 1}, name="attention")  # fmt: skip
    model = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function]))
    options = new_session_options()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library is not None:
        offer(options, library, isa)
    return ort.InferenceSession(model.SerializeToString(), options)


def mask_of(kind: str, rng: np.random.Generator, shape: list[int]) -> np.ndarray:
    hidden = np.float32(np.finfo(np.float32).min if kind == "lowest" else -np.inf)
    mask = rng.standard_normal(shape, np.float32)
    if kind == "padding":
        mask[rng.random(shape) < 0.4] = hidden
    if kind in ("nothing", "lowest") and mask.ndim > 1:
        mask[..., ::2, :] = hidden
    if kind == "half":
        mask[..., : shape[-1] - shape[-1] // 3] = hidden
    return mask

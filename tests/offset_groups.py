"""A weight in groups of which the last is shorter, and types with zero points of each kind."""

import numpy as np
import onnx_ir as ir

from qcompiler.ir.types import PerGroup, QuantType

K, N = 88, 24
RNG = np.random.default_rng(0)
W = (RNG.standard_t(4, (K, N)) + RNG.standard_normal((1, N))).astype(np.float32)
FEEDS = {"x": RNG.standard_normal((2, 5, K), dtype=np.float32) + np.float32(0.2)}
TEXT = f"g (float[b,m,{K}] x) => (float[b,m,{N}] y) {{ y = MatMul (x, w) }}"
KINDS = {"none": {}, "integer": {"symmetric": False}, "float": {"offset": True}}


def type_of(kind="float", group=32, **more):
    """K is no multiple of 32: the last group is shorter."""
    return QuantType(ir.DataType.INT4, granularity=PerGroup(0, group), **KINDS[kind], **more)

"""Products whose sums saturate in int16: weights close to 127, inputs close to 255."""

import numpy as np
import onnx_ir as ir
from golden import run

RNG = np.random.default_rng(0)
LARGE = {
    "w": RNG.integers(90, 128, (64, 8)).astype(np.int8), "wr": np.float32(0.01),
    "ws": RNG.uniform(0.5, 1, 8).astype(np.float32), "wz": np.zeros(8, np.int8),
    "wb": RNG.uniform(0.5, 1, (4, 8)).astype(np.float32), "wzs": np.int8(3),
    "k": RNG.integers(90, 128, (8, 64, 1, 1)).astype(np.int8), "kb": np.full(8, 5, np.int32),
    "xs": np.float32(0.02), "xz": np.uint8(3), "ys": np.float32(90), "yz": np.uint8(7),
}  # fmt: skip
X = {"x": RNG.uniform(2, 5, (3, 64)).astype(np.float32)}
QUANTIZED = "q = QuantizeLinear (x, xs, xz) "
PAIR = f"{QUANTIZED}d = DequantizeLinear (q, xs, xz) "
HEAD = "g (float[3,64] x) => (float[3,8] y) "


def plainly(model: ir.Model, feeds):
    """What a model of pairs means: ONNX Runtime computes them in floats if it fuses nothing."""
    return run(model, feeds, plainly=True)

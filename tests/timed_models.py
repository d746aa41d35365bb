"""Models that tests of timing compile."""

from __future__ import annotations

import numpy as np
from golden import model_of


def conv_net():
    """Two convolutions, a norm and a product, all to be weighed against floats."""
    rng = np.random.default_rng(0)
    return model_of(
        "g (float[n,4,16,16] x) => (float[n,16,16,3] y) "
        "{ a = Conv <pads = [1,1,1,1]> (x, u) b = Relu (a) c = Conv <pads = [1,1,1,1]> (b, v) "
        "d = Sigmoid (c) t = Transpose <perm = [0,2,3,1]> (d) e = LayerNormalization (t, s, s) "
        "y = MatMul (e, w) }",
        {
            "u": rng.standard_normal((4, 4, 3, 3), np.float32),
            "v": rng.standard_normal((8, 4, 3, 3), np.float32),
            "s": np.ones(8, np.float32),
            "w": rng.standard_normal((8, 3), np.float32),
        },
    )


def imported(result="y = MatMul (d, f)", most=60):
    """A quantized product; its sums may saturate where weights go beyond 7 bits."""
    weight = np.random.default_rng(2).integers(-most, most, (64, 48)).astype(np.int8)
    return model_of(
        "g (float[n,64] x) => (float[n,48] y) { q = QuantizeLinear (x, s, z) "
        "d = DequantizeLinear (q, s, z) f = DequantizeLinear (w, s) " + result + " }",
        {"s": np.float32(0.02), "z": np.uint8(128), "w": weight},
    )

"""Two products with a Relu between; the nodes are node_0, node_1 and node_2."""

import numpy as np
from correlated_rows import K
from golden import model_of

N = 32
RNG = np.random.default_rng(1)
W = {
    "v": RNG.standard_normal((K, K), dtype=np.float32) / 8,
    "w": RNG.standard_normal((K, N), dtype=np.float32) / 8,
}
TEXT = (
    f"g (float[n,{K}] x) => (float[n,{N}] y) {{ a = MatMul (x, v) b = Relu (a) y = MatMul (b, w) }}"
)


def model(text=TEXT, weights=W):
    made = model_of(text, weights)
    for index, node in enumerate(made.graph):
        node.name = f"node_{index}"
    return made

"""Norms with outlying gammas, and token ids in front of one."""

import numpy as np

RNG = np.random.default_rng(0)
K, N, VOCABULARY = 64, 48, 1000
GAMMA = RNG.uniform(0.5, 1.5, K).astype(np.float32)
WEIGHTS = {
    "gamma": GAMMA,
    "beta": RNG.standard_normal(K, dtype=np.float32),
    "v": RNG.standard_normal((K, N), dtype=np.float32),
    "w": RNG.standard_normal((K, N), dtype=np.float32),
    "last": np.array([-1]),
    "epsilon": np.float32(1e-5),
    "table": RNG.standard_normal((VOCABULARY, K), dtype=np.float32),
}
TOKENS = (
    f"g (int64[b,s] ids) => (float[b,s,{N}] o) {{ x = Gather (table, ids) "
    "y = LayerNormalization <axis = -1> (x, gamma, beta) o = MatMul (y, w) }"
)

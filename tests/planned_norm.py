"""A norm with outlying gammas in front of a product that is planned to be rounded to 4 bits."""

import numpy as np
from golden import model_of

from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.second_moments import LayerRuns
from qcompiler.samples import Samples
from qcompiler.targets.catalog import TARGETS
from qcompiler.walk import walker

K, N = 64, 48
RNG = np.random.default_rng(0)
GAMMA = RNG.uniform(0.5, 1.5, K).astype(np.float32)
GAMMA[[3, 40]] *= (16, 40)
WEIGHTS = {
    "gamma": GAMMA,
    "beta": RNG.standard_normal(K, dtype=np.float32),
    "v": RNG.standard_normal((K, K), dtype=np.float32),
    "w": RNG.standard_normal((K, N), dtype=np.float32),
}
X = f"g (float[n,{K}] x)"
FEEDS = {"x": RNG.standard_normal((37, K), dtype=np.float32)}
NORM = "y = LayerNormalization <axis = -1> (x, gamma, beta)"
OUT = f"float[n,{N}]"
ONE = f"{X} => ({OUT} o) {{ {NORM} o = MatMul (y, w) }}"


def samples():
    for seed in range(3):
        noise = np.random.default_rng(seed).standard_normal((50, K))
        yield {"x": noise.astype(np.float32)}


WALK = walker(Samples(samples))
RUNS = LayerRuns(WALK)


def planned(text=ONE, weights=WEIGHTS, rounding="awq", **options):
    model = model_of(text, weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    AssignPrecision(
        TARGETS["cuda-int4"].scheme, AssignPrecision.Options(rounding=rounding, **options)
    )(model)
    return model


def constants(model):
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}

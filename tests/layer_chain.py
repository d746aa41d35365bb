"""Four products in a chain that gptq is planned to round, on samples of correlated channels."""

import numpy as np
from correlated_rows import K, samples
from golden import model_of

from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.second_moments import LayerRuns
from qcompiler.samples import Samples
from qcompiler.targets.catalog import TARGETS
from qcompiler.walk import walker

RNG = np.random.default_rng(1)
WEIGHTS = {name: RNG.standard_normal((K, K), dtype=np.float32) / 8 for name in "abcd"}
X = f"g (float[n,{K}] x)"
OUT = f"float[n,{K}]"
CHAIN = (
    f"{X} => ({OUT} y) {{ p = MatMul (x, a) q = MatMul (x, b) r = Tanh (p) t = Mul (r, q) "
    "u = MatMul (t, c) v = Add (u, x) y = MatMul (v, d) }"
)


WALK = walker(Samples(samples))
RUNS = LayerRuns(WALK)


def planned(text=CHAIN, weights=WEIGHTS, target="cuda-int4", **options):
    model = model_of(text, weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    options = {"rounding": "gptq"} | options
    AssignPrecision(TARGETS[target].scheme, AssignPrecision.Options(**options))(model)
    return model


def constants(model):
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}

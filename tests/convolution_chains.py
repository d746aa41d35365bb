"""Two convolutions and what lies between them, planned and quantized for x86-int8."""

import numpy as np
from golden import model_of

from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.join_integers import JoinIntegers
from qcompiler.passes.lower_convolutions import LowerConvolutions
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
CHAIN = (
    "g (float[1,4,16,16] x) => (float[1,n,p,q] y) "
    "{ a = Conv <pads = [1,1,1,1]> (x, v) %s c = Conv (t, w) y = Exp (c) }"
)
WEIGHTS = {
    "v": RNG.standard_normal((4, 4, 3, 3), dtype=np.float32) / 6,
    "w": RNG.standard_normal((4, 4, 3, 3), dtype=np.float32) / 12,
    "w8": RNG.standard_normal((4, 8, 3, 3), dtype=np.float32) / 16,
    "three": np.float32(3), "half": np.float32(0.5), "minus": np.float32(-0.5),
    "each": np.float32([[[1]], [[-2]], [[0.5]], [[3]]]),
    "zero": np.float32(0), "six": np.float32(6), "alpha": np.float32(0.1),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "scales": np.float32([1, 1, 2, 2]),
    "begin": np.array([0]), "end": np.array([4]), "axis": np.array([1]), "hw": np.array([2, 3]),
    "shape": np.array([1, 4, 8, 32]),
}  # fmt: skip
FEEDS = {"x": RNG.standard_normal((1, 4, 16, 16), dtype=np.float32)}


def prepared(body, weights=WEIGHTS, chain=CHAIN, **options):
    model = model_of(chain % body, weights)
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
    AssignPrecision(TARGETS["x86-int8"].scheme, AssignPrecision.Options(**options))(model)
    LowerConvolutions()(model)
    JoinIntegers()(model)
    return model

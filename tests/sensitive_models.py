"""Small models whose layers keep-sensitive judges, and samples for them."""

import numpy as np
from calibrated import facts, planned
from golden import text_of

from qcompiler.ir.decisions import decision_of, plan_of
from qcompiler.passes.keep_sensitive import KeepSensitive

RNG = np.random.default_rng(0)
# A head of boxes and scores: half of its channels a thousand times as large as the others.
HEAD = np.repeat([1000, 1], 4).astype(np.float32)
WEIGHTS = {
    "a": RNG.standard_normal((8, 4, 3, 3), dtype=np.float32),
    "head": RNG.standard_normal((8, 8, 1, 1), dtype=np.float32) * HEAD.reshape(-1, 1, 1, 1),
    "scale": (1 / HEAD).reshape(1, -1, 1, 1),
    "m": RNG.standard_normal((6, 5), dtype=np.float32),
}
FEEDS = [{"x": RNG.standard_normal((1, 4, 8, 8), dtype=np.float32)} for _ in range(3)]
RUN, OBSERVE = facts(FEEDS)
CHAIN = (
    "g (float[1,4,8,8] x) => (float[1,8,2,2] z) { c = Conv (x, a) r = Relu (c) "
    "d = Conv (r, k0) s = Relu (d) e = Conv (s, k1) t = Relu (e) z = Neg (t) }"
)
CHAIN_WEIGHTS = WEIGHTS | {
    f"k{i}": RNG.standard_normal((8, 8, 3, 3), dtype=np.float32) for i in range(2)
}


def kept(text, weights=WEIGHTS, **options):
    """The model, and the reason of each convolution that stays float."""
    model = planned(text, weights)
    printed = text_of(model)
    modified = KeepSensitive(RUN, OBSERVE, KeepSensitive.Options(**options))(model).modified
    assert text_of(model) == printed
    convolutions = [node for node in model.graph if node.op_type == "Conv"]
    reasons = {node.name: decision_of(node).why for node in convolutions if not plan_of(node)}
    assert modified == bool(reasons)
    return model, reasons

"""Models that convert-float16 is tried on, and what each node of them computes in."""

import numpy as np
import onnx_ir as ir
from golden import model_of, run, sqnr, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.region import HALF
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.convert_float16 import ConvertFloat16

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 64), dtype=np.float32) / 8
X = {"x": RNG.standard_normal((3, 64), dtype=np.float32)}
WEIGHTS = {
    "w": W, "b": RNG.standard_normal(64, dtype=np.float32), "two": np.float32(2),
    "half": np.float32(0.5), "tiny": np.float32(1e-12), "big": np.float32(1e6),
    "zero": np.float32(0), "low": np.float32(-3.4e38), "last": np.asarray([-1]),
    "gamma": RNG.uniform(0.5, 1, 64).astype(np.float32),
}  # fmt: skip
FLOOR = 65.0
"""dB: one rounding to float16 is 75, and a few in a row stay above this."""

GROWS = (
    "g (float[m,64] x) => (float[m,64] y) { e = Exp (x) s = Mul (e, e) l = Log (s) y = Mul (l, b) }"
)
LAYERS = """g (float[m,64] x, float[m,64] r) => (float[m,64] y, float[m,64] z) {
    n = LayerNormalization (x, gamma, b) p = MatMul (n, w) a = Add (p, b) h = Gelu (a)
    q = MatMul (h, v) s = Add (q, r) t = MatMul (n, u) c = Clip (t, minus, one) y = Add (s, c)
    z = Mul (c, half) }"""
FEEDS = X | {"r": RNG.standard_normal((3, 64), dtype=np.float32)}
MORE = {"v": W[::-1].copy(), "u": W.T.copy(), "minus": np.float32(-1), "one": np.float32(1)}


def only_half(region):
    return None if HALF in region.flags else "computes in float16 alone"


def named(text, head="", **weights):
    model = model_of(text, WEIGHTS | weights, *([head] if head else []))
    for node in model.graph.all_nodes():
        node.name = node.outputs[0].name
    return model


def converted(text, feeds=X, sample=None, head="", floor=FLOOR, **weights):
    """The model after the pass, which must keep numbers, types and names, and be done then."""
    model = named(text, head, **weights)
    outputs = [(value.name, value.dtype) for value in model.graph.outputs]
    before, rewrite = run(model, feeds), ConvertFloat16(sample)
    rewrite(model)
    verify(model, Stage.QUANTIZED, "convert-float16")
    assert [(value.name, value.dtype) for value in model.graph.outputs] == outputs
    printed = text_of(model, notes=True)
    assert not rewrite(model).modified
    assert text_of(model, notes=True) == printed
    for got, want in zip(run(model, feeds), before, strict=True):
        assert got.dtype == want.dtype
        assert np.isfinite(got).all()
        assert np.array_equal(want, got) or sqnr(want, got) > floor
    return model


def types(model):
    """The float type that each node computes in, by its name; Casts of the pass left out."""
    found = {}
    for node in model.graph.all_nodes():
        values = [v for v in [*node.inputs, *node.outputs] if v is not None]
        kinds = {
            v.dtype.name for v in values if v.dtype in (ir.DataType.FLOAT16, ir.DataType.FLOAT)
        }
        if decision_of(node).why != "between float16 and float32":
            found[node.name] = "+".join(sorted(kinds))
    return found


def why(model, name):
    (node,) = [node for node in model.graph.all_nodes() if node.name == name]
    return decision_of(node).why


def on(feeds):
    """What runs a model on these inputs."""

    def sample(model, names):
        copy = model.clone()
        values = {value.name: value for node in copy.graph for value in node.outputs}
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(values[name] for name in names)
        return dict(zip(names, run(copy, feeds), strict=True))

    return sample

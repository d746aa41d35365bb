"""A model of three products, one of whose weights is hard to quantize, and its bundle."""

import numpy as np
import onnx_ir as ir
from golden import model_of

import qcompiler

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 64)).astype(np.float32) / 8
SPIKED = W.copy()
SPIKED[3, ::2] *= 400  # one weight per column that leaves few steps for the others
TEXT = """g (float[n,64] x) => (float[n,64] y) {
    a = MatMul (x, w)
    b = Relu (a)
    c = MatMul (b, v)
    d = Tanh (c)
    y = MatMul (d, w)
}"""


def data(count=3):
    def samples():
        random = np.random.default_rng(1)
        return [{"x": random.standard_normal((8, 64), np.float32)} for _ in range(count)]

    return samples


def compile_spiked(folder):
    """The files of the model, of its bundle and of a sample, `x.npz`, in the folder."""
    source = folder / "model.onnx"
    ir.save(model_of(TEXT, {"w": W, "v": SPIKED}), source)
    bundle = qcompiler.compile(source, "x86-int8", folder / "b", timing=False).bundle
    np.savez(folder / "x.npz", **next(iter(data()())))
    return source, bundle

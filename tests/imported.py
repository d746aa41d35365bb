"""Imported Q and DQ as text, and what normalizing them must keep."""

import numpy as np
import onnx_ir as ir
from golden import assert_rewrites, model_of, run, text_of

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.normalize_qdq import NormalizeQDQ

RNG = np.random.default_rng(0)
INT4 = ir.DataType.INT4.numpy()
W = {
    "s": np.float32(0.03), "z": np.uint8(120), "s1": np.array([0.03], np.float32),
    "z1": np.array([120], np.uint8), "t": np.float32(0.07), "u": np.uint8(3),
    "low": np.uint8(0), "zi": np.int8(-8), "zero8": np.int8(0), "least": np.int8(-128),
    "w": RNG.integers(-127, 128, (6, 4)).astype(np.int8), "wz": np.zeros(4, np.int8),
    "ws": RNG.uniform(0.01, 0.03, 4).astype(np.float32),
    "wu": RNG.integers(0, 256, (6, 4)).astype(np.uint8), "wt": np.ones((4, 6), np.int8),
    "wuz": RNG.integers(100, 150, 4).astype(np.uint8), "middle": np.full(4, 128, np.uint8),
    "wf": RNG.standard_normal((6, 4)).astype(np.float32),
    "b": RNG.integers(-90, 90, 4).astype(np.int32), "bf": np.ones(4, np.float32),
    "bs": np.full(4, 0.001, np.float32), "bz": np.zeros(4, np.int32),
    "to24": np.array([2, 12]), "to3": np.array([2, 2, 3]), "axis0": np.array([0]),
    "first": np.array([0]), "third": np.array([3]), "axis1": np.array([1]), "ids": np.array([1, 0]),
    "k": RNG.integers(-127, 128, (4, 2, 3, 3)).astype(np.int8),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "twice": np.array([1, 1, 2, 2], np.float32),
    "wide": np.array([3, 2, 6]), "zf": np.float32(0), "one": np.float32(1),
    "halves": np.array([3, 3]), "six": np.float32(6), "t6": np.float32(6 / 255),
}  # fmt: skip
QDQ = "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
CONV = QDQ + "f = DequantizeLinear (k, s) c = Conv (d, f) "
FLOATS = {"x": RNG.standard_normal((2, 6)).astype(np.float32)}
IMAGE = {"x": RNG.standard_normal((1, 2, 8, 8)).astype(np.float32)}


def named(text, weights=W):
    model = model_of(text, weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    return model


def assert_normalizes(text, after, feeds, weights=W):
    model = named(text, weights)
    expected = run(model, feeds, plainly=True)
    assert_rewrites(NormalizeQDQ(), model, after)
    verify(model, Stage.FLOAT, "normalize-qdq")
    for got, want in zip(run(model, feeds, plainly=True), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    run(model, feeds)
    return model


def assert_stays(text, feeds, why=None):
    model = named(text)
    before = text_of(model)
    assert not NormalizeQDQ()(model).modified
    assert text_of(model) == before
    run(model, feeds)
    if why is not None:
        assert any(why in decision_of(node).why for node in model.graph)

"""keep-from-qlinear: ops whose form in integers takes ONNX Runtime longer than floats."""

import collections
import json

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import assert_rewrites, model_of, run, sqnr

import qcompiler
from qcompiler.ir.decisions import decision_of
from qcompiler.passes.keep_from_qlinear import KeepFromQLinear
from qcompiler.pipeline import Pipeline

RNG = np.random.default_rng(0)
W = {
    "s": np.float32(0.03), "z": np.uint8(120), "t": np.float32(1 / 255), "low": np.uint8(0),
}  # fmt: skip
FEEDS = {"x": RNG.standard_normal((1, 2, 8, 8)).astype(np.float32), "c": np.arange(8) > 3}
QDQ = "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
BACK = "k = QuantizeLinear (r, t, low) y = DequantizeLinear (k, t, low)"
OPS = {
    "Softmax": "Softmax <axis = -1> (d)",
    "AveragePool": "AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (d)",
    "Where": "Where (c, d, d)",
}


def of(op, back=BACK, more=""):
    head = f"g (float[n,2,8,8] x, bool[8] c) => (float[n,2,8,8] y{more})"
    return model_of(f"{head} {{ {QDQ} r = {op} {back} }}", W)


def test_softmax():
    # The numbers are those of the pairs, see below: QLinearSoftmax is off by a step here and there.
    model = assert_rewrites(
        KeepFromQLinear(),
        of(OPS["Softmax"]),
        """inputs x, c
        v5 = QuantizeLinear  (x, v3, v4)
        v6 = DequantizeLinear  (v5, v3, v4)
        v7 = Softmax {'axis': '-1'} (v6)
        v8 = Sum  (v7)
        v11 = QuantizeLinear  (v8, v9, v10)
        y = DequantizeLinear  (v11, v9, v10)
        outputs y""",
    )
    softmax, copy = list(model.graph)[2:4]
    assert decision_of(softmax).why == "faster than ORT's own QLinearSoftmax"
    assert decision_of(softmax).action == "float"
    assert "QLinearSoftmax" in decision_of(copy).why


@pytest.mark.parametrize("name", OPS)
def test_onnx_runtime_makes_no_integer_op_of_it(tmp_path, name):
    """The form is there without the pass: else it would be a copy for nothing."""
    plain, kept = of(OPS[name]), of(OPS[name])
    assert KeepFromQLinear()(kept).modified
    assert f"QLinear{name}" in ran(plain, tmp_path / "plain")
    assert f"QLinear{name}" not in ran(kept, tmp_path / "kept")
    exact = run(plain, FEEDS, plainly=True)[0]
    np.testing.assert_array_equal(run(kept, FEEDS, plainly=True)[0], exact)


@pytest.mark.parametrize(
    ("op", "back", "more"),
    [
        (OPS["Softmax"], "y = Exp (r)", ""),  # its result is not quantized
        (OPS["Softmax"], BACK, ", float[n,2,8,8] r"),  # it leaves the graph
        (OPS["Softmax"], f"{BACK.replace('y', 'e')} y = Add (r, e)", ""),  # another reads it
        ("Softmax <axis = -1> (x)", BACK, ""),  # it reads floats
        ("Sigmoid (d)", BACK, ""),  # is fast in integers
        (OPS["Where"].replace("d, d", "d, x"), BACK, ""),  # one alternative is float
    ],
)
def test_what_onnx_runtime_computes_in_floats_anyway(op, back, more):
    assert not KeepFromQLinear()(of(op, back, more)).modified


def test_other_targets_keep_it():
    assert not KeepFromQLinear(wanted=False)(of(OPS["Softmax"])).modified
    for target, wanted in (("x86-int8", True), ("arm-int8", False), ("cuda-int8", False)):
        (step,) = [s for s in Pipeline.default(target).steps if s.name == "keep-from-qlinear"]
        assert step.rewrite.wanted == wanted


def test_a_bundle(tmp_path):
    """With the guard that torch writes behind Softmax, which goes before."""
    guarded = "u = QuantizeLinear (p, t, low) v = DequantizeLinear (u, t, low) n = IsNaN (v) "
    guarded += "zero = Constant <value_float = 0.0> () r = Where (n, zero, v)"
    text = "g (float[n,2,8,8] x) => (float[n,2,8,8] y) "
    model = model_of(f"{text} {{ {QDQ} p = {OPS['Softmax']} {guarded} {BACK} }}", W)
    feeds = {"x": FEEDS["x"]}
    expected = run(model, feeds, plainly=True)[0]
    bundle = qcompiler.compile(model, "x86-int8", tmp_path / "b", timing=False).bundle
    ops = collections.Counter(node.op_type for node in ir.load(bundle / "model.onnx").graph)
    assert ops["Sum"] == 1 and not ops["Where"] and not ops["IsNaN"]
    assert sqnr(expected, qcompiler.load(bundle).run(None, feeds)[0]) > 100


def ran(model, folder):
    """The ops that ONNX Runtime ran."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    session.run(None, {i.name: FEEDS[i.name] for i in session.get_inputs()})
    with open(session.end_profiling()) as file:
        return {event.get("args", {}).get("op_name") for event in json.load(file)}

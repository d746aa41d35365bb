"""Where join-integers lays the border on the way out of convolutions, and what ORT makes of it."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import assert_rewrites, model_of, run, sqnr

from qcompiler.ir.types import TensorStats
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.join_integers import JoinIntegers
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.session_options import new_session_options
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
CONVS = "g (float[1,4,16,16] x) => (float[1,n,p,q] y) { a = Conv (x, v) b = Conv (a, w) %s }"
WEIGHTS = {
    "v": RNG.standard_normal((4, 4, 3, 3), dtype=np.float32) / 6,
    "w": RNG.standard_normal((4, 4, 3, 3), dtype=np.float32) / 6,
    "shape": np.array([1, 4, -1, 1]),
}
FEEDS = {"x": RNG.standard_normal((1, 4, 16, 16), dtype=np.float32)}
POOL = "MaxPool <kernel_shape = [2,2], strides = [2,2]>"
TURN = "Transpose <perm = [0,1,3,2]>"
MOVERS = ("MaxPool", "Transpose", "Reshape")


def inserted(text):
    """The model with pairs; calibration saw another range of every tensor."""
    model = model_of(CONVS % text, WEIGHTS)
    AssignPrecision(TARGETS["x86-int8"].scheme)(model)
    JoinIntegers()(model)
    observed = []

    def observe(model, names):
        observed.extend(names)
        return {name: TensorStats(-5.0 - index, 5.0) for index, name in enumerate(names)}

    InsertQDQ(observe)(model)
    return model, observed


def test_golden_a_plan_for_what_moves_data_between_convolutions():
    model = model_of(CONVS % f"c = {POOL} (b) d = Conv (c, w) y = Neg (d)", WEIGHTS)
    AssignPrecision(TARGETS["x86-int8"].scheme)(model)
    byte = "quant<uint8:float, tensor, asymmetric>"
    planned = f"""# weight quant<int8:float, axis=0, narrow>
        # activation static {byte}
        # output static {byte}"""
    after = f"""inputs x
        v3 = Conv  (x, v2)
        {planned}
        v5 = Conv  (v3, v4)
        {planned}
        v6 = MaxPool {{'kernel_shape': '(2, 2)', 'strides': '(2, 2)'}} (v5)
        # operands static {byte}, output static {byte}
        # qdq: between integer ops: in integers, as the ops around it
        v7 = Conv  (v6, v4)
        {planned}
        y = Neg  (v7)
        outputs y"""
    assert_rewrites(JoinIntegers(), model, after, FEEDS, notes=True)


def moved_as_integers(model, tmp_path):
    """The movers of integers in what ORT makes of a model."""
    options = new_session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    found, stored = [], set()
    for node in ir.load(tmp_path / "optimized.onnx").graph:
        moves = node.op_type in MOVERS and node.inputs[0] in stored
        found += [node.op_type] if moves else []
        stored |= set(node.outputs) if moves or node.op_type == "QLinearConv" else set()
    return found


@pytest.mark.parametrize(
    ("text", "pairs", "moved"),
    [
        # Between integer ops, whatever calibration saw of its result.
        (f"c = {POOL} (b) d = Conv (c, w) y = Neg (d)", "xabdc", ["MaxPool"]),
        (f"c = {TURN} (b) d = Conv (c, w) y = Neg (d)", "xabdc", ["Transpose"]),
        # On the way out, where fewer bytes are left.
        (f"c = {POOL} (b) y = Neg (c)", "xabc", ["MaxPool"]),
        (f"c = {TURN} (b) d = {POOL} (c) y = Neg (d)", "xabcd", ["Transpose", "MaxPool"]),
    ],
)
def test_moves_integers(text, pairs, moved, tmp_path):
    model, observed = inserted(text)
    found = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    scales = {node.inputs[0].name: node.inputs[1] for node in found}
    assert set(scales) == set(pairs)
    assert scales["c"] is scales["b"]
    assert "c" not in observed
    for rewrite in (RoundToNearest(), FoldQDQ()):
        rewrite(model)
    reference = run(model_of(CONVS % text, WEIGHTS), FEEDS)[0]
    assert sqnr(reference, run(model, FEEDS)[0]) > 20
    assert moved_as_integers(model, tmp_path) == moved


@pytest.mark.parametrize(
    "text",
    [
        f"c = {TURN} (b) y = Neg (c)",
        "c = Reshape (b, shape) d = Exp (c) y = Neg (d)",
        f"y = {POOL} (b)",
        f"c = {POOL} (b) d = Tanh (b) e = {POOL} (d) y = Add (c, e)",
        f"c = Exp (b) d = {POOL} (c) y = Neg (d)",
    ],
)
def test_the_border_stays_where_moving_it_gains_nothing(text):
    model, observed = inserted(text)
    assert observed == ["x", "a", "b"]
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 3

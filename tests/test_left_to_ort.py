"""What is said to be fused by ONNX Runtime is: the nodes of its optimized model are looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import model_of, run

from qcompiler.ir.decisions import decision_of
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.fuse_attention import FuseAttention
from qcompiler.passes.left_to_ort import FUSED_BY_ORT, left_to_ort
from qcompiler.passes.shift_weights import ShiftWeights
from qcompiler.session_options import new_session_options

PAIR = "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
SECOND = "p = QuantizeLinear (v, t, u) e = DequantizeLinear (p, t, u) "
RESULT = " r = QuantizeLinear (c, t, u) y = DequantizeLinear (r, t, u)"
VALUES = {"s": np.float32(0.1), "z": np.uint8(100), "t": np.float32(0.2), "u": np.uint8(128)}


def optimized(model: ir.Model, folder: Path) -> list[str]:
    """The ops that ONNX Runtime runs."""
    options = new_session_options()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def said(body: str, shape: str, folder: Path) -> tuple[str, str, list[str]]:
    """The decision on the op between the pairs, and what ORT runs."""
    head = f"g (float[{shape}] x, float[{shape}] v, bool[{shape}] b) => (float[{shape}] y) "
    model = model_of(f"{head}{{ {PAIR}{SECOND if 'e)' in body else ''}{body} }}", VALUES)
    FoldQDQ()(model)
    skipped = ("QuantizeLinear", "DequantizeLinear")
    (node,) = (node for node in model.graph if node.op_type not in skipped)
    decision = decision_of(node)
    return decision.action, decision.why, optimized(model, folder)


CALLS = {
    "Add": "Add (d, e)", "Mul": "Mul (d, e)", "Concat": "Concat <axis = 0> (d, e)",
    "Where": "Where (b, d, e)", "MatMul": "MatMul (d, e)", "Sigmoid": "Sigmoid (d)",
    "LeakyRelu": "LeakyRelu (d)", "Softmax": "Softmax (d)",
    "AveragePool": "AveragePool <kernel_shape = [1,1]> (d)",
    "GlobalAveragePool": "GlobalAveragePool (d)",
}  # fmt: skip


@pytest.mark.parametrize("op", CALLS)
def test_an_op_between_pairs_is_fused(op: str, tmp_path: Path) -> None:
    shape = "2,3,1,1" if "Pool" in op else "n,4" if op == "Concat" else "4,4"
    action, why, ops = said(f"c = {CALLS[op]}{RESULT}", shape, tmp_path)
    assert (action, why.rpartition(": ")[2]) == ("qdq", f"ORT's own {FUSED_BY_ORT[op]}")
    assert FUSED_BY_ORT[op] in ops
    assert op not in ops


@pytest.mark.parametrize(
    "call", ["Tanh (d)", "Relu (d)", "Sub (d, e)", "Div (d, e)", "Max (d, e)", "Erf (d)"]
)
def test_an_op_that_ort_has_no_integer_form_of_is_float(call: str, tmp_path: Path) -> None:
    action, why, ops = said(f"c = {call}{RESULT}", "4,4", tmp_path)
    assert (action, "no integer form" in why) == ("float", True)
    assert call.partition(" ")[0] in ops


def test_without_a_pair_behind_it_only_a_product_is_fused(tmp_path: Path) -> None:
    action, why, ops = said("y = MatMul (d, e)", "4,4", tmp_path)
    assert (action, why.rpartition(": ")[2]) == ("qdq", "ORT's own MatMulIntegerToFloat")
    assert "MatMulIntegerToFloat" in ops
    action, why, ops = said("y = Add (d, e)", "4,4", tmp_path)
    assert (action, "result is not quantized" in why, "Add" in ops) == ("float", True, True)


@pytest.mark.parametrize(("scale", "action"), [("s, z", "qdq"), ("t, u", "float")])
def test_pairs_around_a_move_go_if_their_scales_are_equal(
    scale: str, action: str, tmp_path: Path
) -> None:
    move = f"c = MaxPool <kernel_shape = [1,1]> (d) r = QuantizeLinear (c, {scale}) "
    found, _, ops = said(f"{move}y = DequantizeLinear (r, {scale})", "1,3,4,4", tmp_path)
    assert found == action
    assert ops.count("DequantizeLinear") == (1 if action == "qdq" else 2)


def test_another_scale_takes_two_nodes(tmp_path: Path) -> None:
    text = (
        "g (uint8[4,4] q) => (uint8[4,4] r) "
        "{ d = DequantizeLinear (q, s, z) r = QuantizeLinear (d, t, u) }"
    )
    model = model_of(text, VALUES)
    FoldQDQ()(model)
    assert decision_of(model.graph[1]).why.endswith("requantized in two nodes")
    assert optimized(model, tmp_path) == ["DequantizeLinear", "QuantizeLinear"]


def test_float_weights_between_pairs_would_be_rounded_by_ort(tmp_path: Path) -> None:
    """Why fold-qdq leaves the weight of such a convolution as it is stored."""
    text = (
        "g (float[1,2,8,8] x) => (float[a,b,c,d] y) { q = QuantizeLinear (x, s, z) "
        "e = DequantizeLinear (q, s, z) f = DequantizeLinear <axis = 0> (w, ws, low) "
        "c = Conv (e, f) r = QuantizeLinear (c, t, u) y = DequantizeLinear (r, t, u) }"
    )
    # Weights that fold-conv cannot store as int8.
    weights = {"w": np.full((4, 2, 3, 3), 250, np.uint8), "ws": np.ones(4, np.float32),
               "low": np.array([0, 1, 0, 1], np.uint8)}  # fmt: skip
    model = model_of(text, VALUES | weights)
    assert not FoldQDQ()(model).modified
    text = text.replace("DequantizeLinear <axis = 0> (w, ws, low)", "Identity (k)")
    floats = model_of(text,
                      VALUES | {"k": np.ones((4, 2, 3, 3), np.float32)})  # fmt: skip
    assert "QLinearConv" in optimized(floats, tmp_path)


BEHIND = {
    "BatchNormalization": "a = BatchNormalization (c, g, i, i, g) r = QuantizeLinear (a, t, u)",
    "Mul": "a = Mul (c, f) r = QuantizeLinear (a, t, u)",
    "Add, Relu": "a = Add (f, c) b = Relu (a) r = QuantizeLinear (b, t, u)",
    "Transpose": "a = Transpose <perm=[0,2,3,1]> (c) r = QuantizeLinear (a, t, u)",
    "another reader": "o = Neg (c) r = QuantizeLinear (c, t, u)",
}


@pytest.mark.parametrize("behind", BEHIND)
def test_weights_that_ort_fuses_with_what_follows_are_left(behind: str, tmp_path: Path) -> None:
    """ORT would round them per tensor: these channels have scales of their own."""
    outputs = (
        "float[e,f,g,h] o, uint8[i,j,k,l] r" if "o =" in BEHIND[behind] else "uint8[i,j,k,l] r"
    )
    text = (
        f"g (float[1,2,8,8] x) => ({outputs}) {{ q = QuantizeLinear (x, s, z) "
        "e = DequantizeLinear (q, s, z) w = DequantizeLinear <axis = 0> (v, ws) c = Conv (e, w) "
        f"{BEHIND[behind]} }}"
    )
    rng = np.random.default_rng(0)
    factor = np.array([5, 1], np.float32)
    weights = VALUES | {
        "v": rng.integers(-127, 128, (2, 2, 3, 3), np.int8), "g": factor,
        "ws": np.array([0.01, 0.05], np.float32), "f": factor.reshape(2, 1, 1), "i": 0 * factor,
    }  # fmt: skip
    source, model = model_of(text, weights), model_of(text, weights)
    FoldQDQ()(model)
    feeds = {"x": rng.standard_normal((1, 2, 8, 8)).astype(np.float32)}
    for expected, found in zip(run(source, feeds), run(model, feeds), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_weights_are_kept_as_floats_where_nothing_is_quantized_behind(tmp_path: Path) -> None:
    text = (
        "g (float[1,2,8,8] x) => (float[e,f,g,h] o) { q = QuantizeLinear (x, s, z) "
        "e = DequantizeLinear (q, s, z) w = DequantizeLinear (v, s) c = Conv (e, w) o = Tanh (c) }"
    )
    model = model_of(text, VALUES | {"v": np.ones((2, 2, 3, 3), np.int8)})
    FoldQDQ()(model)
    assert optimized(model, tmp_path).count("DequantizeLinear") == 1


KINDS = {"uint8": np.uint8, "int8": np.int8, "uint16": np.uint16, "int16": np.int16}
FORMS = ("Add", "Concat", "Sigmoid", "MatMul", "Gemm")


@pytest.mark.parametrize("result", ["", "uint8", "int8"])
@pytest.mark.parametrize("weight", KINDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", FORMS)
def test_integer_forms_are_of_8_bits(
    op: str, kind: str, weight: str, result: str, tmp_path: Path
) -> None:
    """All that a model may be given: no pair here can be made another type by ORT."""
    call = {"Add": "Add (d, e)", "Concat": "Concat <axis = 0> (d, e)", "Sigmoid": "Sigmoid (d)"}
    body = "d = DequantizeLinear (x, s, z) e = DequantizeLinear (w, t, zw) "
    body += f"c = {call.get(op, f'{op} (d, e)')} r = QuantizeLinear (c, t, zr)"
    out = f"{result}[h,k] r" if result else "float[h,k] c"
    text = f"g ({kind}[4,4] x) => ({out}) {{ {body} }}"
    weights = VALUES | {
        "w": np.ones((4, 4), KINDS[weight]), "z": KINDS[kind](3), "zw": KINDS[weight](0),
        "zr": KINDS[result or "uint8"](3),
    }  # fmt: skip
    model = model_of(text if result else text.replace("r = QuantizeLinear (c, t, zr)", ""), weights)
    ShiftWeights()(model)
    (node,) = (node for node in model.graph if node.op_type == op)
    action, why = left_to_ort(node) or ("", "")
    ops = optimized(model, tmp_path)
    if "MatMulNBits" in why and "MatMulNBits" not in ops:
        pytest.skip("an ORT before 1.32 computes 16 bits by a matrix in floats")
    assert (action == "float") == (op in ops), (why, ops)
    if action == "qdq":
        assert why.rpartition("ORT's own ")[2] in ops


@pytest.mark.parametrize("left", [None, "in floats the whole is slower"])
def test_16_bits_are_kept_unless_that_is_slower(left: str | None, tmp_path: Path) -> None:
    """ORT's MatMulNBits rounds them to 8, which takes less time with VNNI."""
    text = (
        "g (uint16[4,4] x) => (float[h,k] c) { d = DequantizeLinear (x, s, z) "
        "e = DequantizeLinear (w, t) c = MatMul (d, e) }"
    )
    model = model_of(text, VALUES | {"w": np.ones((4, 4), np.int8), "z": np.uint16(3)})
    if "MatMulNBits" not in optimized(model, tmp_path):
        pytest.skip("an ORT before 1.32 computes 16 bits by a matrix in floats")
    FoldQDQ(left)(model)
    assert ("MatMulNBits" in optimized(model, tmp_path)) == (left is not None)
    decision = decision_of(next(node for node in model.graph if node.op_type == "MatMul"))
    assert decision.action == ("float" if left is None else "qdq")
    assert ("rounded to 8 bits" in decision.why) == (left is not None)


@pytest.mark.parametrize("also", ["", "o = Erf (d)", "o = Cast <to = 1> (q)"])
def test_only_pairs_that_are_alone_become_uint8(also: str, tmp_path: Path) -> None:
    outputs = "float[a,b] y, float[h,k] o" if also else "float[a,b] y"
    text = (
        f"g (float[4,4] x) => ({outputs}) {{ q = QuantizeLinear (x, s, i) "
        "d = DequantizeLinear (q, s, i) e = DequantizeLinear (w, t, i) y = MatMul (d, e) "
        f"{also} }}"
    )
    model = model_of(text, VALUES | {"i": np.int8(3), "w": np.ones((4, 4), np.int8)})
    (node,) = (node for node in model.graph if node.op_type == "MatMul")
    action, why = left_to_ort(node) or ("", "")
    assert action == ("float" if also else "qdq"), why
    assert ("MatMulIntegerToFloat" in optimized(model, tmp_path)) == (not also)


@pytest.mark.parametrize("shape", [(), (1,), (4,)])
@pytest.mark.parametrize("call", ["Where (b, k, d)", "Where (b, d, k)"])
def test_ort_quantizes_a_scalar_beside_what_is_quantized(
    call: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    text = f"g (float[4,4] x, bool[4,4] b) => (float[4,4] y) {{ {PAIR} c = {call} {RESULT} }}"
    model = model_of(text, VALUES | {"k": np.zeros(shape, np.float32)})
    FoldQDQ()(model)
    (node,) = (node for node in model.graph if node.op_type == "Where")
    assert decision_of(node).action == ("float" if shape else "qdq")
    assert ("QLinearWhere" in optimized(model, tmp_path)) == (not shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("move", [
    "MaxPool <kernel_shape = [2,2]> (d)", "Tile (d, n)", "Expand (d, n)", "Slice (d, n, m)",
    'DepthToSpace <blocksize = 2, mode = "CRD"> (d)', 'Resize <mode = "nearest"> (d, , f)',
    'Resize <mode = "linear"> (d, , f)',
])  # fmt: skip
def test_pairs_of_some_types_stay_around_some_moves(move: str, kind: str, tmp_path: Path) -> None:
    text = (
        f"g ({kind}[1,4,4,4] x) => ({kind}[a,b,h,k] y) {{ d = DequantizeLinear (x, s, z) "
        f"c = {move} y = QuantizeLinear (c, s, z) }}"
    )
    weights = {"z": KINDS[kind](3), "n": np.array([1, 1, 1, 1]), "m": np.array([4, 4, 4, 4])}
    model = model_of(text, VALUES | weights | {"f": np.array([1, 1, 2, 2], np.float32)})
    action, _ = left_to_ort(model.graph[1]) or ("", "")
    assert (action == "float") == ("DequantizeLinear" in optimized(model, tmp_path))


@pytest.mark.parametrize("move", ["Gather (q, n)", "MaxPool <kernel_shape = [1]> (q)"])
def test_what_moves_stored_integers_is_quantized(move: str) -> None:
    text = (
        f"g (float[1,4,4] x) => (float[a,b,h] y) {{ q = QuantizeLinear (x, s, z) c = {move} "
        "y = DequantizeLinear (c, s, z) }"
    )
    model = model_of(text, VALUES | {"n": np.array([0])})
    FoldQDQ()(model)
    decision = decision_of(model.graph[1])
    assert (decision.action, decision.why) == ("qdq", "moves stored integers")
    assert decision.expected


def test_what_moves_other_integers_is_not() -> None:
    model = model_of("g (uint8[4] x) => (float[4] y) { c = Tile (x, n) y = Cast <to = 1> (c) }",
                     {"n": np.array([1])})  # fmt: skip
    assert left_to_ort(model.graph[0]) is None


def test_a_dynamic_quantization_is_part_of_it() -> None:
    model = model_of(
        "g (float[4] x) => (float[4] y) "
        "{ q, s, z = DynamicQuantizeLinear (x) y = DequantizeLinear (q, s, z) }"
    )
    FoldQDQ()(model)
    assert decision_of(model.graph[0]).action == "qdq"


def test_a_softmax_between_pairs_keeps_its_reason() -> None:
    text = f"g (float[1,2,4,4] x) => (float[a,b,h,k] y) {{ {PAIR} c = Softmax (d) {RESULT} }}"
    model = model_of(text, VALUES)
    FoldQDQ()(model)
    FuseAttention(lambda region: None)(model)
    (softmax,) = (node for node in model.graph if node.op_type == "Softmax")
    assert decision_of(softmax).why == "ORT's own QLinearSoftmax"

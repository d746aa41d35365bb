import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden import assert_rewrites, model_of, run

from qcompiler.ir.errors import ModelError
from qcompiler.passes.canonicalize import Canonicalize

RNG = np.random.default_rng(0)
X = {"x": RNG.standard_normal((2, 6), dtype=np.float32)}
W, B = RNG.standard_normal((6, 4), dtype=np.float32), RNG.standard_normal(4, dtype=np.float32)


def test_expands_gemm():
    assert_rewrites(
        Canonicalize(),
        model_of("g (float[2,6] x) => (float[2,4] y) { y = Gemm (x, w, b) }", {"w": W, "b": B}),
        """inputs x
        v3 = MatMul  (x, v2)
        y = Add  (v3, v4)
        outputs y""",
        X,
    )


def test_folds_alpha_beta_and_transpose_into_the_constants():
    model = model_of(
        "g (float[2,6] x) => (float[2,4] y) "
        "{ y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, b) }",
        {"w": np.ascontiguousarray(W.T), "b": B},
    )
    Canonicalize()(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]
    np.testing.assert_allclose(run(model, X)[0], 0.5 * X["x"] @ W + 2 * B, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attributes", ["transA = 1", "transA = 1, transB = 1"])
def test_keeps_a_gemm_with_a_transposed_activation(attributes):
    weight = W if "transB" not in attributes else np.ascontiguousarray(W.T)
    model = model_of(
        f"g (float[6,2] x) => (float[2,4] y) {{ y = Gemm <{attributes}> (x, w) }}", {"w": weight}
    )
    Canonicalize()(model)
    assert [node.op_type for node in model.graph] == ["Gemm"]


def test_keeps_a_gemm_of_two_activations():
    model = model_of("g (float[2,6] x, float[6,4] w) => (float[2,4] y) { y = Gemm (x, w) }")
    Canonicalize()(model)
    assert [node.op_type for node in model.graph] == ["Gemm"]


@pytest.mark.parametrize("opset", [7, 9, 13, 17, 18])
def test_raises_old_opsets(opset):
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> '
    text += "g (float[2,6] x) => (float[2,6] y) { t = Softmax <axis = 1> (x) y = Relu (t) }"
    proto = onnx.parser.parse_model(text)
    model = ir.from_proto(proto)
    Canonicalize()(model)
    assert model.graph.opset_imports[""] == 21
    expected = run(ir.from_proto(proto), X)
    np.testing.assert_allclose(run(model, X)[0], expected[0], rtol=1e-6)


def test_names_nameless_nodes_and_inlines_functions():
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "my" : 1]>'
        "g (float[2,6] x) => (float[2,6] y) { t = my.twice (x) y = Relu (t) }"
        '<domain: "my", opset_import: ["" : 21]> twice (a) => (b) { b = Add (a, a) }'
    )
    model = ir.from_proto(proto)
    Canonicalize()(model)
    assert [node.op_type for node in model.graph] == ["Add", "Relu"]
    assert all(node.name for node in model.graph)
    assert not model.functions


def test_keeps_an_imported_quantization():
    model = model_of(
        "g (float[2,6] x) => (float[2,4] y) { wf = DequantizeLinear (w, s) y = MatMul (x, wf) }",
        {"w": np.ones((6, 4), np.int8), "s": np.float32(0.5)},
    )
    Canonicalize()(model)
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul"]


def test_says_when_the_opset_cannot_be_raised():
    # BatchNormalization in training mode has no counterpart in opset 9 and later.
    text = (
        '<ir_version: 3, opset_import: ["" : 6]> '
        "g (float[1,2,3] x, float[2] a, float[2] b, float[2] m, float[2] v) => (float[1,2,3] y) "
        "{ y = BatchNormalization <is_test = 0> (x, a, b, m, v) }"
    )
    with pytest.raises(ModelError, match="cannot raise the model from opset 6"):
        Canonicalize()(ir.from_proto(onnx.parser.parse_model(text)))


def test_dimensions_of_results_keep_their_names():
    """Inference names what a Reshape leaves open, and the Identity that had the names is gone."""
    text = (
        "g (float[batch,8] x, int64[2] s) => (float[batch,depth] y) "
        "{ r = Reshape (x, s) y = Identity (r) }"
    )
    model = model_of(text)
    next(v for n in model.graph for v in n.outputs if v.name == "r").shape = ir.Shape(["u", "v"])
    Canonicalize()(model)
    assert [node.op_type for node in model.graph] == ["Reshape"]
    assert model.graph.outputs[0].shape == ["batch", "depth"]


@pytest.mark.parametrize(
    "nodes",
    [
        "y = MatMul (x, w) z = Identity (y)",
        "z = MatMul (x, w) y = Identity (z)",
        "h = MatMul (x, w) y = Identity (h) z = Identity (h)",
        "y = MatMul (x, w) z = MatMul (x, w)",
    ],
)
def test_an_output_may_be_another_one_again(nodes):
    model = model_of(f"g (float[2,6] x) => (float[2,4] y, float[2,4] z) {{ {nodes} }}", {"w": W})
    expected = run(model, X)
    Canonicalize()(model)
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert [node.op_type for node in model.graph] == ["MatMul", "Identity"]
    np.testing.assert_array_equal(run(model, X), expected)


BRANCHES = "<then_branch = a () => (r) { r = Relu (h) }, else_branch = b () => (q) { q = Neg (h) }>"
TAKEN = f"h = MatMul (x, w) y = If (yes) {BRANCHES}"
FUNCTION = f"f (x, w) => (y) {{ yes = Constant <value = bool {{1}}> () {TAKEN} }}"


@pytest.mark.parametrize(
    "nodes",
    [
        TAKEN,
        f"h = MatMul (x, w) s = ReduceMax <keepdims = 0> (h) c = Cast <to = 9> (s)"
        f" unread = If (c) {BRANCHES} y = Relu (h)",
        "y = my.f (x, w)",
    ],
    ids=["never taken", "never read", "in a function"],
)
def test_branches_that_are_gone_read_nothing(nodes):
    weights = {"w": W, "yes": np.array(True)}
    graph = f"g (float[2,6] x) => (float[2,4] y) {{ {nodes} }}"
    model = model_of(f'{graph} <domain: "my", opset_import: ["": 21]> {FUNCTION}', weights)
    Canonicalize()(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Relu"]
    assert [use.node.op_type for use in model.graph.node(0).outputs[0].uses()] == ["Relu"]

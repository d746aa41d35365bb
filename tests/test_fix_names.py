import onnx
import onnx_ir as ir
from golden import model_of

from qcompiler.passes.fix_names import FixNames


def test_inputs_and_outputs_keep_their_names():
    model = model_of("g (float[2] x) => (float[2] y) { a = Neg (x) b = Exp (a) y = Abs (b) }")
    first, second, _ = model.graph
    first.outputs[0].name, second.outputs[0].name = "x", None
    assert FixNames()(model).modified
    assert [node.outputs[0].name for node in model.graph] == ["x_1", "value", "y"]
    assert not FixNames()(model).modified


def test_branches_share_no_names():
    model = model_of(
        "g (float[2] x, bool c) => (float[2] y) { y = If (c) "
        "<then_branch = a () => (float[2] p) { q = Neg (x) p = Exp (q) }, "
        "else_branch = b () => (float[2] r) { s = Abs (x) r = Exp (s) }> }"
    )
    values = [value for graph in model.graph.subgraphs() for n in graph for value in n.outputs]
    for value in values:
        value.name = "z"
    FixNames()(model)
    assert len({value.name for value in values}) == 4


def test_nodes_may_be_called_alike_in_two_graphs_not_in_one():
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x, bool c) => (float[2] y) '
        "{ [n] a = Neg (x) [n] b = Exp (a) y = If (c) "
        "<then_branch = t () => (float[2] p) { [n] p = Exp (b) }, "
        "else_branch = e () => (float[2] q) { [n] q = Abs (b) }> }"
    )
    model = ir.from_proto(proto)
    FixNames()(model)
    assert [node.name for node in model.graph] == ["n", "n_1", "If"]
    assert [node.name for graph in model.graph.subgraphs() for node in graph] == ["n", "n"]


def test_an_output_that_is_left_out_stays_so():
    model = model_of("g (float[2,3] x) => (float[2,3] y) { y, m = Dropout (x) }")
    model.graph[0].outputs[1].name = ""
    assert not FixNames()(model).modified
    assert model.graph[0].outputs[1].name == ""

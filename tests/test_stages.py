"""What the verifier asks of a model at each stage: each rule broken once."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of

from qcompiler.ir import dialect
from qcompiler.ir.errors import VerifyError
from qcompiler.ir.graph import replace_nodes
from qcompiler.ir.region import Region
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.outlining import outline

QUANTIZE = (
    "g (float[2,64] x) => (uint8[2,64] q, float[2,1] s) "
    "{ q, s = qcompiler.Quantize <block_size = 64> (x) }"
)


def quantized():
    model = model_of(QUANTIZE)
    dialect.declare(model)
    return model


def test_accepts_what_the_stage_allows():
    verify(quantized(), Stage.QUANTIZED, "test")


def test_refuses_ours_before_folding():
    with pytest.raises(
        VerifyError, match="after my-pass: .*Quantize may not appear before folding"
    ):
        verify(quantized(), Stage.QDQ, "my-pass")


def test_refuses_an_op_of_regions_before_outlining():
    model = model_of(
        "g (float[2,4] x) => (float[2,4] y, uint8[2,4] q, float[2,1] s) "
        "{ y, q, s = qcompiler.RMSNorm <block_size = 4, epsilon = 1e-6> (x, g) }",
        {"g": np.ones(4, np.float32)},
    )
    dialect.declare(model)
    with pytest.raises(VerifyError, match="RMSNorm may not appear before outlining .rule stage"):
        verify(model, Stage.QUANTIZED, "my-pass")


def test_refuses_an_op_without_a_body():
    model = quantized()
    model.functions.clear()
    with pytest.raises(VerifyError, match="Quantize has no function body"):
        verify(model, Stage.QUANTIZED, "my-pass")


def test_refuses_a_body_of_another_opset():
    model = quantized()
    model.graph.opset_imports[""] = 22
    with pytest.raises(VerifyError, match="function opset differs from the model's 22"):
        verify(model, Stage.QUANTIZED, "my-pass")


def test_refuses_foreign_ops_in_a_body():
    model = quantized()
    function = next(iter(model.functions.values()))
    function.append(ir.node("Gelu", [function.inputs[0]], domain="com.microsoft"))
    with pytest.raises(VerifyError, match="its body uses com.microsoft::Gelu"):
        verify(model, Stage.QUANTIZED, "my-pass")


def test_refuses_a_wrong_operand_type():
    model = quantized()
    model.graph.outputs[0].dtype = ir.DataType.INT8
    with pytest.raises(VerifyError, match="q is INT8, Quantize needs UINT8"):
        verify(model, Stage.QUANTIZED, "my-pass")


def test_refuses_an_untyped_result():
    model = quantized()
    model.graph.outputs[1].type = None
    with pytest.raises(VerifyError, match="output 's' of Quantize has no type"):
        verify(model, Stage.QUANTIZED, "my-pass")


def test_refuses_a_body_of_ops_that_the_opset_does_not_have():
    for op in ("MatMulXX", "Swish", "Upsample"):  # unknown, of opset 24, gone in 10
        model = quantized()
        function = next(iter(model.functions.values()))
        function.append(ir.node(op, [function.inputs[0]]))
        with pytest.raises(VerifyError, match=f"uses {op}, which ai.onnx 21 .*standard-bodies"):
            verify(model, Stage.QUANTIZED, "my-pass")


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("const_value", None, "initializer 'b' has no value"),
        ("dtype", ir.DataType.INT8, "initializer 'b' is INT8, its value FLOAT"),
        ("shape", ir.Shape([3]), r"initializer 'b' has shape \[3\], its value \[2\]"),
        ("shape", ir.Shape(["n", 2]), r"initializer 'b' has shape \[n,2\]"),
    ],
)
def test_refuses_an_initializer_that_is_not_what_it_is_said_to_be(attribute, value, message):
    model = model_of(
        "g (float[2] x) => (float[2] y) { y = Add (x, b) }", {"b": np.ones(2, np.float32)}
    )
    constant = model.graph.initializers["b"]
    constant.shape = ir.Shape(["n"])
    verify(model, Stage.FLOAT, "my-pass")  # n may be 2
    setattr(constant, attribute, value)
    with pytest.raises(VerifyError, match=f"{message}.* .rule initializers"):
        verify(model, Stage.FLOAT, "my-pass")


def test_a_node_without_a_name_is_called_by_what_it_makes():
    model = quantized()
    model.graph[0].name = None
    with pytest.raises(VerifyError, match="after my-pass: Quantize of 'q': Quantize may not"):
        verify(model, Stage.QDQ, "my-pass")


def test_refuses_tokens_longer_than_their_scale():
    model = quantized()
    model.graph[0].attributes["block_size"] = ir.AttrInt64("block_size", 32)
    with pytest.raises(VerifyError, match=r"x has shape \[2, 64\].* with block_size = 32"):
        verify(model, Stage.QUANTIZED, "my-pass")


def test_holds_regions_to_the_sizes_they_record():
    model = quantized()
    node = model.graph[0]
    outlined = outline(model, Region("Quantize", (("K", 64),)), node.inputs, like=node)
    for old, new in zip(node.outputs, outlined.outputs, strict=True):
        new.shape = old.shape
    replace_nodes([node], [outlined])
    verify(model, Stage.KERNEL, "my-pass")
    model.graph.inputs[0].shape = ir.Shape([2, 65])
    with pytest.raises(VerifyError, match=r"x has shape \[2, 65\].* with block_size = 64"):
        verify(model, Stage.KERNEL, "my-pass")


def test_refuses_a_region_that_does_not_say_what_it_is():
    model = quantized()
    outlined = outline(model, Region("Quantize", (("K", 64),)), model.graph[0].inputs)
    replace_nodes([model.graph[0]], [outlined])
    outlined.metadata_props.clear()
    with pytest.raises(
        VerifyError, match="Quantize_K64 does not say what it computes .rule regions"
    ):
        verify(model, Stage.KERNEL, "my-pass")


def chain():
    return model_of("g (float[2] x) => (float[2] y) { a = Neg (x) y = Relu (a) }")


def test_refuses_a_second_value_of_a_name():
    model = chain()
    model.graph[0].outputs[0].name = "y"
    with pytest.raises(VerifyError, match="a second value is named 'y' .rule unique-names"):
        verify(model, Stage.FLOAT, "my-pass")


def test_refuses_a_value_without_a_name():
    model = chain()
    model.graph[0].outputs[0].name = None
    with pytest.raises(VerifyError, match="a value has no name .rule named"):
        verify(model, Stage.FLOAT, "my-pass")


def test_refuses_reading_what_is_not_yet_there():
    model = chain()
    negate = model.graph[0]
    model.graph.remove(negate)
    model.graph.append(negate)
    with pytest.raises(VerifyError, match="reads 'a' before it is defined .rule defined-before"):
        verify(model, Stage.FLOAT, "my-pass")


def test_refuses_an_output_that_nothing_makes():
    model = chain()
    model.graph.outputs[0] = ir.Value(name="z")
    with pytest.raises(VerifyError, match="output 'z' is not defined .rule defined-outputs"):
        verify(model, Stage.FLOAT, "my-pass")


BRANCHES = (
    "g (bool c, float[2] x) => (float[2] y) { y = If (c) <"
    "then_branch = t () => (float[2] a) { a = Neg (x) }, "
    "else_branch = e () => (float[2] b) { b = Abs (x) }> }"
)


def test_branches_may_use_the_same_names_and_see_what_is_outside():
    model = model_of(BRANCHES)
    branches = [attribute.as_graph() for attribute in model.graph[0].attributes.values()]
    for branch in branches:
        branch[0].outputs[0].name = "inner"
    verify(model, Stage.FLOAT, "my-pass")
    branches[1][0].replace_input_with(0, branches[0][0].outputs[0])
    with pytest.raises(VerifyError, match="reads 'inner' before it is defined"):
        verify(model, Stage.FLOAT, "my-pass")

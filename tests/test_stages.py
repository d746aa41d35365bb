import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of

from qcompiler.ir import dialect
from qcompiler.ir.errors import OptionError, VerifyError
from qcompiler.ir.graph import replace_nodes
from qcompiler.ir.region import Region
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.outlining import outline
from qcompiler.pipeline import Pipeline
from qcompiler.targets.catalog import get_target

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


OPERANDS = {
    "w": np.zeros((64, 5), np.int8),
    "s": np.ones((2, 1), np.float32),
    "ws": np.ones(5, np.float32),
}


U8S8 = "g (uint8[2,64] q) => (float[2,5] y) { y = qcompiler.QMatMulU8S8 (q, t, z, w, ws) }"
CONV = (
    "g (uint8[1,4,8,8] x) => (uint8[1,6,6,6] y) { y = qcompiler.QConv <dilations = [1,1], "
    "group = 1, pads = [0,0,0,0], strides = [1,1]> (x, xs, xz, w, ws, wz, ys, yz, b) }"
)
ONE, ZERO = np.ones((), np.float32), np.zeros((), np.uint8)
CONV_OPERANDS = {
    "w": np.zeros((6, 4, 3, 3), np.int8),
    "ws": np.ones(6, np.float32),
    "wz": np.zeros(6, np.int8),
    "b": np.zeros(6, np.int32),
    **{"xs": ONE, "xz": ZERO, "ys": ONE, "yz": ZERO},
}


def declared(text, operands):
    model = model_of(text, operands)
    dialect.declare(model)
    return model


def product(**changed):
    """A QMatMulW8A8 of constants, some of them changed."""
    model = model_of(
        "g (uint8[2,64] q) => (float[2,5] y) { y = qcompiler.QMatMulW8A8 (q, s, w, ws) }",
        OPERANDS | changed,
    )
    dialect.declare(model)
    return model


def test_accepts_operands_that_fit():
    verify(product(), Stage.QUANTIZED, "my-pass")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w": np.zeros((32, 5), np.int8)}, r"w has shape \[32, 5\], .* \[K N\] with K = 64"),
        ({"w": np.zeros((2, 64, 5), np.int8)}, r"w has shape \[2, 64, 5\], .* needs \[K N\]"),
        ({"ws": np.ones(4, np.float32)}, r"ws has shape \[4\], .* needs \[N\] with N = 5"),
        ({"s": np.ones((2, 2), np.float32)}, r"s has shape \[2, 2\], .* needs \[\* 1\]"),
        ({"s": np.ones((), np.float32)}, r"s has shape \[\], QMatMulW8A8 needs \[\* 1\]"),
    ],
)
def test_refuses_operands_that_do_not_fit(changed, message):
    with pytest.raises(VerifyError, match=f"{message}.* .rule operand-shape, stage quantized"):
        verify(product(**changed), Stage.QUANTIZED, "my-pass")


@pytest.mark.parametrize("single", [(), (1,)])
def test_one_number_may_stand_for_all(single):
    ones = {"t": np.ones(single, np.float32), "z": np.zeros(single, np.uint8)}
    verify(declared(U8S8, OPERANDS | ones), Stage.QUANTIZED, "my-pass")
    ones = {"ws": np.ones(single, np.float32), "wz": np.zeros(single, np.int8)}
    verify(declared(CONV, CONV_OPERANDS | ones), Stage.QUANTIZED, "my-pass")
    verify(declared(CONV, CONV_OPERANDS), Stage.QUANTIZED, "my-pass")


@pytest.mark.parametrize(
    ("text", "changed", "message"),
    [
        (U8S8, {"t": np.ones(2, np.float32)}, r"s has shape \[2\], .* needs \[\] or \[1\]"),
        (U8S8, {"z": np.zeros((1, 1), np.uint8)}, r"z has shape \[1, 1\]"),
        (U8S8, {"w": np.zeros((63, 5), np.int8)}, r"w has shape \[63, 5\], .* with K = 64"),
        (U8S8, {"ws": np.ones(6, np.float32)}, r"ws has shape \[6\], .* with N = 5"),
        (U8S8.replace("S8", "U8").replace("ws)", "ws, wz)"),
         {"w": np.zeros((64, 5), np.uint8), "wz": np.zeros(4, np.uint8)}, r"wz has shape \[4\]"),
        (CONV, {"ws": np.ones(4, np.float32)}, r"ws .* \[\], \[1\] or \[M\] with M = 6"),
        (CONV, {"wz": np.zeros(4, np.int8)}, r"wz has shape \[4\]"),
        (CONV, {"xs": np.ones(4, np.float32)}, r"xs has shape \[4\]"),
        (CONV, {"yz": np.zeros(6, np.uint8)}, r"yz has shape \[6\]"),
        (CONV.replace("group = 1", "group = 2"), {}, r"w .* \[M C/group \*\] with M = 6, C = 4"),
    ],
)  # fmt: skip
def test_refuses_operands_of_one_scale_that_do_not_fit(text, changed, message):
    fitting = CONV_OPERANDS if "QConv" in text else OPERANDS | {"t": ONE, "z": ZERO}
    with pytest.raises(VerifyError, match=f"{message}.* .rule operand-shape, stage quantized"):
        verify(declared(text, fitting | changed), Stage.QUANTIZED, "my-pass")


def without(attribute):
    model = declared(CONV, CONV_OPERANDS)
    del model.graph[0].attributes[attribute]
    return model


def with_input(index, value):
    model = product()
    model.graph[0].replace_input_with(index, value)
    return model


def resized(count):
    model = product()
    model.graph[0].resize_inputs(count)
    return model


def with_attribute():
    model = product()
    model.graph[0].attributes["axis"] = ir.AttrInt64("axis", 7)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: with_input(1, None), "QMatMulW8A8 has no s .rule operands"),
        (lambda: resized(3), "QMatMulW8A8 has no ws .rule operands"),
        (lambda: resized(6), "has 6 inputs, and its function 4 .rule operands"),
        (lambda: without("pads"), "QConv has no attribute pads .rule attributes"),
        (with_attribute, "has an attribute axis, which it does not take .rule attributes"),
    ],
)
def test_refuses_what_is_missing_or_too_much(model, message):
    with pytest.raises(VerifyError, match=message):
        verify(model(), Stage.QUANTIZED, "my-pass")


def test_refuses_a_body_of_ops_that_the_opset_does_not_have():
    for op in ("MatMulXX", "Swish", "Upsample"):  # unknown, of opset 24, gone in 10
        model = product()
        function = next(iter(model.functions.values()))
        function.append(ir.node(op, [function.inputs[1]]))
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


def test_refuses_groups_that_do_not_cover_a_weight():
    model = model_of(
        "g (float[2,70] x) => (float[2,5] y) "
        "{ y = qcompiler.QMatMulW4A16 <block_size = 32> (x, w, ws) }",
        {"w": np.zeros((70, 5), ir.DataType.INT4.numpy()), "ws": np.ones((2, 5), np.float32)},
    )
    dialect.declare(model)
    with pytest.raises(
        VerifyError, match=r"ws has shape \[2, 5\].* \[K/block_size N\] with K = 70"
    ):
        verify(model, Stage.QUANTIZED, "my-pass")


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


class Spoil(ir.passes.InPlacePass):
    """Renames every op to one that does not exist."""

    def call(self, model):
        for node in model.graph:
            node.domain = "nowhere"
        return ir.passes.PassResult(model, True)


def test_a_pipeline_names_the_pass_that_broke_a_rule():
    pipeline = Pipeline.default(get_target("arm-int8"))
    pipeline.insert_after("fuse-gelu", "spoil", Spoil())
    with pytest.raises(VerifyError, match="after spoil: .*'nowhere' is not imported"):
        pipeline.run(model_of("g (float[2] x) => (float[2] y) { y = Relu (x) }"))


def test_editing_a_pipeline():
    pipeline = Pipeline.default(get_target("arm-int8"))
    names = [step.name for step in pipeline]
    pipeline.insert_before("canonicalize", "first", Spoil())
    pipeline.remove("bind-kernels")
    pipeline.replace("fuse-gelu", Spoil())
    assert [step.name for step in pipeline] == ["first", *names[:-1]]
    with pytest.raises(OptionError, match="no pass 'fuse-gellu'.*did you mean 'fuse-gelu'"):
        pipeline.remove("fuse-gellu")

import onnx_ir as ir
import pytest
from golden import model_of

from qcompiler.ir import dialect
from qcompiler.ir.errors import OptionError, VerifyError
from qcompiler.ir.stages import Stage, verify
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

"""What a step of a pipeline must keep: inputs, outputs, the opset; else its name is said."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of

from qcompiler.ir.errors import OptionError, VerifyError
from qcompiler.ir.stages import Stage
from qcompiler.pipeline import Pipeline
from qcompiler.step import Step
from qcompiler.targets.catalog import get_target


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


class Rewires(ir.passes.InPlacePass):
    """Does something to the graph of a model."""

    def __init__(self, what, changes_interface=False):
        super().__init__()
        self.what, self.changes_interface = what, changes_interface

    def call(self, model):
        self.what(model.graph)
        return ir.passes.PassResult(model, True)


def rename_an_output(graph):
    graph.outputs[1].name = "z"


def reorder_outputs(graph):
    first, second = graph.outputs
    graph.outputs[:] = [second, first]


def drop_an_output(graph):
    del graph.outputs[1]


def rename_an_input(graph):
    graph.inputs[0].name = "X"


def reorder_inputs(graph):
    first, second = graph.inputs[:2]
    graph.inputs[:2] = [second, first]


def add_an_input(graph):
    graph.inputs.append(ir.val("w", ir.DataType.FLOAT, [2]))


REWIRED = [
    (rename_an_output, "outputs were …, b, and are …, z"),
    (reorder_outputs, "outputs were a, b, and are b, a"),
    (drop_an_output, "outputs were …, b, and are …, no more"),
    (rename_an_input, "inputs were x, y, and are X, y"),
    (reorder_inputs, "inputs were x, y, and are y, x"),
    (add_an_input, "inputs were …, no more, and are …, w"),
]


def two_of_each():
    return model_of("g (float[2] x, float[2] y) => (float[2] a, float[2] b) "
                    "{ a = Add (x, y) b = Sub (x, y) }")  # fmt: skip


@pytest.mark.parametrize(("what", "problem"), REWIRED)
def test_inputs_and_outputs_keep_their_names_and_their_order(what, problem):
    message = rf"^after mine: g: its {problem} .*changes_interface.* .rule interface, stage float"
    with pytest.raises(VerifyError, match=message):
        Step("mine", Rewires(what), Stage.FLOAT).apply(two_of_each())
    Step("mine", Rewires(what, changes_interface=True), Stage.FLOAT).apply(two_of_each())


def test_the_opset_does_not_fall():
    def lower(graph):
        graph.opset_imports[""] = 9

    message = "^after mine: g: its opset of ai.onnx was 21, and is 9 .rule opset, stage float.$"
    with pytest.raises(VerifyError, match=message):
        Step("mine", Rewires(lower), Stage.FLOAT).apply(two_of_each())


def test_an_input_with_a_value_of_its_own_may_go():
    model = two_of_each()
    value = model.graph.inputs[1]
    value.const_value = ir.tensor(np.ones(2, np.float32), name="y")
    model.graph.register_initializer(value)
    Step("mine", Rewires(lambda graph: graph.inputs.pop()), Stage.FLOAT).apply(model)


def test_editing_a_pipeline():
    pipeline = Pipeline.default(get_target("arm-int8"))
    names = [step.name for step in pipeline]
    pipeline.insert_before("canonicalize", "first", Spoil())
    pipeline.remove("bind-kernels")
    pipeline.replace("fuse-gelu", Spoil())
    assert [step.name for step in pipeline] == ["first", *names[:-1]]
    with pytest.raises(OptionError, match="no pass 'fuse-gellu'.*did you mean 'fuse-gelu'"):
        pipeline.remove("fuse-gellu")

"""A pass that leaves ops of ai.onnx that cannot be is told at once, and by its own name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of

from qcompiler.ir.errors import VerifyError
from qcompiler.ir.onnx_rules import onnx_problems
from qcompiler.ir.stages import Stage
from qcompiler.step import Step

WEIGHTS = {"w": np.ones((4, 3), np.float32), "b": np.ones(3, np.float32)}
SOURCE = "g (float[2,4] x) => (float[2,3] y) { m = MatMul (x, w) y = Add (m, b) }"


class Breaks(ir.passes.InPlacePass):
    """Does something to the first node of a model."""

    def __init__(self, what: Callable[[ir.Node], None]) -> None:
        super().__init__()
        self.what = what

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.what(model.graph[0])
        return ir.passes.PassResult(model, True)


def rename(node: ir.Node) -> None:
    node.op_type = "MatMull"


def take_a_newer_op(node: ir.Node) -> None:
    node.op_type = "RMSNormalization"  # of opset 23


def take_a_dropped_op(node: ir.Node) -> None:
    node.op_type = "Upsample"  # until opset 9


def take_an_op_that_never_was(node: ir.Node) -> None:
    node.op_type = "Exponential"


def drop_an_operand(node: ir.Node) -> None:
    node.resize_inputs(1)


def add_an_operand(node: ir.Node) -> None:
    node.resize_inputs(3)


def store_its_result(node: ir.Node) -> None:
    node.outputs[0].dtype = ir.DataType.INT8


def give_an_unknown_attribute(node: ir.Node) -> None:
    node.attributes["trans_b"] = ir.AttrInt64("trans_b", 1)


def give_another_kind(node: ir.Node) -> None:
    node.op_type = "Softmax"
    node.resize_inputs(1)
    node.attributes["axis"] = ir.AttrFloat32("axis", 1.0)


def leave_out_an_attribute(node: ir.Node) -> None:
    node.op_type = "Concat"


def misspell_an_attribute(node: ir.Node) -> None:
    leave_out_an_attribute(node)
    node.attributes["axes"] = ir.AttrInt64("axes", 0)
    node.attributes["axis"] = ir.AttrInt64("axis", 0)


def multiply_bools(node: ir.Node) -> None:
    for value in (*node.inputs, *node.outputs):
        assert value is not None
        value.const_value = None
        value.dtype = ir.DataType.BOOL


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        (rename, "ai.onnx 21 has no MatMull; did you mean 'MatMul'. .rule onnx-op, stage float"),
        (take_a_newer_op, "ai.onnx 21 has no RMSNormalization, which came with 23 "),
        (take_a_dropped_op, "ai.onnx 21 has no Upsample "),
        (drop_an_operand, "MatMul with 1 operands .rule onnx-operands"),
        (add_an_operand, "MatMul with 3 operands .rule onnx-operands"),
        (give_an_unknown_attribute, "MatMul has no attribute 'trans_b' .rule onnx-attributes"),
        (misspell_an_attribute, "Concat has no attribute 'axes'; did you mean 'axis'. .rule onnx"),
        (leave_out_an_attribute, "Concat without its attribute 'axis' .rule onnx-attributes"),
        (give_another_kind, "Softmax whose 'axis' is FLOAT, not INT .rule onnx-attributes"),
        (store_its_result, "MatMul of FLOAT and INT8, whose T is one type .rule onnx-types"),
    ],
)
def test_a_broken_op_is_told(what: Callable[[ir.Node], None], problem: str) -> None:
    step = Step("mine", Breaks(what), Stage.FLOAT)
    with pytest.raises(VerifyError, match=f"^after mine: .*: {problem}"):
        step.apply(model_of(SOURCE, WEIGHTS))


def test_a_type_that_an_op_does_not_take() -> None:
    model = model_of(SOURCE, WEIGHTS)
    multiply_bools(model.graph[0])
    problems = [problem for _, _, problem in onnx_problems(model)]
    assert problems[:3] == ["MatMul of BOOL, which its T may not be"] * 3


@pytest.mark.parametrize(
    "what", [rename, drop_an_operand, give_an_unknown_attribute, store_its_result]
)
def test_what_the_source_had_wrong_is_no_fault_of_a_pass(
    what: Callable[[ir.Node], None],
) -> None:
    model = model_of(SOURCE, WEIGHTS)
    what(model.graph[0])

    def name(node: ir.Node) -> None:
        node.name = "another_name"

    Step("mine", Breaks(name), Stage.FLOAT).apply(model)
    with pytest.raises(VerifyError, match="no Exponential"):
        Step("mine", Breaks(take_an_op_that_never_was), Stage.FLOAT).apply(model)


@pytest.mark.parametrize(
    "body",
    [
        "a = Concat <axis = 0> (x, x, x) y = Clip (a)",
        'y = Resize <mode = "nearest"> (x, , twice)',
        "s = SequenceConstruct (x, x) y = ConcatFromSequence <axis = 0> (s)",
        "c = Greater (x, x) y = Where (c, x, x)",
        "q, s, z = DynamicQuantizeLinear (x) y = DequantizeLinear (q, s, z)",
        "h = Cast <to = 10> (x) y = Sum (h)",
        "t = Shape (x) a, b = Split <num_outputs = 2> (x) y = Reshape (x, t)",
    ],
)
def test_what_may_be_may_be(body: str) -> None:
    result = "float16 y" if "to = 10" in body else "float y"
    text = f"g (float[2,4] x) => ({result}) {{ {body} }}"
    model = model_of(text, {"twice": np.full(2, 2, np.float32)})
    assert not list(onnx_problems(model))

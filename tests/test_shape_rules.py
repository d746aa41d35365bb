"""A shape that an op of ai.onnx cannot have is told at once, and by the pass that left it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of, run

from qcompiler.ir.errors import ModelError, VerifyError
from qcompiler.ir.shape_rules import shape_problems
from qcompiler.ir.stages import Stage
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.pipeline import Pipeline

WEIGHTS = {"w": np.ones((4, 3), np.float32), "b": np.ones(3, np.float32)}
SOURCE = "g (float[n,4] x) => (float[n,3] y) { m = MatMul (x, w) y = Add (m, b) }"


class Breaks(ir.passes.InPlacePass):
    """Does something to the first product of a model."""

    def __init__(self, what: Callable[[ir.Node], None]) -> None:
        super().__init__()
        self.what = what

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.what(next(node for node in model.graph if node.op_type == "MatMul"))
        return ir.passes.PassResult(model, True)


def say(shape: list[int | str]) -> Callable[[ir.Node], None]:
    def what(node: ir.Node) -> None:
        node.outputs[0].shape = ir.Shape(shape)

    return what


def read_a_bias(node: ir.Node) -> None:
    """Multiply by the bias, of three elements, where four are needed."""
    bias = next(iter(node.outputs[0].uses())).node.inputs[1]
    node.replace_input_with(1, bias)


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        (say(["n", 5]), r"makes \[\?, 3\], and says that it is \[\?, 5\]"),
        (say(["n", 3, 1]), r"makes \[\?, 3\], and says that it is \[\?, 3, 1\]"),
        (say([]), r"makes \[\?, 3\], and says that it is \[\]"),
        (read_a_bias, r"Incompatible dimensions for matrix multiplication"),
    ],
)
@pytest.mark.parametrize("anchor", ["canonicalize", "equalize-layers"])
def test_a_broken_shape_is_told(what: Callable[[ir.Node], None], problem: str, anchor: str) -> None:
    pipeline = Pipeline.default("x86-int8").insert_after(anchor, "mine", Breaks(what))
    told = rf"^after mine: .*: MatMul of \[\?, 4\] and \[.*\]:? ?{problem} .rule onnx-shapes, stage"
    with pytest.raises(VerifyError, match=told):
        pipeline.run(model_of(SOURCE, WEIGHTS))


def test_another_name_of_an_open_size_is_no_mistake() -> None:
    pipeline = Pipeline.default("x86-int8").up_to(Stage.FLOAT)
    pipeline.insert_after("canonicalize", "mine", Breaks(say(["batch", 3])))
    pipeline.run(model_of(SOURCE, WEIGHTS))


def test_what_the_source_says_wrongly_is_no_fault_of_a_pass() -> None:
    model = model_of(SOURCE, WEIGHTS)
    say(["n", 5])(model.graph[0])
    assert {rule for rule, _, _ in shape_problems(model)} == {"onnx-shapes"}
    step = next(iter(Pipeline.parse("fuse-gelu")))
    step.apply(model)
    Pipeline.default("x86-int8").run(model)


def test_a_source_whose_operands_do_not_fit_is_refused_by_name() -> None:
    model = model_of(SOURCE, WEIGHTS)
    model.graph[0].name = "product"
    read_a_bias(model.graph[0])
    with pytest.raises(ModelError, match=r"not valid ONNX: product: MatMul of \[\?, 4\] and \[3\]"):
        Canonicalize()(model)


def test_wrong_outputs_of_the_source_stay_as_they_came() -> None:
    model = model_of(SOURCE.replace("float[n,3] y", "float[n,7] y"), WEIGHTS)
    assert not list(shape_problems(model))
    compiled = Pipeline.default("x86-int8").run(model)
    assert run(compiled, {"x": np.ones((2, 4), np.float32)})[0].shape == (2, 3)


@pytest.mark.parametrize(
    "body",
    [
        "t = Reshape (x, flat) u = Identity (t) y = Neg (u)",
        "t = Shape (x) r = Reshape (x, t) y = Neg (r)",
        "a, b = Split <num_outputs = 2> (x) y = Concat <axis = 0> (a, b)",
        "s = SequenceConstruct (x, x) c = ConcatFromSequence <axis = 0> (s) y = Neg (c)",
        "t = ConstantOfShape <value: tensor = float[1] {1.0}> (flat) y = Add (t, x)",
        "k = Transpose <perm = [1, 0]> (x) y = MatMul (x, k)",
        "p = Pad (x, ends) y = Neg (p)",
        "c = ReduceSum <keepdims = 0> (x) f = Cast <to = 9> (c) "
        "y = If (f) <then_branch = a () => (p) { q = Neg (x) p = Neg (q) }, "
        "else_branch = e () => (p) { p = Abs (x) }>",
    ],
)
def test_what_may_be_may_be(body: str) -> None:
    constants = {"flat": np.array([-1]), "ends": np.array([0, 1, 0, 1])}
    model = model_of(f"g (float[2,4] x) => (float y) {{ {body} }}", constants)
    InferShapes()(model)
    assert not list(shape_problems(model))

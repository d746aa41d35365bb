"""What the verifier asks of Q and DQ: each rule broken once, and what is not held against any."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import model_of

from qcompiler.ir.errors import ModelError, VerifyError
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.canonicalize import Canonicalize

FLOAT, DOUBLE = np.float32, np.float64


def pair(scale, zero=None, attributes="", op="DequantizeLinear", data="int8[6,8]"):
    """One Q or DQ of `x`, with a constant scale and zero point."""
    operands = "(x, s)" if zero is None else "(x, s, z)"
    result = "float[6,8]" if op == "DequantizeLinear" else "uint8[6,8]"
    model = model_of(
        f"g ({data} x) => ({result} y) {{ y = {op} {attributes} {operands} }}",
        {"s": scale} | ({} if zero is None else {"z": zero}),
    )
    model.graph[0].name = "widen"
    return model


ONE = np.ones((), FLOAT)


@pytest.mark.parametrize(
    ("model", "rule", "message"),
    [
        (lambda: pair(np.ones((), DOUBLE)), "float-scale", "its scale is DOUBLE, and may be FLOAT"),
        (lambda: pair(ONE, np.zeros((), np.uint8)), "zero-point-dtype", "is UINT8, .* stores INT8"),
        (
            lambda: pair(np.ones(8, FLOAT), np.zeros(6, np.int8)),
            "zero-point-shape",
            r"its zero point has shape \[6\], its scale \[8\]",
        ),
        (
            lambda: pair(np.ones(8, FLOAT), np.zeros((), np.int8)),
            "zero-point-shape",
            r"its zero point has shape \[\], its scale \[8\]",
        ),
        (
            lambda: pair(np.ones(6, FLOAT)),
            "scale-shape",
            r"its scale has shape \[6\], axis 1 of \[6, 8\] takes 8",
        ),
        (
            lambda: pair(np.ones((6, 8), FLOAT)),
            "scale-shape",
            r"\[6, 8\]: without a block_size it is one, or one per slice",
        ),
        (
            lambda: pair(np.ones(8, FLOAT), attributes="<axis = 2>"),
            "axis",
            r"axis 2 of 'x' of shape \[6, 8\] does not exist",
        ),
        (
            lambda: pair(np.ones((1, 8), FLOAT), attributes="<axis = 0, block_size = 4>"),
            "scale-shape",
            r"\[1, 8\], blocks of 4 along axis 0 of \[6, 8\] take \[2, 8\]",
        ),
        (
            lambda: pair(np.ones(2, FLOAT), attributes="<axis = 0, block_size = 4>"),
            "scale-shape",
            r"\[2\], blocks of 4 along axis 0",
        ),
        (
            lambda: pair(np.ones((1, 8), FLOAT), attributes="<axis = 0, block_size = -4>"),
            "block-size",
            "its block_size is -4",
        ),
        (
            lambda: pair(ONE, attributes="<axis = 0, block_size = 4>"),
            "block-size",
            "its block_size is 4, and there is one scale for all",
        ),
        (
            lambda: pair(ONE, data="int2[6,8]"),
            "storage",
            "stores INT2, which needs opset 25, not 21",
        ),
        (
            lambda: pair(
                ONE, op="QuantizeLinear", attributes="<output_dtype = 3>", data="float[6,8]"
            ),
            "output-dtype",
            "output_dtype is INT8, its output UINT8",
        ),
        (
            lambda: pair(ONE, op="QuantizeLinear", data="int8[6,8]"),
            "float-input",
            "it quantizes INT8, and may FLOAT, FLOAT16 or BFLOAT16",
        ),
        (
            lambda: pair(np.ones((), np.float16), op="QuantizeLinear", data="float[6,8]"),
            "float-input",
            "it quantizes FLOAT by a scale of FLOAT16, before opset 23",
        ),
        (
            lambda: pair(ONE, np.full((), 3, np.int32), data="int32[6,8]"),
            "zero-point",
            "its zero point is 3, and under INT32 ONNX asks for 0",
        ),
    ],
)
def test_each_rule_names_pass_node_and_rule(model, rule, message):
    with pytest.raises(VerifyError, match=f"after my-pass: widen: .*{message}.*rule {rule}, stage"):
        verify(model(), Stage.QDQ, "my-pass")


def test_a_stored_type_that_is_none():
    model = pair(ONE)
    model.graph.inputs[0].dtype = ir.DataType.INT64
    with pytest.raises(VerifyError, match="INT64, which nothing is quantized to.*storage"):
        verify(model, Stage.QDQ, "my-pass")


def inner_pair():
    """A Q and its DQ, which is not the model's output."""
    return model_of(
        "g (float[6,8] x) => (float[6,8] y) "
        "{ q = QuantizeLinear (x, s) d = DequantizeLinear (q, s) y = Relu (d) }",
        {"s": ONE},
    )


def test_results_that_are_not_what_the_operands_make():
    model = inner_pair()
    verify(model, Stage.QDQ, "my-pass")
    model.graph[1].outputs[0].dtype = ir.DataType.FLOAT16
    with pytest.raises(
        VerifyError, match="its output is FLOAT16, and should be FLOAT .rule output"
    ):
        verify(model, Stage.QDQ, "my-pass")
    for node, sizes in ((0, [8, 6]), (1, [6, 8, 1])):
        model = inner_pair()
        model.graph[node].outputs[0].shape = ir.Shape(sizes)
        with pytest.raises(
            VerifyError, match=r"its output has shape \[.*6, 8.* .rule output-shape"
        ):
            verify(model, Stage.QDQ, "my-pass")


def test_what_a_model_says_of_its_outputs_is_not_held_against_it():
    model = pair(ONE)
    model.graph.outputs[0].shape = ir.Shape([8, 6])
    run_as_it_is = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    assert run_as_it_is.run(None, {"x": np.ones((6, 8), np.int8)})[0].shape == (6, 8)
    verify(model, Stage.QDQ, "my-pass")


def test_a_pair_without_a_scale():
    model = pair(ONE)
    model.graph[0].replace_input_with(1, None)
    with pytest.raises(VerifyError, match="DequantizeLinear has no scale .rule has-scale"):
        verify(model, Stage.QDQ, "my-pass")


def test_rules_reach_into_branches():
    model = model_of(
        "g (bool c, int8[6,8] x) => (float[6,8] y) { y = If (c) <"
        "then_branch = t () => (float[6,8] a) { a = DequantizeLinear <axis = 5> (x, s) }, "
        "else_branch = e () => (float[6,8] b) { b = Cast <to = 1> (x) }> }",
        {"s": np.ones(8, FLOAT)},
    )
    with pytest.raises(VerifyError, match="axis 5 of 'x'"):
        verify(model, Stage.QDQ, "my-pass")


def test_what_is_not_known_is_not_held_against_it():
    model = pair(np.ones(5, FLOAT), np.zeros(5, np.int8), data="int8[n,m]")
    verify(model, Stage.QDQ, "my-pass")
    computed = model_of(
        "g (int8[6] x, float[n] s) => (float[6] y) { y = DequantizeLinear <axis = 1> (x, s) }"
    )
    verify(computed, Stage.QDQ, "my-pass")  # with one scale the axis does not matter
    model.graph.inputs[0].shape = None
    model.graph.inputs[0].type = None
    verify(model, Stage.QDQ, "my-pass")


def test_a_model_that_comes_so_is_refused_by_name():
    with pytest.raises(ModelError, match=r"not valid ONNX: widen: its scale has shape .6., axis 1"):
        Canonicalize()(pair(np.ones(6, FLOAT)))

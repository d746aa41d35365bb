"""What the verifier asks of the operands and attributes of the dialect's ops."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of

from qcompiler.ir import dialect
from qcompiler.ir.errors import VerifyError
from qcompiler.ir.stages import Stage, verify

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
    text = "g (uint8[2,64] q) => (float[2,5] y) { y = qcompiler.QMatMulW8A8 (q, s, w, ws) }"
    return declared(text, OPERANDS | changed)


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

"""Regions that would read what is made of their own result, and those made behind others."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of, run, steps_through
from test_fuse_images import CHAIN, IMAGES, LAYERS, for_gpus, supports

from qcompiler.ir.decisions import note_of
from qcompiler.ir.stages import Stage, verify
from qcompiler.passes.fuse_images import FuseImages
from qcompiler.pipeline import Pipeline


def with_a_computed_step(steps: str) -> ir.Model:
    """Two outlined convolutions; the step of the image between them comes of these nodes.

    They are put where the result of the first is made, `r`, beside the input, `x`.
    """
    *earlier, _ = steps_through("fuse-images", pipeline=for_gpus())
    model = Pipeline(earlier).run(model_of(CHAIN, LAYERS))
    conv, image = (
        next(node for node in model.graph if node.op_type.startswith(op))
        for op in ("QConvW8A8_K16", "QuantizeImage_K24")
    )
    around = model_of(f"g (float[1] old, float16 r, float[m] x) => (float[1] new) {{ {steps} }}")
    given = dict(zip(("old", "r", "x"), (image.inputs[1], conv.outputs[0], model.graph.inputs[0]),
                     strict=True))  # fmt: skip
    for value in around.graph.inputs:
        value.replace_all_uses_with(given[value.name or ""])
    nodes = list(around.graph)
    for index, node in enumerate(nodes):
        node.name = f"step_{index}"
        node.outputs[0].name = f"step_{index}"
    around.graph.outputs.clear()
    around.graph.remove(nodes)
    model.graph.insert_after(conv, nodes)
    image.replace_input_with(1, nodes[-1].outputs[0])
    return model


OF_ITS_RESULT = (
    "f = Cast <to = 1> (r) m = ReduceMax <keepdims = 0> (f) o = Div (m, m) new = Mul (old, o)"
)
OF_THE_INPUT = "m = ReduceMax <keepdims = 0> (x) o = Div (m, m) new = Mul (old, o)"


def test_a_step_that_comes_of_the_result_is_no_part_of_its_kernel() -> None:
    model = with_a_computed_step(OF_ITS_RESULT)
    before = run(model, IMAGES, plainly=True)
    assert not FuseImages(supports)(model).modified
    verify(model, Stage.KERNEL, "fuse-images")
    np.testing.assert_array_equal(run(model, IMAGES, plainly=True), before)
    conv = next(node for node in model.graph if "AddC_Relu" in node.op_type)
    note = "its result is not stored as an image: a way leads out of it and back, by step_0"
    assert note in (note_of(conv) or "")


@pytest.mark.parametrize("early_reader", [False, True])
def test_a_step_that_is_made_behind_the_convolution(early_reader: bool) -> None:
    """The node for both moves behind it; and what reads the result before that, behind that."""
    model = with_a_computed_step(OF_THE_INPUT)
    if early_reader:
        conv = next(node for node in model.graph if node.op_type.startswith("QConvW8A8_K16"))
        reader = ir.node("Cast", conv.outputs, {"to": ir.DataType.FLOAT}, name="early")
        reader.outputs[0].name, reader.outputs[0].dtype = "early", ir.DataType.FLOAT
        model.graph.insert_after(conv, reader)
        model.graph.outputs.append(reader.outputs[0])
    before = run(model, IMAGES, plainly=True)
    assert FuseImages(supports)(model).modified
    verify(model, Stage.KERNEL, "fuse-images")
    for got, want in zip(run(model, IMAGES, plainly=True), before, strict=True):
        np.testing.assert_array_equal(got, want)

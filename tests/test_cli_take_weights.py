"""qcompile take-weights: a checkpoint's weights into a model, on the command line."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import LAYER, gptq, model
from terminal import fails, qcompile

from qcompiler.passes.widen_constants import dequantized_constant


def test_on_the_command_line(tmp_path):
    file, floats = gptq(tmp_path, 4)
    made = model()
    made.graph[0].name = "up"
    ir.save(made, tmp_path / "m.onnx")
    words = ["take-weights", tmp_path / "m.onnx", file]
    result = qcompile(*words, tmp_path / "out.onnx", "--name", f"{LAYER}=up")
    assert result.exit_code == 0, result.output
    assert "1 layers of " in result.stdout and "Written to" in result.stdout
    loaded = ir.load(tmp_path / "out.onnx")
    (node,) = [node for node in loaded.graph if node.op_type == "MatMul"]
    np.testing.assert_array_equal(dequantized_constant(node.inputs[1]), floats)
    result = qcompile(*words, tmp_path / "two.onnx", "--name", f"{LAYER}=up", "--json")
    assert json.loads(result.stdout)["layers"] == [LAYER]


@pytest.mark.parametrize(
    ("code", "message", "more"),
    [
        (2, "--name 'up' is not LAYER=NODE", ["--name", "up"]),
        (2, "the layer 'a' is given twice", ["--name", "a=up", "--name", "a=down"]),
        (1, "has no layer 'model.layers.0.mlp.up_prjo'; did you mean 'model.layers.0.mlp.up_proj'",
         ["--name", "model.layers.0.mlp.up_prjo=up"]),
        (1, "no MatMul of the model has the name of layer", []),
        (1, "no MatMul of the model has the name of layer", ["--name", f"{LAYER}=down"]),
    ],
)  # fmt: skip
def test_what_the_command_line_refuses(tmp_path, code, message, more):
    file, _ = gptq(tmp_path, 4)
    made = model()
    made.graph[0].name = "up"
    ir.save(made, tmp_path / "m.onnx")
    fails(code, message, "take-weights", tmp_path / "m.onnx", file, tmp_path / "out.onnx", *more)
    assert not (tmp_path / "out.onnx").exists()


def test_the_command_line_names_files_that_are_not_there(tmp_path):
    file, _ = gptq(tmp_path, 4)
    ir.save(model(), tmp_path / "m.onnx")
    out = tmp_path / "out.onnx"
    fails(1, "no.safetensors does not exist", "take-weights", tmp_path / "m.onnx",
          tmp_path / "no.safetensors", out)  # fmt: skip
    fails(1, "no.onnx", "take-weights", tmp_path / "no.onnx", file, out)
    fails(1, "is the input", "take-weights", tmp_path / "m.onnx", file, tmp_path / "m.onnx")

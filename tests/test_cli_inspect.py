"""qcompile inspect: of models and bundles, and of what is neither."""

import json
import re
from pathlib import Path

import pytest
from terminal import ARM, MODEL, fails, qcompile

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_inspect_a_model():
    flat = " ".join(qcompile("inspect", MODEL).stdout.split())
    assert "ONNX opset 20" in flat
    assert "Input image float [batch, 1, 20, 20]" in flat
    assert "Output logits float [batch, 10]" in flat
    assert "Quantized no" in flat
    assert "MatMul 16" in flat


def test_inspect_a_model_as_json():
    found = json.loads(qcompile("inspect", MODEL, "--json").stdout)
    assert found["inputs"] == [{"name": "image", "dtype": "float", "shape": ["batch", 1, 20, 20]}]
    assert found["ops"]["MatMul"] == 16
    assert found["quantized"] == {}


def test_inspect_sees_quantization(arm_digits):
    assert "already: QMatMulW8A8 13" in qcompile("inspect", arm_digits / "model.onnx").stdout


def test_inspect_a_bundle(arm_digits):
    for path in (arm_digits, arm_digits / "manifest.json"):
        result = qcompile("inspect", path)
        assert result.exit_code == 0, result.output
        flat = " ".join(result.stdout.split())
        assert "a bundle for arm-int8" in flat
        assert "ONNX Runtime 1.23 or newer" in flat
        assert "keep_float = ['Conv']" in flat
        assert "13 function body QMatMulW8A8" in flat
        assert re.search(r"Kernels none: [0-9]+ nodes of ours run as function bodies", flat)
        assert "Content" in flat
        assert "intact" in flat


def test_inspect_a_bundle_of_floats():
    assert qcompile(MODEL, "--target", "arm-int8", "--keep-float", "*", "-o", "b").exit_code == 0
    flat = " ".join(qcompile("inspect", "b").stdout.split())
    assert "Kernels none needed: every node is ONNX Runtime's own" in flat
    assert "function bod" not in flat


def test_inspect_a_bundle_as_json(arm_digits):
    found = json.loads(qcompile("inspect", arm_digits, "--json").stdout)
    assert (found["kind"], found["target"]) == ("bundle", "arm-int8")
    assert {file["state"] for file in found["files"]} == {"as written"}


def test_inspect_an_altered_bundle():
    assert qcompile(MODEL, *ARM, "-o", "b").exit_code == 0
    with open("b/model.onnx", "ab") as file:
        file.write(b"x")
    Path("b/model.onnx.data").unlink()
    result = qcompile("inspect", "b")
    assert result.exit_code == 1
    assert "altered" in result.stdout
    assert "missing" in result.stdout
    assert "error: b: model.onnx, model.onnx.data: not what was written" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a bundle: it has no manifest.json"),
        ("{", "not a readable manifest"),
        ('{"schema": 99}', "has schema 99"),
        ('{"schema": 1, "target": "x86-a", "tools": {}, "minimum_ort": "1.23", "recipe": {}, '
         '"decisions": [{"no": "x"}], "files": {"model.onnx": ""}, "library": null}',
         "unreadable decisions"),
    ],
)  # fmt: skip
def test_inspect_what_is_no_bundle(content, message):
    Path("b").mkdir()
    if content is not None:
        Path("b/manifest.json").write_text(content)
    fails(1, message, "inspect", "b")


def test_inspect_prints_the_recipe_as_json(arm_digits):
    recipe = json.loads(qcompile("inspect", arm_digits, "--recipe", "--json").stdout)
    assert recipe["calibration"] == "mse"

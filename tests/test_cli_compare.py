"""qcompile compare: outputs, recipes, progress, and bad input."""

import json
import tomllib

import numpy as np
import onnx
import onnx.parser
import pytest
from terminal import CALIB, MODEL, TEST, fails, qcompile

from qcompiler.recipe import Recipe

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_compare(arm_digits):
    result = qcompile("compare", MODEL, arm_digits, "--data", TEST, "--labels", "label")
    assert result.exit_code == 0, result.output
    flat = " ".join(result.stdout.split())
    assert "10 sample files" in flat
    assert "Same Accuracy Accuracy" in flat
    assert "98.70%" in flat
    assert " dB" in flat
    assert max(map(len, result.stdout.splitlines()[3:])) <= 100


def test_compare_as_json(arm_digits):
    result = qcompile("compare", MODEL, arm_digits, "--data", CALIB, "--no-native", "--json")
    found = json.loads(result.stdout)
    assert (found["samples"], found["native"], result.stderr) == (4, False, "")
    assert found["outputs"][0]["sqnr"] > 25
    assert found["outputs"][0]["accuracy"] is None


def test_compare_sums_up_many_outputs():
    names = [f"y{index}" for index in range(20)]
    for scale in (1.0, 1.1):
        body = "".join(f"{name} = {'Mul' if name == 'y17' else 'Add'} (x, s) " for name in names)
        onnx.save(onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 21]> g (float[4] x) => '
            f"({', '.join(f'float[4] {name}' for name in names)}) "
            f"{{ s = Constant <value_float = {scale}> () {body} }}"), f"{scale}.onnx")  # fmt: skip
    np.savez("x.npz", x=np.ones(4, np.float32))
    command = ("compare", "1.0.onnx", "1.1.onnx", "--data", "x.npz")
    stdout = qcompile(*command).stdout
    assert [name for name in names if f"\n{name} " in stdout] == names[:6]
    assert "and 14 more: worst SQNR 20.0 dB (y17); -v lists them" in stdout
    assert all(f"\n{name} " in qcompile(*command, "-v").stdout for name in names)
    assert len(json.loads(qcompile(*command, "--json").stdout)["outputs"]) == 20


def test_compare_prints_a_recipe(arm_digits):
    command = ("compare", MODEL, arm_digits, "--data", CALIB, "--keep-worst", "2")
    text = qcompile(*command).stdout
    found = json.loads(qcompile(*command, "--json").stdout)
    assert Recipe.from_dict(found) == Recipe.from_dict(tomllib.loads(text))
    assert len(found["keep_float"]) == 3  # Conv was before


def test_compare_says_how_far_it_is(arm_digits):
    result = qcompile("compare", MODEL, arm_digits, "--data", CALIB)
    stages = [line.split(" s  ")[1] for line in result.stderr.splitlines()]
    assert stages == ["node by node", "the outputs"]
    assert qcompile("compare", MODEL, arm_digits, "--data", CALIB, "-q").stderr == ""


def test_compare_equal_models():
    assert "equal" in qcompile("compare", MODEL, MODEL, "--data", CALIB).stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([MODEL, "BUNDLE"], 2, "Missing option '--data'"),
        ([MODEL, "BUNDLE", "--data", "nowhere"], 1, "nowhere does not exist"),
        ([MODEL, "BUNDLE", "--data", CALIB, "--labels", "label"], 1, "no array 'label' of labels"),
        ([MODEL, "nowhere", "--data", CALIB], 1, "no model: nowhere does not exist"),
        (["nope.onnx", "BUNDLE", "--data", CALIB], 1, "no model: nope.onnx does not exist"),
    ],
)
def test_compare_with_bad_input(arm_digits, args, code, message):
    fails(code, message, "compare", *(arm_digits if arg == "BUNDLE" else arg for arg in args))

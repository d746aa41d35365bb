"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import onnx

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_custom_pass(tmp_path):
    changed = example("custom_pass").main("arm-int8", tmp_path / "bundle")
    assert {"clip-weights", "gelu-by-tanh"} <= set(changed)
    gelus = [
        n for n in onnx.load(tmp_path / "bundle" / "model.onnx").graph.node if n.op_type == "Gelu"
    ]
    assert [node.attribute[0].s for node in gelus] == [b"tanh"] * 2

"""The examples run, and do what they say."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

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


def test_torch_export():
    pytest.importorskip("torch", reason="torch is not installed")
    command = [sys.executable, str(EXAMPLES / "torch_export.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"(\d+) rows: .* ([\d.]+) dB", printed)
    assert [int(rows) for rows, _ in found] == [1, 7, 128]
    assert all(float(noise) > 30 for _, noise in found)

"""The examples run, and do what they say."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from golden import model_of

from qcompiler.ir.errors import CalibrationError

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


def test_language_model(tmp_path, monkeypatch, capsys):
    """A model of bytes, and a text that is long enough or too short."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape).astype(np.float32) / 8 for name, shape in
               {"table": (256, 32), "v": (32, 64), "w": (64, 256)}.items()}  # fmt: skip
    model = model_of(
        "g (int64[b,s] input_ids) => (float[b,s,256] logits) { x = Gather (table, input_ids) "
        "h = MatMul (x, v) a = Relu (h) logits = MatMul (a, w) }",
        weights,
    )
    onnx_ir.save(model, tmp_path / "model.onnx")
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 900)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    example("language_model").main("model.onnx", "text.txt")
    printed = capsys.readouterr().out
    assert printed.count("rounded by gptq to ") >= 4  # of two layers, while at it and at the end
    assert (tmp_path / "model.x86-int4" / "model.onnx").exists()
    (tmp_path / "text.txt").write_text("Too short.")
    with pytest.raises(CalibrationError, match="the text has 10 tokens, a window takes 512"):
        example("language_model").main("model.onnx", "text.txt")


def test_a_tokenizer_that_cuts_texts_off(tmp_path):
    """As the files of models for sentences say; a text for calibration is longer."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(4)
    made.enable_padding(length=16)
    made.save(str(tmp_path / "tokenizer.json"))
    tokens_of = example("language_model").tokens_of
    assert tokens_of("a b a b a c", str(tmp_path / "tokenizer.json")) == [0, 1, 0, 1, 0, 2]

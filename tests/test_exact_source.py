"""What a quantized model is timed against where its own sums saturate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import mlp
from timed_models import imported

from qcompiler.session_options import sums_saturate
from qcompiler.timing.exact_source import exact_source


def test_an_exact_source_is_the_same_model(tmp_path, monkeypatch):
    monkeypatch.setattr("qcompiler.timing.exact_source.sums_saturate", lambda: True)
    file = tmp_path / "model.onnx"
    ir.save(imported(most=127), file)
    feeds = {"x": np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = ort.InferenceSession(file, options).run(None, feeds)[0]
    with exact_source(file) as copy:
        (weight,) = (v for v in ir.load(copy).graph.initializers.values() if v.shape.rank() == 2)
        got = ort.InferenceSession(copy).run(None, feeds)[0]
    assert weight.dtype is ir.DataType.UINT8 and not copy.exists()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for exact in (mlp(), imported(most=64)):
        ir.save(exact, file)
        with exact_source(file) as copy:
            assert copy is None


def test_sums_saturate_without_vnni():
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    if "avx2" not in flags:
        pytest.skip("no x86 processor that says what it has")
    assert sums_saturate() == (not {"avx512_vnni", "avx_vnni"} & {*flags})


def test_where_sums_are_exact_nothing_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr("qcompiler.timing.exact_source.sums_saturate", lambda: False)
    with exact_source(tmp_path / "not looked at.onnx") as copy:
        assert copy is None

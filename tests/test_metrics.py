"""Metrics of a model and its bundle that a function of one's own computes."""

import json

import numpy as np
import pytest
from spiked_models import data
from terminal import qcompile

from qcompiler.compare import compare


def test_metrics_of_samples_without_names_and_with_labels(spiked):
    source, bundle = spiked
    x = next(iter(data()()))["x"]
    for given in ([x], [{"x": x, "label": np.arange(8)}]):
        found = compare(source, bundle, lambda given=given: given, metric=mean)
        assert np.isfinite(found.metric.model)


def mean(run, samples):
    return np.mean([run(sample)["y"].mean() for _, sample in samples])


def test_metrics(spiked, tmp_path, monkeypatch):
    source, bundle = spiked
    found = compare(source, bundle, tmp_path / "x.npz", metric=mean)
    assert found.metric.name == "mean"
    assert found.metric.model == pytest.approx(found.metric.bundle, abs=0.05)
    assert found.metric.model != found.metric.bundle
    (tmp_path / "merit.py").write_text(
        "def two(run, samples):\n    return 2\n"
        "def pairs(run, samples):\n    return [run(sample) for sample in samples]\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ("compare", source, bundle, "--data", "x.npz", "--metric")
    assert "merit:two: 2 → 2" in qcompile(*arguments, "merit:two").stdout
    (tmp_path / "lost.py").write_text("def none(run, samples):\n    return float('nan')\n")
    told = json.loads(qcompile(*arguments, "lost:none", "--json", "--nodes", "0").stdout)
    assert told["metric"] == {"name": "lost:none", "model": None, "bundle": None}
    for metric, message in [
        ("two", "metric 'two' is not module:function"),
        ("merit:three", "merit has no function 'three'"),
        ("math:sqrt", "metric math:sqrt fails: TypeError"),
        (
            "merit:pairs",
            r"TypeError: run takes the arrays of a sample, not tuple: for name, arrays",
        ),
    ]:
        failed = qcompile(*arguments, metric)
        assert failed.exit_code == 1
        assert message in failed.stderr

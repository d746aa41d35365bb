"""Bundles whose kernels were chosen by time: made again, or quantized less."""

from __future__ import annotations

import json

import golden
import numpy as np
import pytest
from conftest import mlp
from timed_models import conv_net, imported

import qcompiler
from qcompiler.ir.errors import ModelError, OptionError
from qcompiler.ir.sites import Costs
from qcompiler.timing.whole import WholeTime


@pytest.fixture
def timed(monkeypatch):
    """Compilations in this test time what they choose."""
    monkeypatch.setattr("qcompiler.chooser.runs_here", lambda target: target.arch == "x86")


@pytest.fixture
def whole(monkeypatch):
    """The speedups that whole bundles get, one after the other; 2 when the list has ended."""
    speedups = []

    def time_whole(bundle, model, shapes, data):
        assert qcompiler.load(bundle) and model.exists()
        return [WholeTime(1, 3.0, 4.0, speedups.pop(0) if speedups else 2.0)]

    monkeypatch.setattr("qcompiler.chooser.time_whole", time_whole)
    return speedups


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def samples(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    x = np.random.default_rng(1).standard_normal((1, 4, 16, 16), np.float32)
    np.savez(folder / "0.npz", x=x)
    return folder


def said_of_busy_cores(report):
    manifest = json.loads((report.bundle / "manifest.json").read_text())
    said = [warning for warning in report.warnings if "others kept the cores busy" in warning]
    assert said == [warning for warning in report.to_dict()["warnings"] if "busy" in warning]
    assert manifest["choices"]["busy"] is bool(said)
    return said


def test_that_the_machine_was_busy_is_a_warning(tmp_path, timed, whole, samples, monkeypatch):
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qcompiler.timing.measure.are_busy", lambda load: True)
    busy = qcompiler.compile(conv_net(), "x86-int8", tmp_path / "a", calibration=samples)
    (said,) = said_of_busy_cores(busy)
    assert "compile again on a quiet machine (these times are not kept), or with --no-t" in said
    again = qcompiler.compile(conv_net(), "x86-int8", tmp_path / "b", choices=tmp_path / "a",
                              calibration=samples)  # fmt: skip
    assert said_of_busy_cores(again) == [said]
    monkeypatch.setattr("qcompiler.timing.measure.are_busy", lambda load: False)
    quiet = qcompiler.compile(conv_net(), "x86-int8", tmp_path / "c", calibration=samples)
    assert not said_of_busy_cores(quiet)


def test_a_retreat_on_a_busy_machine_is_a_warning(tmp_path, timed, monkeypatch):
    monkeypatch.setattr("qcompiler.timing.exact_source.sums_saturate", lambda: False)
    slow = [WholeTime(1, 3.0, 4.0, 0.75, busy=True)]
    monkeypatch.setattr("qcompiler.chooser.time_whole", lambda *arguments: slow)
    report = qcompiler.compile(imported(), "x86-int8", tmp_path / "a")
    assert report.choices["lost"] and len(said_of_busy_cores(report)) == 1


def test_timed_and_replayed_bundles_are_the_same_bytes(tmp_path, timed, whole, samples):
    report = qcompiler.compile(conv_net(), "x86-int8", tmp_path / "a", calibration=samples)
    sources = {site["costs"]["source"] for site in report.choices["sites"]}
    assert sources == {"timed"}
    assert set(report.choices["model_error"]) >= {"ort", "float"}
    again = qcompiler.compile(conv_net(), "x86-int8", tmp_path / "b", calibration=samples)
    replay = {"calibration": samples, "timing": False}
    qcompiler.compile(conv_net(), "x86-int8", tmp_path / "c", choices=tmp_path / "a", **replay)
    manifest = tmp_path / "a" / "manifest.json"
    qcompiler.compile(conv_net(), "x86-int8", tmp_path / "d", choices=manifest, **replay)
    assert again.choices == report.choices
    assert all(files(tmp_path / name) == files(tmp_path / "a") for name in "bcd")


def test_estimated_bundles_are_the_same_bytes(tmp_path, timed):
    for name in "ab":
        report = qcompiler.compile(mlp(), "x86-int8", tmp_path / name, timing=False)
    assert {site["costs"]["source"] for site in report.choices["sites"]} == {"model"}
    assert report.choices["whole"] == []
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_whole_that_is_slower_is_quantized_less(tmp_path, timed, whole, samples, monkeypatch):
    # By this model nothing loses, so that only the whole can object.
    monkeypatch.setattr(
        "qcompiler.timing.judge.Judge.costs",
        lambda self, sites: [
            Costs("model", ((1, site.inputs[0]),), dict.fromkeys(site.candidates, (1.0,)))
            for site in sites
        ],
    )
    monkeypatch.setattr("qcompiler.chooser.border_cost", lambda elements: 0.0)
    whole.append(0.75)
    convs = qcompiler.compile(conv_net(), "x86-int8", tmp_path / "a", calibration=samples)
    chosen = {site["site"].split()[0]: site["choice"] for site in convs.choices["sites"]}
    assert chosen == {"Conv": "float", "MatMul": "kernel"}
    assert "with int8 convolutions the whole is slower: 4 ms against 3 ms on 1 thread" in {
        decision.why for decision in convs.decisions
    }
    assert "LayerNorm_K8_qs" in " ".join(decision.op for decision in convs.decisions)
    whole.extend([0.75, 0.75])
    nothing = qcompiler.compile(conv_net(), "x86-int8", tmp_path / "b", calibration=samples)
    assert nothing.count("kernel", "qdq", "body") == 0
    assert all(decision.expected for decision in nothing.decisions)
    assert nothing.warnings[0].startswith("nothing was quantized")
    for name in "ab":
        qcompiler.compile(
            conv_net(), "x86-int8", tmp_path / "again", calibration=samples, choices=tmp_path / name
        )
        assert files(tmp_path / "again") == files(tmp_path / name)


def test_a_model_that_is_faster_by_wrong_sums_is_timed_with_exact_ones(
    tmp_path, timed, whole, monkeypatch
):
    monkeypatch.setattr("qcompiler.timing.exact_source.sums_saturate", lambda: True)
    whole.extend([0.75, 1.0])
    report = qcompiler.compile(imported(most=127), "x86-int8", tmp_path / "a")
    assert report.choices["lost"] is None and report.count("kernel") == 1
    assert report.choices["whole"][0]["speedup"] == 1.0
    assert "4 ms against 3 ms on 1 thread, because ONNX Runtime's sums" in report.notes[-1]
    whole.extend([0.75, 0.9])
    report = qcompiler.compile(imported(most=127), "x86-int8", tmp_path / "b")
    assert "the whole is slower: 4 ms against 3 ms on 1 thread" in report.choices["lost"]
    # Weights of 7 bits do not saturate: such a model is faster by right.
    whole.extend([0.75, 1.0])
    report = qcompiler.compile(imported(most=64), "x86-int8", tmp_path / "c")
    assert "the whole is slower: 4 ms against 3 ms on 1 thread" in report.choices["lost"]


def test_strict_accepts_that_nothing_is_gained(tmp_path, timed, whole, monkeypatch):
    """What was quantized already stays so, without kernels; that is no lack of them."""
    monkeypatch.setattr("qcompiler.timing.exact_source.sums_saturate", lambda: False)
    whole.append(0.5)
    report = qcompiler.compile(imported(), "x86-int8", tmp_path / "a", strict=True)
    bodies = [decision for decision in report.decisions if decision.action == "body"]
    assert bodies and all("the whole is slower" in body.why for body in bodies)
    assert report.warnings == ()
    again = qcompiler.compile(
        imported(), "x86-int8", tmp_path / "b", strict=True, choices=tmp_path / "a"
    )
    assert again.decisions == report.decisions


def test_products_that_onnx_runtime_has_are_left_to_it(tmp_path, timed, whole, monkeypatch):
    monkeypatch.setattr("qcompiler.timing.exact_source.sums_saturate", lambda: False)
    whole.append(0.5)
    between = "m = MatMul (d, f) r = QuantizeLinear (m, s, z) y = DequantizeLinear (r, s, z)"
    report = qcompiler.compile(imported(between), "x86-int8", tmp_path / "a", strict=True)
    (product,) = (decision for decision in report.decisions if decision.op == "MatMul")
    assert product.action == "qdq"
    assert "the whole is slower" in product.why and "QLinearMatMul" in product.why
    feeds = {"x": np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)}
    (got,) = qcompiler.load(report.bundle).run(None, feeds)
    assert np.abs(got - golden.run(imported(between), feeds, plainly=True)[0]).max() < 1.5 * 0.02
    qcompiler.compile(imported(between), "x86-int8", tmp_path / "b", choices=tmp_path / "a")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_strict_refuses_what_lacks_a_kernel_although_nothing_is_gained(
    tmp_path, timed, whole, monkeypatch
):
    monkeypatch.setattr("qcompiler.targets.catalog.unsupported", lambda target, region: "none yet")
    whole.append(0.5)
    qcompiler.compile(imported(), "x86-int8", tmp_path / "a")
    message = "--strict: 1 node falls back: .*: none yet; leave it out"
    for options in ({}, {"choices": tmp_path / "a"}):
        whole[:] = [0.5]
        with pytest.raises(OptionError, match=message):
            qcompiler.compile(imported(), "x86-int8", tmp_path / "b", strict=True, **options)


def test_a_model_that_cannot_be_fed_is_not_timed(tmp_path, timed, monkeypatch):
    def time_whole(*arguments):
        raise ModelError("the inputs were made up")

    monkeypatch.setattr("qcompiler.chooser.time_whole", time_whole)
    report = qcompiler.compile(imported(), "x86-int8", tmp_path / "a")
    assert "(the inputs were made up): give --shapes" in report.notes[0]
    with pytest.raises(ModelError):
        qcompiler.compile(imported(), "x86-int8", tmp_path / "b", shapes={"x": (512, 64)})


def test_foreign_targets_are_neither_timed_nor_modelled(tmp_path, timed):
    report = qcompiler.compile(mlp(), "arm-int8", tmp_path / "a")
    assert {site["costs"] for site in report.choices["sites"]} == {None}
    assert report.count("body") > 0

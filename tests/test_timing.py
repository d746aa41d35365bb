"""Timing sites and bundles, and the model of their cost."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnxruntime as ort
import pytest
from golden import model_of, sqnr
from timed_models import conv_net

import qcompiler
from qcompiler.bench import Result, Timing
from qcompiler.ir.errors import ModelError
from qcompiler.ir.sites import Costs, Site
from qcompiler.targets import x86
from qcompiler.targets.cache import KernelCache
from qcompiler.timing.cost_model import border_cost, estimate, model_error
from qcompiler.timing.judge import Judge
from qcompiler.timing.measure import Stopwatch, can_time
from qcompiler.timing.observed_shapes import model_inputs, observed_shapes
from qcompiler.timing.site_models import site_feed, site_model
from qcompiler.timing.whole import time_whole

DENSE = Site("MatMul", (64, 48), ((1, 64), (5, 64)), (), True)
GROUPED = Site(
    "Conv", (8, 2, 3, 1), ((1, 4, 9, 5),),
    (("group", (2,)), ("dilations", (2, 1)), ("pads", (1, 0, 1, 0)), ("strides", (2, 1))),
)  # fmt: skip
LINE = Site(
    "Conv", (6, 3, 5), ((2, 3, 20),),
    (("group", (1,)), ("dilations", (1,)), ("pads", (2, 2)), ("strides", (3,))),
)  # fmt: skip
SILENT = lambda text, share: None  # noqa: E731


def run(site, candidate, shape):
    model = site_model(site, candidate, "qcompiler.00000000")
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, site_feed(site, candidate, shape))[0]


@pytest.mark.parametrize("site", [DENSE, GROUPED, LINE], ids=lambda site: site.name)
@pytest.mark.parametrize("candidate", ["ort", "float"])
def test_the_model_of_a_site_computes_its_op(site, candidate):
    for shape in site.inputs:
        assert run(site, candidate, shape).shape == site.result(shape)


def test_candidates_of_a_matmul_compute_the_same():
    shape = DENSE.inputs[1]
    # Weights are an integer times 0.01 in one, a hundredth in the other.
    assert sqnr(run(DENSE, "float", shape), run(DENSE, "ort", shape)) > 30


@pytest.mark.parametrize(
    "site", [dataclasses.replace(DENSE, kernel=False), LINE], ids=lambda site: site.name
)
def test_a_site_is_timed_once(tmp_path, site, monkeypatch):
    watch = Stopwatch(KernelCache(tmp_path), x86.fingerprint(), (1, 2))
    heard = []
    first, same = watch.time([site, site], lambda text, share: heard.append(text))
    assert first == same
    assert first.source == "timed"
    assert first.points == tuple((count, shape) for count in (1, 2) for shape in site.inputs)
    assert set(first.times) == set(site.candidates)
    assert all(time > 0 for times in first.times.values() for time in times)
    assert heard == [f"time {site.name}"]
    monkeypatch.setattr(Stopwatch, "_measure", None)
    assert watch.time([site], SILENT) == [first]


def test_what_others_spoil_is_not_kept(tmp_path, monkeypatch):
    site, heard = LINE, []
    monkeypatch.setattr("qcompiler.timing.measure.are_busy", lambda load: True)
    watch = Stopwatch(KernelCache(tmp_path), "", (1,))
    (found,) = watch.time([site], lambda text, share: heard.append(text))
    assert found.source == "timed" and found.busy
    assert heard[0] == "others keep the cores busy: what is timed now may be wrong"
    monkeypatch.setattr(Stopwatch, "_measure", None)
    assert watch.time([site], SILENT) == [None]


def test_times_are_kept_per_processor_threads_and_kernels(tmp_path, monkeypatch):
    def key(fingerprint="a", threads=(1,)):
        return Stopwatch(KernelCache(tmp_path), fingerprint, threads)._key(DENSE)

    keys = {key(), key("b"), key(threads=(1, 2))}
    monkeypatch.setattr("qcompiler.timing.measure.processor", lambda: "another")
    assert len(keys | {key()}) == 4


def test_what_ort_cannot_run_alone_is_estimated(tmp_path, monkeypatch):
    watch = Stopwatch(KernelCache(tmp_path), "", (1,))
    misfit = dataclasses.replace(LINE, inputs=((2, 4, 20),))
    assert watch.time([misfit, LINE], SILENT)[0] is None
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    judge = Judge(qcompiler.get_target("x86-int8"), timing=True)
    sources = [costs.source for costs in judge.costs([misfit, LINE])]
    assert sources == ["model", "timed"]


def test_what_cannot_be_timed():
    assert can_time(DENSE)
    assert not can_time(Site("Conv", (8, 8, 3, 3)))
    assert not can_time(Site("MatMul", (1 << 15, 1 << 15), ((1, 1 << 15),)))
    assert not can_time(dataclasses.replace(DENSE, inputs=((1, 64), (1 << 24, 64))))


def test_the_cost_model_knows_what_grows():
    def cost(candidate, site, threads=1):
        return estimate(site, (threads,)).mean(candidate)

    small, wide = (Site("MatMul", (512, n), ((128, 512),), (), True) for n in (512, 1024))
    for candidate in small.candidates:
        assert cost(candidate, small) < cost(candidate, wide)
        assert cost(candidate, wide, 2) < cost(candidate, wide)
    assert cost("kernel", wide) < cost("ort", wide) < cost("float", wide)
    assert border_cost(10) < border_cost(10**6)


def test_a_tiny_matmul_gains_nothing_by_the_cost_model():
    costs = estimate(Site("MatMul", (8, 4), ((1, 8),), (), True), (1,))
    assert costs.mean("float") < costs.mean("kernel")


def test_the_error_of_the_cost_model_is_the_median_over_sites():
    exact = estimate(DENSE, (1, 2))
    assert model_error([(DENSE, exact)]) == pytest.approx(dict.fromkeys(exact.times, 0), abs=0.01)
    doubled = {name: tuple(2 * t for t in times) for name, times in exact.times.items()}
    off = Costs("timed", exact.points, doubled)
    assert model_error([(DENSE, off)]) == pytest.approx(dict.fromkeys(exact.times, 0.5), abs=0.01)


def test_shapes_are_seen_by_running_the_model():
    model = conv_net()
    before = [value.name for value in model.graph.outputs]
    names = [node.outputs[0].name for node in model.graph]
    feed = {"x": np.ones((2, 4, 16, 16), np.float32)}
    found = observed_shapes(model, ["x", *names], feed)
    assert [found[name] for name in ("x", names[0], names[4])] == [
        (2, 4, 16, 16), (2, 4, 16, 16), (2, 16, 16, 8),
    ]  # fmt: skip
    assert [value.name for value in model.graph.outputs] == before
    with pytest.raises(ModelError, match="fails on inputs of these shapes"):
        observed_shapes(model, names, {"x": np.ones((2, 3, 16, 16), np.float32)})
    assert [(i.name, i.shape, i.type) for i in model_inputs(model)] == [
        ("x", ["n", 4, 16, 16], "tensor(float)")
    ]


def test_a_dimension_of_minus_one_is_open():
    (given,) = model_inputs(model_of("g (float[-1,4] x) => (float[-1,4] y) { y = Relu (x) }"))
    assert given.shape == [None, 4]


def test_a_whole_that_is_slower_is_timed_again(tmp_path, monkeypatch):
    speeds = [0.9, 1.02, 0.5]

    def bench(bundle, model, *, threads, **options):
        speed = speeds.pop(0)
        sides = Timing(speed, speed), Timing(1.0, 1.0)
        result = Result(threads[0], 5, *sides, speed, speed, (speed, speed))
        return type("Bench", (), {"results": (result,)})

    monkeypatch.setattr("qcompiler.timing.whole.bench", bench)
    monkeypatch.setattr("qcompiler.timing.whole.thread_counts", lambda: (1, 2, 3))
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "model.onnx").write_bytes(b"m")
    found = time_whole(bundle, bundle / "model.onnx", None, None)
    # Twice with one thread; with two it is so slow that once is enough, and three do not matter.
    assert [(time.threads, time.speedup) for time in found] == [(1, 1.02), (2, 0.5)]
    assert speeds == []
    assert time_whole(bundle, bundle / "model.onnx", None, None) == found
    monkeypatch.setattr("qcompiler.timing.whole.are_busy", lambda load: True)
    speeds[:] = [0.5, 0.6]
    for speed in (0.5, 0.6):
        (spoiled,) = time_whole(bundle, bundle / "model.onnx", {"x": (1,)}, None)
        assert (spoiled.busy, spoiled.speedup) == (True, speed)  # and not kept

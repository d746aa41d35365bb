"""Timing sites and bundles, the model of their cost, and choices that are made again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import golden
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import mlp
from golden import model_of, sqnr

import qcompiler
from qcompiler.bench import Result, Timing
from qcompiler.ir.decisions import Decision
from qcompiler.ir.errors import ModelError, OptionError
from qcompiler.ir.sites import Costs, Site
from qcompiler.report import Report
from qcompiler.targets import x86
from qcompiler.targets.cache import KernelCache
from qcompiler.timing.cost_model import border_cost, estimate, model_error
from qcompiler.timing.exact_source import exact_source, sums_saturate
from qcompiler.timing.judge import Judge
from qcompiler.timing.measure import Stopwatch, can_time
from qcompiler.timing.observed_shapes import model_inputs, observed_shapes
from qcompiler.timing.record import Record
from qcompiler.timing.site_models import site_feed, site_model
from qcompiler.timing.whole import WholeTime, time_whole

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


def conv_net():
    rng = np.random.default_rng(0)
    return model_of(
        "g (float[n,4,16,16] x) => (float[n,16,16,3] y) "
        "{ a = Conv <pads = [1,1,1,1]> (x, u) b = Relu (a) c = Conv <pads = [1,1,1,1]> (b, v) "
        "d = Sigmoid (c) t = Transpose <perm = [0,2,3,1]> (d) e = LayerNormalization (t, s, s) "
        "y = MatMul (e, w) }",
        {
            "u": rng.standard_normal((4, 4, 3, 3), np.float32),
            "v": rng.standard_normal((8, 4, 3, 3), np.float32),
            "s": np.ones(8, np.float32),
            "w": rng.standard_normal((8, 3), np.float32),
        },
    )


@pytest.fixture
def samples(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    x = np.random.default_rng(1).standard_normal((1, 4, 16, 16), np.float32)
    np.savez(folder / "0.npz", x=x)
    return folder


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


def imported(result="y = MatMul (d, f)", most=60):
    weight = np.random.default_rng(2).integers(-most, most, (64, 48)).astype(np.int8)
    return model_of(
        "g (float[n,64] x) => (float[n,48] y) { q = QuantizeLinear (x, s, z) "
        "d = DequantizeLinear (q, s, z) f = DequantizeLinear (w, s) " + result + " }",
        {"s": np.float32(0.02), "z": np.uint8(128), "w": weight},
    )


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


def test_choices_made_on_different_times_are_told_together():
    whys = [f"float is faster here: {time} us against ORT's int8 99 us (…)" for time in (4.1, 50)]
    nodes = tuple(Decision(str(index), "Conv", "float", why) for index, why in enumerate(whys))
    (group,) = Report(Path("b"), "x86-int8", nodes, 0).groups()
    assert (group.why, group.count) == ("float is faster here", 2)


@pytest.fixture(scope="module")
def estimated(tmp_path_factory):
    """A bundle with choices."""
    return qcompiler.compile(
        mlp(), "x86-int8", tmp_path_factory.mktemp("estimated") / "b", timing=False
    ).bundle


def test_a_record_reads_back(estimated):
    record = Record.read(estimated, "x86-int8")
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert [site.site for site in record.sites] == ["MatMul 64x48", "MatMul 48x64"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "no choices: .* does not exist; give a bundle"),
        ("no JSON", "holds no choices that can be read"),
        ({"target": "arm-int8"}, "are for arm-int8, not for x86-int8"),
        ({"choices": None}, "holds no choices: its bundle was made with passes of its own"),
        ({"choices": {"sites": [{}]}}, r"holds no choices that can be read \(KeyError\('choice'\)"),
        ({"choices": {"sites": [{"choice": "gpu"}]}}, "unknown choice 'gpu'"),
        ({"choices": {"sites": [], "whole": [], "lost": 3}}, "lost is 3, not a text"),
    ],
)
def test_choices_that_cannot_be_made_again(tmp_path, estimated, change, message):
    copy = tmp_path / "bundle"
    if change is not None:
        shutil.copytree(estimated, copy)
        manifest = copy / "manifest.json"
        content = json.loads(manifest.read_text())
        text = change if isinstance(change, str) else json.dumps(content | change)
        manifest.write_text(text)
    with pytest.raises(OptionError, match=message):
        qcompiler.compile(mlp(), "x86-int8", tmp_path / "b", choices=copy)
    assert not (tmp_path / "b").exists()


def test_choices_of_another_model(tmp_path, estimated):
    with pytest.raises(OptionError, match="another model .*: for node .* they hold MatMul 64x48"):
        qcompiler.compile(mlp(width=32), "x86-int8", tmp_path / "b", choices=estimated)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1,)}, "no input 'z'; the inputs are x"),
        ({"x": (1, 65)}, r"x=1x65 does not fit, the model takes \['m', 64\]"),
        ({"x": (0, 64)}, r"shapes: x=\(0, 64\): sizes are whole numbers from 1"),
        ({"x": (1.5, 64)}, r"shapes: x=\(1.5, 64\): sizes are whole numbers from 1"),
        ({"x": 64}, "shapes: x=64: sizes are whole numbers from 1"),
    ],
)
@pytest.mark.parametrize("timing", [True, False])
def test_shapes_that_do_not_fit(tmp_path, shapes, message, timing):
    with pytest.raises(OptionError, match=message):
        qcompiler.compile(mlp(), "x86-int8", tmp_path / "b", shapes=shapes, timing=timing)


def test_shapes_decide_what_is_weighed(tmp_path):
    report = qcompiler.compile(
        mlp(), "x86-int8", tmp_path / "b", shapes={"x": (33, 64)}, timing=False
    )
    points = [site["costs"]["points"] for site in report.choices["sites"]]
    assert {row for site in points for _, (row, _) in site} == {33}


def test_shapes_and_choices_exclude_each_other(tmp_path, estimated):
    with pytest.raises(OptionError, match="shapes or choices, not both"):
        qcompiler.compile(
            mlp(), "x86-int8", tmp_path / "b", shapes={"x": (1, 64)}, choices=estimated
        )


def test_passes_of_ones_own_choose_nothing(tmp_path):
    passes = qcompiler.Pipeline.default(qcompiler.get_target("x86-int8"))
    report = qcompiler.compile(mlp(), "x86-int8", tmp_path / "b", pipeline=passes)
    assert report.choices is None
    for options in ({"shapes": {"x": (1, 64)}}, {"choices": tmp_path / "b"}):
        with pytest.raises(OptionError, match="a pipeline of your own chooses nothing: leave out"):
            qcompiler.compile(mlp(), "x86-int8", tmp_path / "c", pipeline=passes, **options)

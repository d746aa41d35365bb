"""Calibration: what is observed, what is remembered, and that memory does not grow with samples."""

import numpy as np
import onnx_ir as ir
import pytest
from calibrated import facts, planned
from golden import model_of

import qcompiler
from qcompiler.bundle import Manifest
from qcompiler.calibrate import observe, run_exactly
from qcompiler.clipping import Clipping
from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.passes.bias_correction import BiasCorrection
from qcompiler.passes.equalize_layers import EqualizeLayers
from qcompiler.passes.keep_sensitive import KeepSensitive
from qcompiler.probe import Probe
from qcompiler.samples import Samples

RNG = np.random.default_rng(0)
MODEL = model_of("g (float[n,4] x) => (float[n,4] y) { e = Exp (x) y = Neg (e) }", {})


def batches(count=4, bad=None):
    for index in range(count):
        x = np.full((2, 4), index, np.float32)
        yield x if index != bad else x + 200


def ends(stats):
    return {name: (stat.minimum, stat.maximum) for name, stat in stats.items()}


def test_ranges_of_inputs_and_tensors_inside(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    seen, samples = [], Samples(batches)
    stats = observe(MODEL, ["x", "e"], samples, lambda *step: seen.append(step))
    assert ends(stats)["x"] == (0, 3)
    np.testing.assert_allclose(ends(stats)["e"], (0, np.exp(3)), rtol=1e-6)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [output.name for output in MODEL.graph.outputs] == ["y"]


def test_ranges_are_found_again_for_the_same_model_and_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    first = observe(MODEL, ["x", "e"], Samples(batches), clipping=Clipping("mse"))
    runs, run = [], Probe.run
    monkeypatch.setattr(Probe, "run", lambda self, *a, **k: runs.append(1) or run(self, *a, **k))
    assert observe(MODEL, ["x", "e"], Samples(batches), clipping=Clipping("mse")) == first
    assert not runs
    other = model_of("g (float[n,4] x) => (float[n,4] y) { e = Exp (x) y = Abs (e) }", {})
    for model, names, samples, method in [
        (MODEL, ["x", "e"], batches, "min-max"),
        (MODEL, ["e"], batches, "mse"),
        (MODEL, ["x", "e"], lambda: batches(5), "mse"),
        (other, ["x", "y"], batches, "mse"),
    ]:
        observe(model, names, Samples(samples), clipping=Clipping(method))
    assert len(runs) == 4


def test_the_recipe_says_where_ranges_are_cut(tmp_path):
    text = "g (float[n,2,8,8] x) => (float[n,4,6,6] y) { c = Conv (x, w) r = Relu (c) y = Neg (r) }"
    model = model_of(text, {"w": RNG.standard_normal((4, 2, 3, 3), dtype=np.float32)})
    image = RNG.standard_normal((1, 2, 8, 8), dtype=np.float32)
    image[0, 0, 0, 0] = 50
    scales = {}
    for method in ("min-max", "percentile=99"):
        recipe = qcompiler.Recipe(calibration=method)
        bundle = tmp_path / method
        # Without keep-sensitive, which would not have so narrow a range.
        qcompiler.compile(
            *(model, "arm-int8", bundle),
            recipe=recipe,
            calibration=lambda: [image],
            pipeline="assign-precision,insert-qdq,round-to-nearest,fold-qdq",
        )
        graph = ir.load(bundle / "model.onnx").graph
        scales[method] = float(graph.initializers["x_scale"].const_value.numpy())
        assert Manifest.read(bundle).recipe["calibration"] == method
    assert scales["percentile=99"] < scales["min-max"] / 5


def test_a_tensor_that_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    with pytest.raises(CalibrationError, match=r"sample 3 of .*: tensor 'e' becomes NaN or Inf"):
        observe(MODEL, ["e"], Samples(lambda: batches(4, bad=2)))
    assert not list(tmp_path.rglob("*"))


def test_a_model_of_an_old_opset_is_to_be_canonicalized_first():
    old = MODEL.clone()
    old.graph.opset_imports[""] = 17
    for look in (lambda: observe(old, ["e"], Samples(batches)), lambda: run_exactly(old, ["e"],
                 Samples(batches))):  # fmt: skip
        with pytest.raises(OptionError, match="this one has 17: begin with canonicalize"):
            look()


def test_samples_without_rows_are_passed_over_where_means_are_taken(tmp_path):
    text = "g (float[n,4] x) => (float[n,1] y) { y = ReduceMean <keepdims = 1> (x, axes) }"
    model = model_of(text, {"axes": np.array([1])})
    full, empty = np.ones((1, 4), np.float32), np.ones((0, 4), np.float32)
    rows = run_exactly(model, ["y"], Samples(lambda: [empty, full, empty]))
    np.testing.assert_array_equal(rows["y"], [[1]])
    with pytest.raises(CalibrationError, match="the samples are empty: those of .* that were run"):
        run_exactly(model, ["y"], Samples(lambda: [empty, empty]))


def test_a_sample_without_rows_of_one_input_says_nothing_of_that():
    text = (
        "g (float[n,4] x, float[m,2] z) => (float[n,1] y, float[m,1] w) "
        "{ y = ReduceMean <keepdims = 1> (x, axes) w = ReduceMean <keepdims = 1> (z, axes) }"
    )
    model = model_of(text, {"axes": np.array([1])})
    full = {"x": np.ones((1, 4), np.float32), "z": np.full((1, 2), 2, np.float32)}
    without = full | {"x": np.ones((0, 4), np.float32)}
    rows = run_exactly(model, ["y", "w"], Samples(lambda: [without, full]))
    assert (rows["y"].tolist(), rows["w"].tolist()) == ([[1]], [[2], [2]])
    rows = run_exactly(model, ["y", "w"], Samples(lambda: [without]))
    assert (rows["y"].shape, rows["w"].tolist()) == ((0, 1), [[2]])


@pytest.mark.parametrize("make", [EqualizeLayers, BiasCorrection, KeepSensitive])
def test_a_pass_whose_layers_see_only_empty_samples(make):
    text = (
        "g (float[n,2,8,8] x, float[m] z) => (float[n,4,4,4] y, float[m] u) "
        "{ c = Conv (x, w) r = Relu (c) d = Conv (r, v) y = Neg (d) u = Neg (z) }"
    )
    weights = {
        "w": RNG.standard_normal((4, 2, 3, 3), dtype=np.float32),
        "v": RNG.standard_normal((4, 4, 3, 3), dtype=np.float32),
    }
    feed = {"x": np.zeros((0, 2, 8, 8), np.float32), "z": np.ones(3, np.float32)}
    with pytest.raises(CalibrationError, match="the samples are empty"):
        make(*facts([feed]))(planned(text, weights))


def test_a_compilation_with_nothing_but_empty_samples(tmp_path):
    text = "g (float[n,2,8,8] x) => (float[n,4,6,6] y) { c = Conv (x, w) y = Neg (c) }"
    model = model_of(text, {"w": RNG.standard_normal((4, 2, 3, 3), dtype=np.float32)})
    empty = np.zeros((0, 2, 8, 8), np.float32)
    with pytest.raises(CalibrationError, match="the samples are empty"):
        qcompiler.compile(model, "arm-int8", tmp_path / "out", calibration=lambda: [empty])


def test_a_model_that_takes_texts_beside_floats(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    text = (
        "g (string[n] t, float[n] x) => (string[n] u, float[n] y) { u = Identity (t) y = Neg (x) }"
    )
    sample = {"t": np.array(["a", "b"]), "x": np.float32([1, 2])}
    assert ends(observe(model_of(text, {}), ["y"], Samples(lambda: [sample])))["y"] == (-2, 0)

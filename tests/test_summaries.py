"""Summaries: inside the graph they say of a tensor what calibration would see of it outside."""

import numpy as np
import pytest
from golden import model_of

from qcompiler.calibrate import observe
from qcompiler.clipping import METHODS, Clipping, Observed
from qcompiler.ir.errors import CalibrationError
from qcompiler.probe import Probe
from qcompiler.samples import Samples
from qcompiler.summaries import summarized

RNG = np.random.default_rng(0)
SHAPES = {
    "float[n,c,h,w]": (2, 3, 5, 7),
    "float[1,4,14,14]": (1, 4, 14, 14),
    "float[1,2,3,5]": (1, 2, 3, 5),
    "float[n,t,c]": (2, 9, 4),
    "float[n,k]": (3, 8),
    "float[k]": (6,),
    "float": (),
}


@pytest.fixture(autouse=True)
def no_ranges_are_known(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))


def negated(kind):
    return model_of(f"g ({kind} x) => ({kind} y) {{ m = Neg (x) y = Neg (m) }}", {})


def observed(kind, samples, method="mse", names=("x", "m", "y")):
    found = observe(negated(kind), names, Samples(lambda: samples), clipping=Clipping(method))
    return {name: (stats.minimum, stats.maximum) for name, stats in found.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SHAPES)
def test_the_same_range_as_of_the_whole_tensor(kind, method):
    samples = [RNG.standard_normal(SHAPES[kind]).astype(np.float32) for _ in range(3)]
    for name, sign in (("x", 1), ("m", -1)):
        whole = Observed(Clipping(method))
        for sample in samples:
            values = sign * sample
            whole.add(values, (float(values.min()), float(values.max())))
        assert observed(kind, samples, method)[name] == whole.range()


def test_ends_are_of_all_values_however_few_are_counted():
    image = np.zeros((1, 4, 300, 300), np.float32)
    image[0, 1, 17, 33], image[0, 3, 299, 298] = -5, 7
    assert observed("float[1,4,300,300]", [image] * 200, "min-max")["x"] == (-5, 7)


def counted(model, found, samples):
    """The values of x that are counted in each sample."""
    with Probe(model, [found["x"].some]) as probe:
        runs = probe.run(lambda inputs: [("one", {"x": sample}) for sample in samples])
        return [found["x"].values(tensors) for _, tensors in runs]


def test_values_that_count_come_from_all_columns():
    # 28 x 28 pixels and 512 channels by steps of 196 would be 4 pixels.
    model, found = summarized(negated("float[1,512,28,28]"), ["x"], ["x"], 128)
    columns = np.broadcast_to(np.arange(28, dtype=np.float32), (1, 512, 28, 28))
    (values,) = counted(model, found, [columns.copy()])
    seen = np.bincount(values.astype(int), minlength=28)
    assert seen.sum() == 4 * 2039
    assert seen.min() > 0.9 * seen.max()


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize(("kind", "row"), [("float[k]", 1), ("float[k,2]", 2), ("float[k,8]", 4)])
def test_every_place_counts_in_some_of_the_samples_and_the_same_in_every_calibration(
    kind, row, opset
):
    width = {"float[k]": 1, "float[k,2]": 2, "float[k,8]": 8}[kind]
    ids = np.arange(20390 * row // width * width, dtype=np.float32)
    shape = (-1, width) if width > 1 else -1
    graph = negated(kind)
    graph.opset_imports[""] = opset
    model, found = summarized(graph, ["x"], ["x"], 128)
    samples = [(ids + shift).reshape(shape) for shift in range(100)]
    once = counted(model, found, samples)
    places = [values - shift for shift, values in enumerate(once)]
    assert all(len(run) == len(np.unique(run)) == 2039 * row for run in places)
    assert len(np.unique(places)) == len(ids)
    np.testing.assert_array_equal(once[::-1], counted(model, found, samples[::-1]))


@pytest.mark.parametrize("body", [
    "r = Relu (x) m = MaxPool <kernel_shape = [2, 2]> (r)",
    "r = Relu (x) a = Abs (x) m = Concat <axis = 1> (r, a)",
    "m = Sigmoid (x)",
])  # fmt: skip
def test_what_is_never_below_zero_is_not_searched_for_its_least_value(body):
    model = model_of(f"g (float[1,4,8,8] x) => (float[1,c,h,w] m) {{ {body} }}", {})
    _, found = summarized(model, ["x", "m"], [], 1)
    assert found["m"].low is None
    assert found["x"].low is not None
    sample = RNG.standard_normal((1, 4, 8, 8)).astype(np.float32)
    stats = observe(model, ["m"], Samples(lambda: [sample]))["m"]
    with Probe(model, ["m"]) as probe:
        ((_, tensors),) = probe.run(lambda inputs: [("one", {"x": sample})])
    assert (stats.minimum, stats.maximum) == (0, tensors["m"].max())


@pytest.mark.parametrize("body", [
    "r = Relu (x) m = Concat <axis = 1> (r, x)",
    "r = Relu (x) m = Neg (r)",
    "m = MaxPool <kernel_shape = [2, 2]> (x)",
])  # fmt: skip
def test_what_may_be_below_zero_is(body):
    model = model_of(f"g (float[1,4,8,8] x) => (float[1,c,h,w] m) {{ {body} }}", {})
    _, found = summarized(model, ["m"], [], 1)
    assert found["m"].low is not None


def test_a_sample_whose_sum_is_infinite_counts_too():
    large = np.full((3, 8), 3e38, np.float32)
    assert observed("float[n,k]", [large], names=("m",))["m"][0] < 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 2599, 2600])
def test_one_value_that_is_not_finite(value, place):
    text = "g (float[n,c,h,w] x) => (float[n,c,h,w] y) { m = Mul (x, f) y = Neg (m) }"
    factors = np.ones(2601, np.float32)
    factors[place] = value
    model = model_of(text, {"f": factors.reshape(1, 1, 51, 51)})
    with pytest.raises(CalibrationError, match="sample 1 of .*tensor 'm' becomes NaN or Inf"):
        observe(model, ["m"], Samples(lambda: [np.ones((1, 2, 51, 51), np.float32)]))


@pytest.mark.parametrize("place", [0, 37, 80])
@pytest.mark.parametrize(("attributes", "summed"), [
    ("", ["d"]),
    ("<pads = [1, 1, 1, 1]>", ["d"]),
    ("<strides = [2, 2]>", ["m", "d"]),
    ("<dilations = [2, 2]>", ["m", "d"]),
])  # fmt: skip
def test_nan_is_noticed_where_it_goes_and_told_where_it_comes_from(attributes, summed, place):
    text = (
        "g (float[1,8,9,9] x) => (float[1,8,h,w] y) { m = Mul (x, f) "
        f"c = Conv {attributes} (m, k) r = Relu (c) a = Add (r, r) d = Conv (a, k) y = Neg (d) }}"
    )
    factors = np.ones(81, np.float32)
    factors[place] = np.nan
    kernel = RNG.standard_normal((8, 8, 2, 2), dtype=np.float32)
    weights = {"f": factors.reshape(1, 1, 9, 9), "k": kernel}
    model, names = model_of(text, weights), ["x", "m", "r", "d"]
    _, found = summarized(model, names, [], 1)
    assert [name for name in names if found[name].total is not None] == summed
    good, bad = np.zeros((1, 8, 9, 9), np.float32), np.ones((1, 8, 9, 9), np.float32)
    for samples in ([bad], [good, bad]):  # 0 times NaN is NaN, too
        with pytest.raises(CalibrationError, match="sample 1 of .*tensor 'm' becomes NaN or Inf"):
            observe(model, names, Samples(lambda s=samples: s))


def test_a_sum_may_overflow():
    large = np.full((1, 2, 4, 4), 3e38, np.float32)
    assert observed("float[n,c,h,w]", [large], "min-max")["x"] == (0, np.float32(3e38))


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (1, 3, 0, 7), (1, 0, 5, 7)])
def test_an_empty_sample_tells_nothing(shape):
    full, empty = np.ones((1, 3, 5, 7), np.float32), np.zeros(shape, np.float32)
    for method in ("mse", "min-max"):
        assert observed("float[n,c,h,w]", [empty, full], method)["m"] == (-1, 0)
    with pytest.raises(CalibrationError, match="the samples are empty: tensor 'x'"):
        observed("float[n,c,h,w]", [empty])

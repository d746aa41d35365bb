"""Tensors inside a model: samples run side by side, and come in their order."""

import threading

import numpy as np
import pytest
from golden import model_of

from qcompiler import probe
from qcompiler.calibrate import observe
from qcompiler.clipping import Clipping
from qcompiler.ir.errors import CalibrationError
from qcompiler.probe import Probe
from qcompiler.samples import Samples

MODEL = model_of("g (float[n,64] x) => (float[n,64] y) { e = Exp (x) y = Neg (e) }", {})
RNG = np.random.default_rng(0)
ROWS = [RNG.standard_normal((1, 64), np.float32) for _ in range(7)]


@pytest.fixture(autouse=True)
def cores(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "available_cores", lambda: 2)


def labelled(rows=ROWS):
    return [(f"sample {number}", {"x": row}) for number, row in enumerate(rows, 1)]


@pytest.fixture
def widest(monkeypatch):
    """Has the most samples that were computing at one time, each for as long as others come."""
    most, running, lock, compute = [0], [], threading.Lock(), Probe._compute
    met = threading.Event()

    def watched(self, session, label, feeds):
        with lock:
            running.append(label)
            most[0] = max(most[0], len(running))
            if len(running) == 2:
                met.set()
        met.wait(0.2)
        try:
            return compute(self, session, label, feeds)
        finally:
            with lock:
                running.remove(label)

    monkeypatch.setattr(Probe, "_compute", watched)
    return most


def test_two_at_a_time_come_in_their_order(widest):
    with Probe(MODEL, ["x", "e"]) as one:
        found = list(one.run(lambda inputs: labelled(), at_once=2))
    assert [label for label, _ in found] == [label for label, _ in labelled()]
    for row, (_, tensors) in zip(ROWS, found, strict=True):
        np.testing.assert_array_equal(tensors["x"], row)
        np.testing.assert_allclose(tensors["e"], np.exp(row), rtol=1e-5)
    assert widest == [2]


def test_one_at_a_time_on_one_core(widest, monkeypatch):
    monkeypatch.setattr(probe, "available_cores", lambda: 1)
    with Probe(MODEL, ["e"]) as one:
        assert len(list(one.run(lambda inputs: labelled(ROWS[:3]), at_once=2))) == 3
    assert widest == [1]


def test_no_more_than_one_sample_is_read_ahead():
    drawn = []

    def draw(inputs):
        for sample in labelled():
            drawn.append(sample)
            yield sample

    with Probe(MODEL, ["e"]) as one:
        ahead = [len(drawn) - done for done, _ in enumerate(one.run(draw, at_once=2))]
    assert max(ahead) <= 4  # the one that is looked at, two that run, and the next


def test_a_caller_that_stops_early():
    with Probe(MODEL, ["e"]) as one:
        runs = one.run(lambda inputs: labelled(), at_once=2)
        assert next(runs)[0] == "sample 1"
        runs.close()
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


@pytest.mark.parametrize(("bad", "why"), [(0, "sample 1"), (4, "sample 5"), (6, "sample 7")])
def test_what_fails_is_named(bad, why):
    rows = list(ROWS)
    rows[bad] = np.full((1, 64), np.nan, np.float32)
    with (
        Probe(MODEL, ["e"]) as one,
        pytest.raises(CalibrationError, match=f"{why}: input 'x' holds"),
    ):
        list(one.run(lambda inputs: labelled(rows), at_once=2))


@pytest.mark.parametrize("method", ["mse", "moving-average", "entropy", "percentile", "sigma"])
def test_ranges_are_those_of_one_at_a_time(method, monkeypatch, tmp_path, widest):
    both = []
    for cores in (1, 2):
        monkeypatch.setattr(probe, "available_cores", lambda cores=cores: cores)
        monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / str(cores)))
        samples = Samples(lambda: ROWS)
        both.append(observe(MODEL, ["x", "e"], samples, clipping=Clipping.parse(method)))
    assert both[0] == both[1]
    assert widest == [2]


LONG = model_of("g (float[1,n] x) => (float[1,n] y) { e = Exp (x) y = Neg (e) }", {})


@pytest.mark.parametrize(
    ("model", "sample", "at_once"),
    [
        (MODEL, np.ones((1, 64), np.float32), 2),
        (MODEL, np.ones((2, 64), np.float32), 1),
        (LONG, np.ones((1, 1 << 18), np.float32), 2),
        (LONG, np.ones((1, (1 << 18) + 1), np.float32), 1),
    ],
)
def test_batches_and_large_samples_are_run_one_by_one(widest, model, sample, at_once):
    observe(model, ["e"], Samples(lambda: [sample] * 4))
    assert widest == [at_once]


def test_one_that_is_not_finite_is_named():
    rows = list(ROWS)
    rows[3] = rows[3] + 200
    with pytest.raises(CalibrationError, match=r"sample 4 of .*: tensor 'e' becomes NaN or Inf"):
        observe(MODEL, ["e"], Samples(lambda: rows))


def test_inputs_that_disagree_about_a_size_are_named():
    model = model_of("g (float[n,4] a, float[n,4] b) => (float[n,4] y) { y = Add (a, b) }", {})
    sample = {"a": np.zeros((2, 4), np.float32), "b": np.zeros((3, 4), np.float32)}
    message = "'n' is 2 in input 'a' and 3 in input 'b': give both the same size"
    with Probe(model, ["y"]) as probing, pytest.raises(CalibrationError, match=message):
        list(probing.run(lambda inputs: [("sample 1", sample)]))

"""What goes on around layers that are rounded: executors, progress, and what is kept of them."""

import concurrent.futures
import os

import numpy as np
import pytest
from correlated_rows import K, rows
from layer_chain import CHAIN, RUNS, WALK, WEIGHTS, constants, planned

from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.passes.gptq import GPTQ
from qcompiler.passes.second_moments import LayerRuns
from qcompiler.samples import Samples
from qcompiler.walk import walker

pytestmark = pytest.mark.usefixtures("own_cache")


def test_layers_side_by_side_are_the_same():
    first, second, told = planned(), planned(), []
    GPTQ(RUNS)(first)
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        os.environ["QCOMPILER_CACHE"] += "2"
        runs = LayerRuns(WALK, executor, lambda text, share, left: told.append((text, share)))
        GPTQ(runs)(second)
    for name, array in constants(first).items():
        np.testing.assert_array_equal(array.astype(np.float32),
                                      constants(second)[name].astype(np.float32))  # fmt: skip
    assert [share for _, share in told] == [0, 0.25, 0.5, 0.75, 1]
    assert told[1][0].startswith("node_0: rounded by gptq to ")


def test_it_is_said_what_was_kept_from_an_earlier_run():
    def told(model):
        lines = []
        GPTQ(LayerRuns(WALK, tell=lambda text, *_: lines.append(text)))(model)
        kept = ["kept from an earlier run: rounded by gptq" in line for line in lines[1:]]
        return lines[0].partition(" are there from an earlier run on this model")[0], kept

    none, all_of_them = ("layers: none of 4", [False] * 4), ("layers: 4 of 4", [True] * 4)
    assert told(planned()) == none and told(planned()) == all_of_them
    assert told(planned(weights=WEIGHTS | {"d": WEIGHTS["a"]})) == none


def test_it_is_said_that_layers_cannot_be_kept(tmp_path, monkeypatch):
    lines = []
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "file" / "cache"))
    GPTQ(LayerRuns(WALK, tell=lambda text, *_: lines.append(text)))(planned())
    assert all("not kept for another run: cannot write the kernel cache" in t for t in lines[1:])


def test_what_was_kept_says_nothing_of_how_long_the_rest_takes(monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr("qcompiler.passes.second_moments.time.perf_counter", lambda: now[0])
    tell = LayerRuns(tell=lambda text, share, left: told.append(left)).progress(8)
    tell("layers", 0)
    tell("a", 4, kept=True)
    now[0] = 6.0
    tell("b", 5)
    assert told == [0, 0, 18]  # an eighth took 6 s, and three more are left


class Cluster(concurrent.futures.Executor):
    def map(self, function, *arguments, **options):
        raise KeyError("no such worker")


def test_an_executor_that_fails_is_named():
    closed = concurrent.futures.ThreadPoolExecutor(1)
    closed.shutdown()
    for executor, why in (closed, "RuntimeError: .*shutdown"), (Cluster(), "KeyError: 'no such"):
        with pytest.raises(OptionError, match=f"the executor fails: {why}.* not shut down"):
            GPTQ(LayerRuns(WALK, executor))(planned())
    weight = np.full((K, K), 3e30, np.float32)
    with (
        concurrent.futures.ThreadPoolExecutor(1) as working,
        pytest.raises(CalibrationError, match="weight too"),
    ):
        LayerRuns(executor=working).map(_refuse, [weight])


def _refuse(weight):
    raise CalibrationError(f"a weight too large: {weight.max():g}")


def test_a_disk_that_is_full_is_named(monkeypatch):
    def full(*arrays, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qcompiler.walk.np.savez", full)
    with pytest.raises(OptionError, match=r"cannot write .*npz: No space left .*TMPDIR says where"):
        GPTQ(RUNS)(planned())


def test_another_model_or_samples_find_nothing_in_the_cache():
    def asked(model, walk):
        counts = []

        def counting(model, stops):
            found = walk(model, stops)
            read = found.rows
            found.rows = lambda value: counts.append(value.name) or read(value)
            return found

        GPTQ(LayerRuns(counting))(model)
        return counts

    assert asked(planned(), WALK) == ["x", "t", "v"]
    assert asked(planned(), WALK) == []
    assert asked(planned(group_size=32), WALK) == ["x", "t", "v"]
    assert asked(planned(weights=WEIGHTS | {"d": WEIGHTS["a"]}), WALK) == ["x", "t", "v"]
    assert asked(planned(CHAIN.replace("Tanh", "Sigmoid")), WALK) == ["x", "t", "v"]
    assert asked(planned(), walker(Samples(lambda: [{"x": rows(0)}]))) == ["x", "t", "v"]

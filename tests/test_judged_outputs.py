"""keep-sensitive: how much of the outputs is left decides how much stays float."""

import re

import numpy as np
import pytest
from calibrated import facts, output_sqnr, planned
from sensitive_models import CHAIN, CHAIN_WEIGHTS, FEEDS, OBSERVE, RUN, kept

from qcompiler.ir.decisions import decision_of, plan_of
from qcompiler.passes.keep_sensitive import KeepSensitive
from qcompiler.passes.worst_output import WorstOutput


def test_the_outputs_decide_how_many_stay_float():
    model = planned(CHAIN, CHAIN_WEIGHTS)
    every = output_sqnr(model, FEEDS[0], OBSERVE)
    counts = []
    for bound in (every - 3, every + 1, every + 4, 200):
        changed, reasons = kept(CHAIN, CHAIN_WEIGHTS, outputs=bound)
        counts.append(len(reasons))
        for reason in reasons.values():
            assert re.fullmatch(
                r"kept float: quantized alone it leaves the worst output \d+\.\d dB, and all "
                rf"together \d+\.\d dB, below {bound:g}",
                reason,
            )
        if counts[-1] < 3:
            assert output_sqnr(changed, FEEDS[0], OBSERVE) > bound - 1
    assert counts[0] == 0 and counts[-1] == 3 and counts == sorted(counts) and counts[1] in (1, 2)


def test_runs_bound_the_search():
    asked = []

    def counted(model, names):
        asked.append(len(names))
        return RUN(model, names)

    model = planned(CHAIN, CHAIN_WEIGHTS)
    KeepSensitive(counted, OBSERVE, KeepSensitive.Options(outputs=200, runs=2))(model)
    assert asked == [9, 3]  # each node once, then the output; two halves would be too much
    why = decision_of(model.graph[0]).why
    assert why.startswith("kept float: quantized alone with 2 more it leaves the worst output ")
    asked.clear()
    heard = []
    options, told = KeepSensitive.Options(outputs=200), lambda *what: heard.append(what)
    KeepSensitive(counted, OBSERVE, options, lambda: told)(planned(CHAIN, CHAIN_WEIGHTS))
    assert asked == [9, *[3] * 5]  # all, one and two, and the two
    assert [share for _, share in heard] == [run / 60 for run in range(1, 6)]
    assert re.fullmatch(r"run 1 of at most 60, 3 layers quantized: \d+\.\d dB", heard[0][0])


def test_nodes_that_only_together_make_noise(monkeypatch):
    """The search ends with all left out, also those whose noise alone is 0."""

    def noise(self, layers, links):
        self.heard.append(5.0)
        return 0.0 if list(layers) in (["node_0"], ["node_2"]) else 10**-0.5

    monkeypatch.setattr(WorstOutput, "noise", noise)
    _, reasons = kept(CHAIN, CHAIN_WEIGHTS)
    assert list(reasons) == ["node_0", "node_2", "node_4"]
    assert "quantized alone it leaves the worst output inf dB" in reasons["node_0"]
    assert "quantized alone it leaves the worst output 5.0 dB" in reasons["node_4"]


def test_what_costs_the_output_stays_float_not_what_errs_most_itself():
    """One is good, but a small difference is all that is left of it; one is bad, but quiet."""
    rng = np.random.default_rng(1)
    weights = {
        "one": np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1),
        "channel": np.int64([1]),
        "quiet": np.float32(1e-4),
    }
    text = (
        "g (float[1,8,8,8] x, float[1,8,8,8] p) => (float[1,8,8,8] z) "
        "{ c = Conv (x, one) m = ReduceMean (c, channel) d = Sub (c, m) "
        "b = Conv (p, one) t = Mul (b, quiet) z = Add (d, t) }"
    )
    shape, shared = (1, 8, 8, 8), 100 * rng.standard_normal((1, 1, 8, 8), dtype=np.float32)
    feed = {
        "x": shared + rng.standard_normal(shape, dtype=np.float32),
        "p": rng.standard_normal(shape, dtype=np.float32) ** 7,
    }

    def kept(**options):
        model = planned(text, weights)
        KeepSensitive(*facts([feed]), KeepSensitive.Options(**options))(model)
        return [node.name for node in model.graph if node.op_type == "Conv" and not plan_of(node)]

    assert kept(own=30, outputs=-300) == ["node_3"]
    assert kept(own=-300, outputs=20) == ["node_0"]


@pytest.mark.parametrize("masked", ["Add (t, low)", "Log (t)"])
def test_what_is_not_finite_in_an_output_hides_nothing(masked):
    ends = "=> (float[1,8,2,2] z, float[1,8,2,2] u)", f"z = Neg (t) u = {masked}"
    text = CHAIN.replace("=> (float[1,8,2,2] z)", ends[0]).replace("z = Neg (t)", ends[1])
    # Half of the channels are minus infinity, as what a mask hides is.
    low = np.where(np.arange(8) % 2, 0, -np.inf).astype(np.float32).reshape(1, 8, 1, 1)
    weights = CHAIN_WEIGHTS | {"low": low}
    assert kept(text, weights, outputs=200)[1]
    _, reasons = kept(CHAIN, CHAIN_WEIGHTS, outputs=200)
    assert len(kept(text, weights, outputs=200)[1]) == len(reasons)
    assert kept(text, weights, outputs=-100)[1] == {}


@pytest.mark.parametrize(
    ("type", "ends"),
    [
        ("float16[1,8,2,2]", "z = Cast <to = 10> (n)"),
        ("double[1,8,2,2]", "z = Cast <to = 11> (n)"),
        ("bfloat16[1,8,2,2]", "z = Cast <to = 16> (n)"),
        ("int64[1,1,2,2]", "z = ArgMax <axis = 1> (n)"),
        ("int64[4,m]", "z = NonZero (n)"),
        ("float[m]", "b = Greater (n, zero) z = Compress (n, b)"),
    ],
)
def test_outputs_of_any_kind_are_judged(type, ends):
    text = CHAIN.replace("float[1,8,2,2] z", f"{type} z").replace("z =", "n =")
    text = text.replace("n = Neg (t)", f"n = Neg (t) {ends}")
    weights = CHAIN_WEIGHTS | {"zero": np.float32(0)}
    _, reasons = kept(text, weights, outputs=200)
    assert list(reasons) == list(kept(CHAIN, CHAIN_WEIGHTS, outputs=200)[1])
    assert all("below 200" in why for why in reasons.values())
    assert kept(text, weights, outputs=-100)[1] == {}

"""A transformer whose norms make 0.5% of their channels 50 times as large, as W8A8.

Plain int8 loses there what smoothing and splitting bring back, each alone and both together.
Two kinds are planted: "hidden", where the weights that read the channels are as much smaller, so
that it is the same function as without; and "heard", where they add to the result.
"""

import dataclasses

import numpy as np
import pytest
from golden import Feeds, model_of, run, sqnr
from planted import sampler

import qcompiler
from qcompiler.ir.decisions import decision_of, decisions, plan_of
from qcompiler.ir.stages import Stage
from qcompiler.ir.types import TensorStats
from qcompiler.model_runs import ModelRuns
from qcompiler.passes.smooth_activations import SmoothActivations
from qcompiler.passes.split_outliers import SplitOutliers
from qcompiler.pipeline import Pipeline

K, WIDE, HEADS, GROUPS, DEPTH, N = 400, 512, 10, 2, 40, 64
OUTLIERS = [31, 322]
RNG = np.random.default_rng(3)
FEEDS: Feeds = {"x": RNG.standard_normal((2, 24, K), dtype=np.float32)}

BLOCK = f"""
g (float[b,s,{K}] x) => (float[b,s,{K}] o) {{
    y = LayerNormalization <axis = -1> (x, g1, b1)
    q = MatMul (y, wq) q4 = Reshape (q, heads) qt = Transpose <perm = [0, 2, 1, 3]> (q4)
    k = MatMul (y, wk) k4 = Reshape (k, groups) kt = Transpose <perm = [0, 2, 3, 1]> (k4)
    v = MatMul (y, wv) v4 = Reshape (v, groups) vt = Transpose <perm = [0, 2, 1, 3]> (v4)
    ku = Unsqueeze (kt, two) ke = Expand (ku, repeat) kh = Reshape (ke, keys)
    vu = Unsqueeze (vt, two) ve = Expand (vu, repeat) vh = Reshape (ve, values)
    c = MatMul (qt, kh) d = Mul (c, scale) p = Softmax (d)
    a = MatMul (p, vh) at = Transpose <perm = [0, 2, 1, 3]> (a) aj = Reshape (at, joined)
    ao = MatMul (aj, wo) r = Add (x, ao)
    z = LayerNormalization <axis = -1> (r, g2, b2)
    gate = MatMul (z, wg) e = Sigmoid (gate) act = Mul (gate, e)
    up = MatMul (z, wu) h = Mul (act, up) down = MatMul (h, wd)
    o = Add (r, down)
}}"""
PRODUCT = f"""
g (float[b,s,{K}] x) => (float[b,s,{WIDE}] o) {{
    y = LayerNormalization <axis = -1> (x, g1, b1) o = MatMul (y, wu)
}}"""


def weights(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    sizes = {
        "wq": (K, HEADS * DEPTH), "wk": (K, GROUPS * DEPTH), "wv": (K, GROUPS * DEPTH),
        "wo": (HEADS * DEPTH, K), "wg": (K, WIDE), "wu": (K, WIDE), "wd": (WIDE, K),
    }  # fmt: skip
    made = {n: rng.standard_normal(s, dtype=np.float32) / s[0] ** 0.5 for n, s in sizes.items()}
    gamma = np.ones(K, np.float32)
    if kind != "none":
        gamma[OUTLIERS] = 50
    if kind == "hidden":
        for name in ("wq", "wk", "wv", "wg", "wu"):
            made[name][OUTLIERS] /= 50
    zeros = np.zeros(K, np.float32)
    shapes = {
        "heads": [0, 0, HEADS, DEPTH], "groups": [0, 0, GROUPS, DEPTH], "two": [2],
        "repeat": [1, 1, HEADS // GROUPS, 1, 1], "keys": [0, HEADS, DEPTH, -1],
        "values": [0, HEADS, -1, DEPTH], "joined": [0, 0, HEADS * DEPTH],
    }  # fmt: skip
    made |= {"g1": gamma, "g2": gamma, "b1": zeros, "b2": zeros}
    made |= {"scale": np.float32(DEPTH**-0.5)}
    return made | {name: np.array(shape, np.int64) for name, shape in shapes.items()}


@dataclasses.dataclass(frozen=True)
class Noise:
    """What a quantized model's results are off by, in dB below something."""

    whole: float
    inliers: float


def quantized(text: str, kind: str, *passes: str) -> np.ndarray:
    """The results of the model with these of the two passes."""
    pipeline = Pipeline.default("x86-int8", runs=ModelRuns(sample=sampler(FEEDS)))
    for name in ("smooth-activations", "split-outliers"):
        if name not in passes:
            pipeline.remove(name)
    model = pipeline.up_to(Stage.QDQ).run(model_of(text, weights(kind)))
    return run(model, FEEDS, plainly=True)[0]


def of_product(kind: str, *passes: str) -> Noise:
    exact = run(model_of(PRODUCT, weights(kind)), FEEDS)[0]
    parts = weights(kind)
    parts["wu"][OUTLIERS] = 0
    inliers = run(model_of(PRODUCT, parts), FEEDS)[0]
    got = quantized(PRODUCT, kind, *passes)
    return Noise(sqnr(exact, got), sqnr(inliers, inliers + (got - exact)))


@pytest.mark.parametrize("kind", ["hidden", "heard"])
def test_splitting_brings_back_the_inliers(kind):
    clean = of_product("none").inliers
    assert of_product(kind).inliers < clean - 15
    assert of_product(kind, "split-outliers").inliers > clean - 1
    assert of_product(kind, "smooth-activations", "split-outliers").inliers > clean - 2


def test_smoothing_brings_back_the_inliers_of_the_same_function():
    assert of_product("hidden", "smooth-activations").inliers > of_product("none").inliers - 3


def test_smoothing_shares_out_the_damage_of_outliers_that_are_heard():
    """No factors help the inliers more: what leaves the activations makes the weights coarse."""
    clean, plain = of_product("none"), of_product("heard")
    smoothed = of_product("heard", "smooth-activations")
    assert smoothed.whole > clean.whole - 3
    assert smoothed.whole > plain.whole + 10


@pytest.mark.parametrize(
    ("passes", "loss"),
    [
        (("split-outliers",), 1.0),
        (("smooth-activations",), 3.0),
        (("smooth-activations", "split-outliers"), 1.5),
    ],
    ids=["split", "smooth", "both"],
)
def test_a_transformer(passes, loss):
    exact = run(model_of(BLOCK, weights("hidden")), FEEDS)[0]
    clean = run(model_of(BLOCK, weights("none")), FEEDS)[0]
    np.testing.assert_allclose(exact, clean, rtol=1e-3, atol=1e-3)
    without = sqnr(clean, quantized(BLOCK, "none"))
    assert sqnr(exact, quantized(BLOCK, "hidden")) < without - 10
    assert sqnr(exact, quantized(BLOCK, "hidden", *passes)) > without - loss


@pytest.mark.parametrize("passes", [("smooth",), ("split",), ("smooth", "split"), ()])
def test_no_composition_is_a_silent_no_op(tmp_path, passes):
    """Through the default pipeline to a bundle: all seven products int8, and each says what was."""
    np.savez(tmp_path / "sample.npz", **FEEDS)
    recipe = qcompiler.Recipe(
        smooth="smooth" in passes,
        passes={"split-outliers": {"when": "auto" if "split" in passes else "off"}},
    )
    report = qcompiler.compile(
        model_of(BLOCK, weights("heard")), "arm-int8", tmp_path / "bundle",
        recipe=recipe, calibration=tmp_path / "sample.npz",
    )  # fmt: skip
    found = [d.why for d in report.decisions if "QMatMul" in d.op]
    assert sum(1 + why.count(" + ") for why in found) >= 3
    after_norms = [why for why in found if "smoothed" in why or "multiplied in float" in why]
    assert bool(after_norms) == bool(passes)
    exact = run(model_of(BLOCK, weights("heard")), FEEDS)[0]
    got = qcompiler.load(report.bundle).run(None, FEEDS)[0]
    assert sqnr(exact, got) > (25 if passes else 5)


ATTENTION = """
g (float[b,s,128] x) => (float[b,s,128] o) {
    y = LayerNormalization <axis = -1> (x, gamma, beta)
    q = MatMul (y, wq) q4 = Reshape (q, heads) qt = Transpose <perm = [0, 2, 1, 3]> (q4)
    k = MatMul (y, wk) k4 = Reshape (k, heads) kt = Transpose <perm = [0, 2, 3, 1]> (k4)
    v = MatMul (y, wv) v4 = Reshape (v, heads) vt = Transpose <perm = [0, 2, 1, 3]> (v4)
    c = MatMul (qt, kt) d = Mul (c, scale) p = Softmax (d)
    a = MatMul (p, vt) at = Transpose <perm = [0, 2, 1, 3]> (a) aj = Reshape (at, joined)
    o = MatMul (aj, wo)
}"""


@pytest.mark.parametrize(("when", "suffix"), [("off", "_int8"), ("auto", "")])
def test_attention_does_not_round_what_splitting_kept_exact(when, suffix):
    rng = np.random.default_rng(6)
    made = {f"w{n}": rng.standard_normal((128, 128), dtype=np.float32) / 11 for n in "qkvo"}
    made |= {"gamma": np.ones(128, np.float32), "beta": np.zeros(128, np.float32)}
    made |= {"scale": np.float32(32**-0.5), "heads": np.array([0, 0, 4, 32])}
    made["gamma"][17] = 50
    given = {"x": rng.standard_normal((2, 24, 128), dtype=np.float32)}
    recipe = qcompiler.Recipe(passes={"split-outliers": {"when": when}})
    model = model_of(ATTENTION, made | {"joined": np.array([0, 0, 128])})
    for step in Pipeline.default("x86-int8", recipe, runs=ModelRuns(sample=sampler(given))):
        model = step.apply(model).model
        if step.name == "fuse-attention":
            break
    (op,) = [node.op_type for node in model.graph if "Attention" in node.op_type]
    assert op == f"Attention_D32_ssss{suffix}"


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0, 1), (1, 0, 1)])
def test_every_order_quantizes_every_product(order):
    made = (SmoothActivations(sampler(FEEDS)), SplitOutliers(sampler(FEEDS)))
    pipeline = Pipeline.default("x86-int8", runs=ModelRuns(sample=sampler(FEEDS)))
    pipeline.remove("smooth-activations")
    pipeline.remove("split-outliers")
    for index, which in enumerate(order):
        pipeline.insert_before("insert-qdq", f"pass-{index}", made[which])
    model = pipeline.up_to(Stage.QUANTIZED).run(model_of(BLOCK, weights("hidden")))
    assert sum(node.op_type == "QMatMulW8A8" for node in model.graph) == 7
    after_norms = [decision_of(n).why for n in model.graph if n.op_type == "QMatMulW8A8"]
    changed = [why for why in after_norms if "smoothed with" in why or "multiplied in" in why]
    assert len(changed) >= 5
    assert not any(plan_of(n) for n in model.graph if n.op_type == "MatMul")
    assert decisions(model)


@pytest.mark.parametrize(
    ("passes", "gain"), [(("smooth-activations",), 10.0), (("split-outliers",), 10.0)]
)
def test_static_scales(passes, gain):
    """One scale per tensor suffers the more; ranges are measured once, of what is stored."""
    asked: list[list[str]] = []

    def observe(model, names):
        asked.append(list(names))
        rows = sampler(FEEDS)(model, names)
        return {n: TensorStats(float(r.min()), float(r.max())) for n, r in rows.items()}

    exact = run(model_of(PRODUCT, weights("hidden")), FEEDS)[0]
    noise = []
    for chosen in ((), passes):
        recipe = qcompiler.Recipe(nodes=[{"op": "MatMul", "activation": "static"}])
        pipeline = Pipeline.default("x86-int8", recipe, ModelRuns(observe, sampler(FEEDS)))
        for name in {"smooth-activations", "split-outliers"} - set(chosen):
            pipeline.remove(name)
        model = pipeline.up_to(Stage.QUANTIZED).run(model_of(PRODUCT, weights("hidden")))
        (product,) = (node for node in model.graph if node.op_type.startswith("QMatMul"))
        assert product.op_type == "QMatMulU8S8"
        noise.append(sqnr(exact, run(model, FEEDS, plainly=True)[0]))
    assert noise[1] > noise[0] + gain
    why = decision_of(product).why
    assert "smoothed with" in why or "2 of 400 channels multiplied in float" in why
    assert [len(names) for names in asked] == [1, 1]

"""Rounding as a recipe asks for it, from compile to what ONNX Runtime computes."""

import concurrent.futures
import pickle

import numpy as np
import onnx_ir as ir
import pytest
from correlated_rows import FEEDS, K, rows, samples
from golden import run, sqnr
from terminal import qcompile
from two_products import N, W, model

import qcompiler
from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import CalibrationError, ModelError, OptionError
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.targets.catalog import TARGETS

pytestmark = pytest.mark.usefixtures("own_cache")


def compiled(tmp_path, rounding, target="cuda-int4", **more):
    report = qcompiler.compile(
        model(), target, tmp_path / f"{rounding}.{target}", calibration=samples,
        recipe=qcompiler.Recipe(rounding=rounding), timing=False, **more,
    )  # fmt: skip
    session = qcompiler.load(report.bundle, native=False, providers=["CPUExecutionProvider"])
    return sqnr(run(model(), FEEDS)[0], session.run(None, FEEDS)[0]), report


def test_gptq_and_awq_gptq_are_better_than_nearest(tmp_path):
    nearest, _ = compiled(tmp_path, "nearest")
    told = []
    gptq, report = compiled(tmp_path, "gptq", progress=lambda label, *_: told.append(label))
    both, _ = compiled(tmp_path, "awq_gptq")
    assert gptq > nearest + 2 and both > nearest + 2
    assert all("rounded by gptq to " in d.why for d in report.decisions if d.op == "QMatMulW4A16")
    assert any(label.startswith("gptq: node_0: rounded by gptq to ") for label in told)
    assert not report.notes


@pytest.mark.parametrize("rounding", ["hqq", "awq"])
def test_others_run(tmp_path, rounding):
    found, report = compiled(tmp_path, rounding)
    assert found > 17
    assert any(rounding in decision.why for decision in report.decisions)


def test_eight_bits_too(tmp_path):
    """The activations are rounded as well, and what goes into the next layer is still float."""
    found, report = compiled(tmp_path, "gptq", "arm-int8")
    assert all("rounded by gptq" in d.why for d in report.decisions if d.op == "QMatMulW8A8")
    assert found > 15


def test_layers_in_an_executor(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        _, report = compiled(tmp_path, "gptq", executor=executor)
    assert any("rounded by gptq" in decision.why for decision in report.decisions)
    with pytest.raises(OptionError, match="executor must be a concurrent.futures.Executor"):
        qcompiler.compile(model(), "cuda-int4", tmp_path / "b", executor=3)


class Workers(concurrent.futures.Executor):
    """As a cluster has them: `submit` is all there is, and what is sent is pickled."""

    def __init__(self):
        self.jobs = 0

    def submit(self, function, /, *arguments, **named):
        sent = pickle.dumps((function, arguments, named))
        self.jobs += 1
        result = concurrent.futures.Future()
        function, arguments, named = pickle.loads(sent)
        result.set_result(function(*arguments, **named))
        return result


@pytest.mark.parametrize("rounding", ["hqq", "awq", "gptq", "awq_gptq"])
def test_an_executor_of_ones_own(tmp_path, rounding, monkeypatch):
    stored = []
    for number, workers in enumerate([None, Workers()]):
        monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / f"cache{number}"))
        file = qcompiler.compile(
            model(), "cuda-int4", tmp_path / f"{number}.onnx", calibration=samples,
            recipe=qcompiler.Recipe(rounding=rounding, zero_points="float"), timing=False,
            executor=workers, stop_after="qdq",
        ).bundle  # fmt: skip
        stored.append(file.read_bytes())
    assert workers.jobs == 2 and stored[0] == stored[1]


@pytest.mark.parametrize("rounding", ["gptq", "awq", "awq_gptq"])
def test_samples_are_asked_for(tmp_path, rounding):
    recipe = qcompiler.Recipe(rounding=rounding)
    first = rounding.split("_")[0]
    with pytest.raises(CalibrationError, match=f"{first} .* node_0 and 1 more .*--calib DIR"):
        qcompiler.compile(model(), "cuda-int4", tmp_path / "b", recipe=recipe, timing=False)
    assert not (tmp_path / "b").exists()


def test_what_a_recipe_cannot_say(tmp_path):
    with pytest.raises(OptionError, match="unknown rounding 'gtpq'; did you mean 'gptq'"):
        qcompiler.Recipe(rounding="gtpq")
    recipe = qcompiler.Recipe(rounding="gptq")
    passes = "canonicalize,assign-precision,insert-qdq,round-to-nearest,fold-qdq"
    with pytest.raises(OptionError, match="'node_0' is to be rounded by gptq, which the pipeline"):
        qcompiler.compile(model(), "cuda-int4", tmp_path / "b", recipe=recipe, pipeline=passes)


@pytest.mark.parametrize("rounding", ["hqq", "gptq"])
def test_floats_are_only_rounded_to_nearest(tmp_path, rounding):
    recipe = qcompiler.Recipe(rounding=rounding)
    message = f"rounding '{rounding}': fp8 weights are floats, and rounded to nearest; leave it out"
    with pytest.raises(OptionError, match=message):
        qcompiler.compile(model(), "cuda-fp8", tmp_path / "b", recipe=recipe, calibration=samples)
    int8 = {"match": "node_2", "precision": "int8", "activation": "dynamic"}
    recipe = qcompiler.Recipe(rounding=rounding, nodes=[int8])
    report = qcompiler.compile(
        model(), "cuda-fp8", tmp_path / "b.onnx", recipe=recipe, calibration=samples,
        timing=False, stop_after="qdq",
    )  # fmt: skip
    assert [d.node for d in report.decisions if f"rounded by {rounding}" in d.why] == ["node_2"]


@pytest.mark.parametrize(
    "key", [{"rounding": "gptq"}, {"zero_points": "float"}, {"scales": "int8"}]
)
def test_what_came_rounded_is_not_rounded_again(tmp_path, key):
    """It would be, as the recipe says, with no word of it."""
    first = tmp_path / "first.onnx"
    qcompiler.compile(model(), "cuda-int4", first, timing=False, stop_after="qdq")
    (name, value), *_ = key.items()
    with pytest.raises(OptionError, match=f"{name} '{value}': the source is quantized already"):
        qcompiler.compile(
            first, "cuda-int4", tmp_path / "b", recipe=qcompiler.Recipe(**key),
            calibration=samples, timing=False,
        )  # fmt: skip


def test_a_rule_for_one_layer(tmp_path):
    recipe = qcompiler.Recipe(nodes=[{"match": "node_2", "rounding": "gptq"}])
    report = qcompiler.compile(
        model(), "cuda-int4", tmp_path / "b", recipe=recipe, calibration=samples, timing=False
    )
    whys = {d.node: d.why for d in report.decisions}
    assert "gptq" in whys["node_2"] and "gptq" not in whys["node_0"]


def test_zero_points(tmp_path):
    rule = {"op": "MatMul", "zero_points": "integer", "activation": "float"}
    weights = W | {"v": W["v"] + np.float32(0.3)}
    recipe = qcompiler.Recipe(nodes=[rule], rounding="gptq")
    report = qcompiler.compile(
        model(weights=weights), "arm-int4", tmp_path / "b", recipe=recipe, calibration=samples,
        timing=False,
    )  # fmt: skip
    assert {d.op for d in report.decisions if d.action == "body"} == {"QMatMulW4Z4A16"}
    session = qcompiler.load(report.bundle)
    assert sqnr(run(model(weights=weights), FEEDS)[0], session.run(None, FEEDS)[0]) > 20


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_table_that_is_the_head_too(tmp_path, rounding):
    """Each keeps a form of its own: the head as the recipe says, the table float or as it says."""
    text = (
        f"g (int64[n] i) => (float[n,{K}] y) "
        "{ r = Gather (v, i) x = Tanh (r) t = Transpose <perm = [1, 0]> (v) y = MatMul (x, t) }"
    )
    feeds = {"i": np.arange(K)}
    expected = run(model(text), feeds)[0]
    for precision, of_table in ("float", "float"), ("int8", "qdq"):
        recipe = qcompiler.Recipe(
            rounding=rounding, nodes=[{"op": "Gather", "precision": precision}]
        )
        report = qcompiler.compile(
            model(text), "cuda-int4", tmp_path / precision, timing=False, recipe=recipe,
            calibration=lambda: [feeds],
        )  # fmt: skip
        session = qcompiler.load(report.bundle, native=False, providers=["CPUExecutionProvider"])
        assert sqnr(expected, session.run(None, feeds)[0]) > 15
        found = {decision.op.split("_")[0]: decision.action for decision in report.decisions}
        assert (found["QMatMulW4A16"], found["Gather"]) == ("kernel", of_table)


def test_a_weight_that_is_computed_stays_and_says_why(tmp_path):
    text = (
        f"g (float[n,{K}] x) => (float[n,{K}] y) {{ t = Sin (v) u = MatMul (x, v) s = Add (u, x) "
    )
    text += "r = ReduceSum <keepdims = 1> (s, axes) w2 = Add (v, r) y = MatMul (u, w2) }"
    made = model(text.replace("[n,", "[1,"), W | {"axes": np.asarray([0, 1])})
    report = qcompiler.compile(made, "cuda-int4", tmp_path / "b", timing=False)
    whys = [decision.why for decision in report.decisions if decision.op == "MatMul"]
    assert whys == ["its second operand is an activation: no quantized form yet"]


@pytest.mark.parametrize("rounding", ["nearest", "hqq", "awq", "gptq"])
def test_weights_that_are_not_finite(tmp_path, rounding):
    weights = {name: array.copy() for name, array in W.items()}
    weights["w"][3, 4] = np.inf
    with pytest.raises(ModelError, match="'w' of 'node_2' holds 1 NaN or Inf; .*-float node_2"):
        qcompiler.compile(
            model(weights=weights), "cuda-int4", tmp_path / "b", timing=False,
            recipe=qcompiler.Recipe(rounding=rounding), calibration=samples,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("rounding", "target", "scales"),
    [
        ("nearest", "arm-int8", 1),
        ("nearest", "arm-int4", 2),
        ("nearest", "cuda-fp8", 1),
        ("hqq", "cuda-int4", 1),
        ("awq", "cuda-int4", 1),
        ("gptq", "arm-int8", 1),
    ],
)
def test_weights_below_the_smallest_scale_are_said(tmp_path, rounding, target, scales):
    """Of a column that is almost 0; one of zeros loses nothing."""
    weights = {"v": W["v"].copy(), "w": W["w"].copy()}
    weights["v"][:, 3] = 0
    weights["w"][:, 3] *= np.float32(1e-40)
    report = qcompiler.compile(
        model(weights=weights), target, tmp_path / "b", timing=False, calibration=samples,
        recipe=qcompiler.Recipe(rounding=rounding),
    )  # fmt: skip
    first, second = (d.why for d in report.decisions if d.node in ("node_0", "node_2"))
    assert f"weights of {scales} scales are below the smallest, and lose bits or all" in second
    assert "smallest" not in first


def test_inside_of_a_branch_there_is_only_rounding_to_nearest():
    text = (
        f"g (float[n,{K}] x, bool c) => (float[n,{N}] y) {{ y = If (c) <"
        f"then_branch = t () => (float[n,{N}] p) {{ p = MatMul (x, w) }}, "
        f"else_branch = e () => (float[n,{N}] q) {{ q = MatMul (x, w) }}> }}"
    )
    made = model(text)
    AssignPrecision(TARGETS["x86-int8"].scheme, AssignPrecision.Options(rounding="gptq"))(made)
    whys = [decision_of(node).why for node in made.graph.all_nodes() if node.op_type == "MatMul"]
    assert all("rounded to nearest, not by gptq: inside of a branch" in why for why in whys)


def test_on_the_command_line(tmp_path):
    ir.save(model(), tmp_path / "m.onnx")
    np.savez(tmp_path / "a.npz", x=rows(0))
    (tmp_path / "r.toml").write_text("[passes.gptq]\ndamping = 0.05\n")
    words = ["--target", "cuda-int4", "--recipe", str(tmp_path / "r.toml"), "--no-timing"]
    words += ["--rounding", "gptq"]
    calib = ["--calib", str(tmp_path / "a.npz"), "-o", str(tmp_path / "b"), "-v"]
    result = qcompile(tmp_path / "m.onnx", *words, *calib)
    assert result.exit_code == 0, result.output
    assert "rounded by gptq" in " ".join(result.output.split())

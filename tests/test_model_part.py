"""What is written of a model whose tensors are looked at, and what of them is known afterwards."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from golden import model_of, run

from qcompiler.ir.errors import OptionError
from qcompiler.model_part import save_part
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.known_rows import KnownRows
from qcompiler.passes.planned_products import sampled_products
from qcompiler.passes.product_error import Trial, rounding_error, rounding_errors
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
WEIGHTS = {
    "large": RNG.standard_normal((64, 64), dtype=np.float32),
    "other": RNG.standard_normal((64, 64), dtype=np.float32),
    "small": np.float32(3),
}
TEXT = """g (float[n,64] x, bool c) => (float[n,64] y) {
    a = MatMul (x, large)
    d = Neg (x)
    b = If (c) <
        then_branch = t () => (float[n,64] p) { p = Mul (a, small) },
        else_branch = e () => (float[n,64] q) { q = Identity (d) }
    >
    z = MatMul (b, other)
    y = Exp (z)
}"""
FEEDS = {"x": RNG.standard_normal((3, 64), dtype=np.float32), "c": np.array(True)}


def value(model, name):
    return next(v for node in model.graph for v in node.outputs if v.name == name)


@pytest.mark.parametrize("condition", [True, False])
def test_only_what_a_tensor_depends_on(tmp_path, condition):
    model = model_of(TEXT, WEIGHTS)
    feeds = FEEDS | {"c": np.array(condition)}
    file = tmp_path / "part.onnx"
    save_part(model, [value(model, "b"), value(model, "a")], file)
    written = onnx.load(file, load_external_data=False)
    assert [node.op_type for node in written.graph.node] == ["MatMul", "Neg", "If"]
    assert {tensor.name for tensor in written.graph.initializer} == {"large", "small"}
    assert not written.graph.value_info
    # The others lie in the file itself, which ends at 2 GiB.
    assert (tmp_path / "part.onnx.data").stat().st_size == WEIGHTS["large"].nbytes
    got = ort.InferenceSession(file).run(None, feeds)
    product = FEEDS["x"] @ WEIGHTS["large"]
    np.testing.assert_allclose(got[1], product, rtol=1e-5, atol=1e-5)
    expected = product * 3 if condition else -FEEDS["x"]
    np.testing.assert_allclose(got[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(run(model, feeds)[0].shape, (3, 64))  # it is as it was


def test_a_file_that_cannot_be_written(tmp_path):
    model = model_of(TEXT, WEIGHTS)
    with pytest.raises(OptionError, match="cannot write"):
        save_part(model, [value(model, "b")], tmp_path / "none" / "part.onnx")


def counting(asked):
    def sample(model, names):
        asked.append(list(names))
        return {name: np.full((2, 3), len(name), np.float32) for name in names}

    return sample


def test_rows_are_given_once_and_sampled_where_there_are_none():
    asked = []
    model, rows = model_of(TEXT, WEIGHTS), KnownRows(counting(asked))
    rows.keep(model, {"a": np.zeros((1, 2), np.float32)})
    assert set(rows(model, ["a", "zz"])) == {"a", "zz"}
    assert asked == [["zz"]]
    rows(model, ["a"])
    assert asked == [["zz"], ["a"]]


@pytest.mark.parametrize("change", ["model", "forget"])
def test_rows_of_another_model_are_not_known(change):
    asked = []
    model, rows = model_of(TEXT, WEIGHTS), KnownRows(counting(asked))
    rows.keep(model, {"a": np.zeros((1, 2), np.float32)})
    if change == "forget":
        rows.forget()
    else:
        model.graph[0].replace_input_with(1, model.graph.initializers["other"])
    rows(model, ["a"])
    assert asked == [["a"]]


@pytest.mark.parametrize("target", ["x86-int8", "x86-int4"])
def test_errors_of_several_factors_are_those_of_each(target):
    text = "g (float[n,64] x) => (float[n,9] y) { y = MatMul (x, w) }"
    model = model_of(text, {"w": RNG.standard_normal((64, 9), dtype=np.float32)})
    model.graph[0].name = "product"
    AssignPrecision(TARGETS[target].scheme)(model)
    tokens = RNG.standard_normal((5, 64), dtype=np.float32)
    with sampled_products(
        model, lambda *_: {"x": tokens}, "x", made_up=False, ranges=None
    ) as sites:
        ((site, _),) = sites
    weights = site.weights()
    others = {plan: part[:, :3] for plan, part in weights.items()}
    factors = [np.exp2(RNG.integers(0, 4, 64)).astype(np.float32) for _ in range(3)]
    trials = [
        Trial(tokens, weights, factors[:2]),
        Trial(tokens, others, factors),
        Trial(-2 * tokens, weights, factors[2:]),
        Trial(tokens, {}, []),
    ]
    found = rounding_errors(trials)
    for trial, errors in zip(trials, found, strict=True):
        for error, each in zip(errors, trial.factors, strict=True):
            scaled = {plan: part * each[:, None] for plan, part in trial.weights.items()}
            alone = rounding_error(trial.tokens / each, scaled)
            assert error == pytest.approx(alone, rel=1e-3)
    assert len({error for errors in found for error in errors}) == 6

"""Errors inside a bundle: whose they are, whether they add up, and what would take them away."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of
from spiked_models import SPIKED, TEXT, W, data
from terminal import qcompile

import qcompiler
from qcompiler.compare import compare
from qcompiler.ir.errors import OptionError
from qcompiler.node_errors import node_errors, worst_first
from qcompiler.samples import Samples

RNG = np.random.default_rng(0)


def test_the_node_that_errs_is_found(spiked):
    errors = node_errors(*spiked, Samples(data()))
    by_tensor = {error.tensor: error for error in errors}
    assert set(by_tensor) == {"b", "d", "y"}
    worst = worst_first(errors)[0]
    assert worst.tensor == "d"
    assert worst.remedy == f"--keep-float {worst.node}"
    # What comes after has a small error of its own, but inherits the large one.
    assert by_tensor["y"].own.sqnr > by_tensor["d"].own.sqnr + 6
    assert by_tensor["y"].total.sqnr < by_tensor["y"].own.sqnr - 6
    assert by_tensor["b"].own.sqnr == pytest.approx(by_tensor["b"].total.sqnr)


def test_bodies_and_kernels_err_alike(spiked):
    native, bodies = (node_errors(*spiked, Samples(data()), native=n) for n in (True, False))
    for one, other in zip(native, bodies, strict=True):
        assert one.own.sqnr == pytest.approx(other.own.sqnr, abs=0.1)


def test_the_last_total_is_that_of_the_output(spiked):
    found = compare(*spiked, data(), nodes=True)
    (output,) = found.outputs
    assert found.nodes[-1].tensor == "y"
    assert found.nodes[-1].total.sqnr == pytest.approx(output.sqnr, abs=1e-3)


def test_a_node_kept_float_errs_no_more(spiked, tmp_path):
    source, bundle = spiked
    worst = worst_first(node_errors(source, bundle, Samples(data())))[0].node
    recipe = qcompiler.Recipe(keep_float=(worst,))
    better = qcompiler.compile(source, "x86-int8", tmp_path / "c", recipe=recipe, timing=False)
    before, after = (compare(source, b, data()).outputs[0] for b in (bundle, better.bundle))
    assert after.sqnr > before.sqnr + 3
    assert worst not in {
        error.node for error in node_errors(source, better.bundle, Samples(data()))
    }


def test_convolutions_in_integers(tmp_path):
    text = """g (float[n,3,8,8] x) => (float[n,4,8,8] y) {
        a = Conv <pads = [1,1,1,1]> (x, u, z)
        r = Relu (a)
        c = Conv <pads = [1,1,1,1]> (r, v, z)
        y = Neg (c)
    }"""
    source = tmp_path / "conv.onnx"
    kernels = [RNG.standard_normal((4, i, 3, 3)).astype(np.float32) for i in (3, 4)]
    kernels[1][:, 0] *= 300  # needs steps that leave none for the other channels
    weights = {"u": kernels[0], "v": kernels[1], "z": np.zeros(4, np.float32)}
    ir.save(model_of(text, weights), source)
    images = [RNG.standard_normal((1, 3, 8, 8)).astype(np.float32) for _ in range(4)]
    recipe = qcompiler.Recipe(passes={"equalize-layers": {"gain": 1000.0}})  # or r is another
    report = qcompiler.compile(
        source, "arm-int8", tmp_path / "b", calibration=lambda: images, recipe=recipe
    )
    errors = node_errors(source, report.bundle, Samples(lambda: images))
    by_tensor = {error.tensor: error for error in errors}
    assert set(by_tensor) == {"x", "r", "c"}
    assert by_tensor["x"].own.sqnr > 35  # 256 steps of a normal distribution
    assert by_tensor["r"].total.sqnr == by_tensor["r"].own.sqnr  # its input is a sample's
    assert by_tensor["c"].total.sqnr < by_tensor["c"].own.sqnr
    assert by_tensor["c"].op == "QConv"


def test_a_source_that_was_quantized(tmp_path):
    text = """g (float[n,64] x) => (float[n,64] y) {
        a = QuantizeLinear (x, s, z)
        b = DequantizeLinear (a, s, z)
        v = DequantizeLinear <axis = 1> (w, u)
        c = MatMul (b, v)
        y = Neg (c)
    }"""
    weights = {
        "s": np.float32(0.02), "z": np.uint8(120), "u": np.full(64, 0.01, np.float32),
        "w": RNG.integers(-127, 128, (64, 64), np.int8),
    }  # fmt: skip
    source = tmp_path / "qdq.onnx"
    ir.save(model_of(text, weights), source)
    bundle = qcompiler.compile(source, "x86-int8", tmp_path / "b", timing=False).bundle
    errors = node_errors(source, bundle, Samples(data()))
    assert {error.tensor for error in errors} >= {"c"}
    assert not any(error.can_stay_float or error.remedy for error in errors)
    recipe = qcompiler.Recipe(keep_float=("MatMul",))
    with pytest.raises(OptionError, match="keep_float 'MatMul': the source is quantized already"):
        qcompiler.compile(source, "x86-int8", tmp_path / "c", recipe=recipe)


def compiled(tmp_path, text, weights, recipe, calibration, name="b"):
    """The model as a file, its nodes named node_0, node_1…, and its bundle."""
    model = model_of(text, weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    ir.save(model, tmp_path / "named.onnx")
    report = qcompiler.compile(
        tmp_path / "named.onnx", "x86-int8", tmp_path / name,
        recipe=recipe, calibration=calibration, timing=False,
    )  # fmt: skip
    return tmp_path / "named.onnx", report.bundle


def test_a_tensor_stored_as_integers_goes_with_those_that_read_it(tmp_path):
    text = """g (float[n,3,8,8] x) => (float[n,4,8,8] y) {
        a = Conv <pads = [1,1,1,1]> (x, u) b = Relu (a)
        c = Conv <pads = [1,1,1,1]> (b, v) d = Relu (c)
        e = Conv <pads = [1,1,1,1]> (d, v) y = Neg (e)
    }"""
    kernels = {
        "u": RNG.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "v": RNG.standard_normal((4, 4, 3, 3)).astype(np.float32),
    }
    images = [RNG.standard_normal((1, 3, 8, 8)).astype(np.float32) ** 3 for _ in range(4)]
    asked = {
        "nodes": [{"op": "Conv", "precision": "int8"}],
        "passes": {"keep-sensitive": {"own": -300.0, "runs": 0}},
    }
    recipe = qcompiler.Recipe.from_dict(asked)
    source, bundle = compiled(tmp_path, text, kernels, recipe, images)
    errors = {e.tensor: e for e in node_errors(source, bundle, Samples(images))}
    assert errors["x"].op == "QuantizeLinear"
    assert errors["x"].remedy == "--keep-float node_0"
    better = qcompiler.Recipe.from_dict(asked | {"keep_float": list(errors["x"].keep)})
    source, bundle = compiled(tmp_path, text, kernels, better, images, "c")
    after = {e.tensor for e in node_errors(source, bundle, Samples(images))}
    assert "x" not in after
    assert "b" in after  # which the second one still reads as integers
    told = qcompile("compare", source, bundle, "--data", _saved(tmp_path, images))
    assert "keep node_2 float" in told.stdout


def _saved(tmp_path, images):
    (tmp_path / "data").mkdir()
    for index, image in enumerate(images):
        np.savez(tmp_path / "data" / f"{index}.npz", x=image)
    return tmp_path / "data"


def test_a_product_that_stores_integers_is_looked_at(tmp_path):
    recipe = qcompiler.Recipe.from_dict(
        {"nodes": [{"op": "MatMul", "precision": "int8", "activation": "static"}]}
    )
    text = (
        "g (float[n,64] x) => (float[n,64] y) { a = MatMul (x, v) b = Relu (a) y = MatMul (b, w) }"
    )
    given = data()()
    source, bundle = compiled(tmp_path, text, {"w": W, "v": W}, recipe, given)
    stored = [v.name for node in ir.load(bundle / "model.onnx").graph for v in node.outputs]
    assert "b_quantized" in stored
    errors = {e.tensor: e for e in node_errors(source, bundle, Samples(given))}
    assert set(errors) == {"x", "b", "y"}
    assert errors["b"].keep == ("node_0",)
    # Of exact integers only the weight of the last one is rounded.
    assert errors["y"].own.sqnr > errors["y"].total.sqnr + 1


def test_a_source_of_16_bit_floats(tmp_path):
    text = TEXT.replace("float[", "float16[")
    model = model_of(text, {"w": W.astype(np.float16), "v": SPIKED.astype(np.float16)})
    ir.save(model, tmp_path / "half.onnx")
    report = qcompiler.compile(tmp_path / "half.onnx", "x86-int8", tmp_path / "b", timing=False)
    given = [{"x": sample["x"].astype(np.float16)} for sample in data()()]
    errors = node_errors(tmp_path / "half.onnx", report.bundle, Samples(given))
    assert {"b", "d"} <= {error.tensor for error in errors}
    worst = worst_first(errors)[0]
    assert worst.tensor == "d"
    assert worst.can_stay_float


@pytest.mark.parametrize("source", ["float", "float16"])
def test_a_bundle_that_computes_in_float16(tmp_path, source):
    dtype = np.float16 if source == "float16" else np.float32
    model = model_of(
        TEXT.replace("float[", f"{source}["), {"w": W.astype(dtype), "v": SPIKED.astype(dtype)}
    )
    ir.save(model, tmp_path / "m.onnx")
    bundle = qcompiler.compile(
        tmp_path / "m.onnx", "cuda-int8", tmp_path / "b", timing=False
    ).bundle
    inside = [v.dtype for node in ir.load(bundle / "model.onnx").graph for v in node.outputs]
    assert ir.DataType.FLOAT16 in inside
    given = [{"x": sample["x"].astype(dtype)} for sample in data()()]
    errors = node_errors(tmp_path / "m.onnx", bundle, Samples(given), native=False)
    assert {"b", "d"} <= {error.tensor for error in errors}
    assert worst_first(errors)[0].tensor == "d"

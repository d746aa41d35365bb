import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from qcompiler.compare import compare
from qcompiler.ir.errors import BundleError, CalibrationError, ModelError, OptionError

SCALE = (
    "g (float[n, 3] x) => (float[n, 3] y) {{ s = Constant <value_float = {0}> () y = Mul (x, s) }}"
)


def save(path: Path, body: str) -> Path:
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]>\n{body}'), path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    x = np.array([[1, 2, 3], [3, 2, 1]], np.float32)
    np.savez(data / "0.npz", x=x, label=np.array([2, 1]))
    np.savez(data / "1.npz", x=-x, label=np.array([0, 2]))
    return tmp_path


def model(folder: Path, scale: float) -> Path:
    return save(folder / f"{scale}.onnx", SCALE.format(scale))


def test_a_model_equals_itself(folder):
    told = []
    found = compare(model(folder, 1.0), model(folder, 1.0), folder / "data",
                    progress=lambda *step: told.append(step))  # fmt: skip
    (output,) = found.outputs
    assert output.sqnr is None
    assert output.cosine == pytest.approx(1.0)
    assert (output.values, output.max_error, output.rows, output.top1) == (12, 0.0, 4, 1.0)
    assert told == [("the outputs", 1, 2), ("the outputs", 2, 2)]


def test_figures_of_a_known_error(folder):
    (output,) = compare(model(folder, 1.0), model(folder, 1.1), folder / "data").outputs
    assert output.sqnr == pytest.approx(20.0, abs=1e-4)
    assert output.cosine == pytest.approx(1.0)
    assert output.max_error == pytest.approx(0.3, abs=1e-6)
    assert output.top1 == 1.0


def test_labels(folder):
    found = compare(model(folder, 1.0), model(folder, -1.0), folder / "data", labels="label")
    (output,) = found.outputs
    assert output.top1 == 0.0
    assert output.cosine == pytest.approx(-1.0)
    assert output.accuracy is not None
    # Largest scores are at 2, 0, 0, 2 before and at 0, 2, 2, 0 after; the labels are 2, 1, 0, 2.
    assert (output.accuracy.model, output.accuracy.bundle) == (0.75, 0.0)
    assert json.loads(json.dumps(found.to_dict()))["outputs"][0]["accuracy"]["model"] == 0.75


@pytest.mark.parametrize(
    ("name", "classes", "rows"),
    [("y", 101, 6), ("y", 100, 0), ("logits", 5, 6), ("last_hidden_state", 384, 0)],
)
def test_scores_of_every_step(tmp_path, name, classes, rows):
    kind = f"float[b, s, {classes}]"
    same, other = (
        save(tmp_path / op, f"g ({kind} x) => ({kind} {name}) {{ {name} = {op} (x) }}")
        for op in ("Identity", "Neg")
    )
    x = np.random.default_rng(0).standard_normal((2, 3, classes)).astype(np.float32)
    np.savez(tmp_path / "0.npz", x=x, label=x.argmax(-1))
    (output,) = compare(same, other, tmp_path / "0.npz").outputs
    assert (output.rows, output.top1) == (rows, 0.0 if rows else None)
    if rows:
        (output,) = compare(same, same, tmp_path / "0.npz", labels="label").outputs
        assert output.accuracy is not None
        assert (output.top1, output.accuracy.bundle) == (1.0, 1.0)


def test_silence_has_no_ratio(folder):
    (output,) = compare(model(folder, 0.0), model(folder, 1.0), folder / "data").outputs
    assert (output.sqnr, output.cosine) == (-300.0, None)


def test_nan_is_counted_and_left_out(folder):
    broken = save(
        folder / "nan.onnx",
        "g (float[n, 3] x) => (float[n, 3] y) { t = Constant <value_float = 2.5> () r = Sub (t, x)"
        " root = Sqrt (r) zero = Sub (root, root) y = Add (x, zero) }",
    )
    (output,) = compare(model(folder, 1.0), broken, folder / "data").outputs
    assert output.not_finite == 2
    assert output.values == 10
    assert output.sqnr is not None
    assert not math.isnan(output.sqnr)


@pytest.mark.parametrize(
    ("change", "labels", "error", "message"),
    [
        ({"label": None}, "label", CalibrationError, "no array 'label' of labels; it has"),
        ({"label": np.array([0.5, 1.0])}, "label", CalibrationError, "float64, not integers"),
        (
            {"label": np.array([1, 2, 3])},
            "label",
            CalibrationError,
            r"shape \[3\], there are scores",
        ),
        ({"x": None}, None, CalibrationError, "no array for input 'x'"),
        ({"x": np.ones((2, 4), np.float32)}, None, CalibrationError, r"shape \[2, 4\]"),
        ({"x": np.ones((2, 3))}, None, CalibrationError, "is float64"),
        ({"x": np.full((2, 3), np.nan, np.float32)}, None, CalibrationError, "NaN or Inf"),
    ],
)
def test_bad_samples(folder, change, labels, error, message):
    arrays = {"x": np.ones((2, 3), np.float32), "label": np.array([1, 2])} | change
    kept = {name: array for name, array in arrays.items() if array is not None}
    np.savez(folder / "data" / "2.npz", **kept)
    with pytest.raises(error, match=message) as caught:
        compare(model(folder, 1.0), model(folder, 1.0), folder / "data", labels=labels)
    assert "2.npz" in str(caught.value)


def test_labels_need_scores(folder):
    flat = save(
        folder / "f.onnx", "g (float[n, 3] x) => (float y) { y = ReduceMax <keepdims = 0> (x) }"
    )
    with pytest.raises(OptionError, match=r"no output is a float of"):
        compare(flat, flat, folder / "data", labels="label")


def test_other_outputs(folder):
    other = save(folder / "o.onnx", "g (float[n, 3] x) => (float[n, 3] z) { z = Relu (x) }")
    with pytest.raises(BundleError, match=r"no output \['y'\]"):
        compare(model(folder, 1.0), other, folder / "data")


def test_other_shapes(folder):
    other = save(folder / "t.onnx", "g (float[n, 3] x) => (float[3, n] y) { y = Transpose (x) }")
    with pytest.raises(BundleError, match=r"shape \[3, 2\]"):
        compare(model(folder, 1.0), other, folder / "data")


def test_a_model_that_fails(folder):
    fixed = save(folder / "r.onnx", "g (float[n, 3] x) => (float[a, b] y)"
                 " { s = Constant <value_ints = [7, 1]> () y = Reshape (x, s) }")  # fmt: skip
    with pytest.raises(ModelError, match=r"r\.onnx fails on .*0\.npz"):
        compare(fixed, fixed, folder / "data")


def test_the_example_keeps_its_accuracy(digits):
    test = Path(__file__).resolve().parents[1] / "examples" / "digits"
    native, bodies = (
        compare(test / "digits.onnx", digits.bundle, test / "test", labels="label", native=native)
        for native in (True, False)
    )
    for found in (native, bodies):
        (output,) = found.outputs
        assert output.sqnr is not None
        assert output.sqnr > 30
        assert output.top1 is not None
        assert output.top1 > 0.98
        assert output.accuracy is not None
        assert output.accuracy.bundle > 0.97

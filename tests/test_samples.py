"""Where samples come from: files, folders, lists and functions, and what is wrong with them."""

import re
import sys

import numpy as np
import pytest
from golden import model_of
from model_inputs import TWO, X, arrays
from onnx import numpy_helper

import qcompiler
from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.sample_function import samples_of
from qcompiler.samples import Samples


def test_npy_files_are_the_only_input(tmp_path):
    for index in range(2):
        np.save(tmp_path / f"{index}.npy", X + index)
    first, second = arrays(tmp_path)
    np.testing.assert_array_equal(first["x"], X)
    np.testing.assert_array_equal(second["x"], X + 1)
    (single,) = arrays(tmp_path / "1.npy")
    np.testing.assert_array_equal(single["x"], X + 1)
    with pytest.raises(CalibrationError, match=r"0.npy .* has no array for input 'y', only ..#0"):
        arrays(tmp_path, TWO)


def test_onnx_test_data(tmp_path):
    for number in (0, 1):
        folder = tmp_path / f"test_data_set_{number}"
        folder.mkdir()
        for index, (name, array) in enumerate([("x", X + number), ("", np.array([1, 2]))]):
            tensor = numpy_helper.from_array(array, name)
            (folder / f"input_{index}.pb").write_bytes(tensor.SerializeToString())
        (folder / "output_0.pb").write_bytes(b"not looked at")
    found = arrays(tmp_path, TWO)
    assert [sample["x"][0, 0, 0] for sample in found] == [0, 1]
    np.testing.assert_array_equal(found[0]["y"], [1, 2])
    assert len(arrays(tmp_path / "test_data_set_1", TWO)) == 1
    (tmp_path / "test_data_set_1" / "input_1.pb").write_bytes(b"\xff\xff")
    with pytest.raises(CalibrationError, match=r"_1 .*sample 2 of 2.* ONNX test data: input_1.pb"):
        arrays(tmp_path, TWO)


def test_functions(tmp_path, monkeypatch):
    assert len(arrays(lambda: iter([X, X]))) == 2
    assert len(Samples(lambda: iter([X, X]))) == 2
    (sample,) = arrays(lambda: [(X, np.array([1, 2]))], TWO)
    np.testing.assert_array_equal(sample["y"], [1, 2])
    (sample,) = arrays(lambda: [{"y": np.array([3, 4]), "x": X, "label": 1}], TWO)
    np.testing.assert_array_equal(sample["y"], [3, 4])
    (tmp_path / "mine.py").write_text(
        "import numpy\ndef data():\n    yield numpy.ones((1, 3, 4), 'f4')\n"
    )
    monkeypatch.chdir(tmp_path)
    (sample,) = arrays("mine:data")
    np.testing.assert_array_equal(sample["x"], np.ones((1, 3, 4)))


ONCE = iter([X, X])


def fails():
    yield X
    raise KeyError("lost")


def test_lists():
    first, second = arrays([{"x": X}, X + 1])
    np.testing.assert_array_equal(first["x"], X)
    np.testing.assert_array_equal(second["x"], X + 1)
    with pytest.raises(CalibrationError, match=r"sample 2 of the list: input 'x' has shape .3, 4."):
        arrays([X, X[0]])
    with pytest.raises(CalibrationError, match="no samples: the list gives none"):
        arrays([])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"z": X}, r"has no array for input 'x', only ..z..; name it so: .* in Python {'x': …}"),
        ({"x": X.astype("f8")}, "input 'x' is float64, the model takes float32; give array.astype"),
        ({"x": X * np.nan}, "input 'x' holds 12 NaN or Inf; repair the sample, or leave it out"),
    ],
)
def test_what_is_wrong_in_memory_does_not_speak_of_files(bad, message):
    with pytest.raises(CalibrationError, match=f"^sample 2 of the list:? {message}") as caught:
        arrays([{"x": X}, bad])
    assert "the file" not in str(caught.value)


def test_lists_of_paths(tmp_path):
    np.savez(tmp_path / "a.npz", x=X)
    np.save(tmp_path / "b.npy", X + 1)
    first, second, third = arrays([tmp_path / "a.npz", str(tmp_path / "b.npy"), {"x": X + 2}])
    assert [s["x"][0, 0, 0] for s in (first, second, third)] == [0, 1, 2]
    np.savez(tmp_path / "z.npz", z=X)
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "i.png").write_bytes(b"not looked at")
    for name, message in [
        ("none.npz", r": no samples: .*none.npz does not exist"),
        ("z.npz", r" has no array for input 'x', only ..z"),
        ("text.npz", r" is not an .npz of plain arrays: it holds pickled objects"),
        ("i.png", r" is no .npz or .npy file: a folder, or images, are a source of their own"),
        ("", r" is no .npz or .npy file: a folder"),
    ]:
        with pytest.raises(CalibrationError) as caught:
            arrays([tmp_path / "a.npz", tmp_path / name])
        said = str(caught.value)
        assert said.startswith(f"{tmp_path / name} (sample 2 of the list)")
        assert re.search(message, said), said


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails, "fails fails: KeyError: 'lost'"),
        (lambda: 3, "returns a int: let it return a list of samples, or yield"),
        (lambda: {"x": X}, "returns a dict: let it return a list"),
        (lambda: "batch.npz", "returns a str: let it return a list"),
        (lambda: [], "no samples: .* gives none"),
        (lambda: ONCE, "gave 2 samples at first and 0 when it was asked again"),
        (lambda: sys.exit(3), "fails: SystemExit: 3"),
        (lambda: "/a/path", "returns a str: let it return a list of samples"),
        (lambda: [{"x": {}}], "sample 1 of .*: 'x' is no array; give a dictionary"),
        (lambda: [(X, X, X)], "has 3 arrays without names, the model takes ..x.."),
        (lambda: [{"z": X}], "sample 1 of .* has no array for input 'x', only ..z"),
    ],
)
def test_bad_functions(function, message):
    with pytest.raises(CalibrationError, match=message):
        arrays(function)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:data", "no_such_module:data: cannot import no_such_module"),
        ("json:data", "json has no function 'data'"),
        ("json:lods", "json has no function 'lods'; did you mean 'loads'?"),
        ("json:__name__", "json has no function '__name__'"),
    ],
)
def test_functions_that_are_not_there(name, message):
    with pytest.raises(OptionError, match=message):
        Samples(name)


@pytest.mark.parametrize("source", [{"x": np.zeros(3)}, np.zeros((99, 9))])
def test_samples_themselves_are_no_source(source):
    with pytest.raises(OptionError, match="samples must be a path, a function or a list") as caught:
        Samples(source)
    assert len(str(caught.value)) < 150


def test_compiling_with_a_function(tmp_path):
    rng = np.random.default_rng(0)
    text = "g (float[n,2,8,8] x) => (float[n,4,6,6] y) { c = Conv (x, w) r = Relu (c) y = Neg (r) }"
    model = model_of(text, {"w": rng.standard_normal((4, 2, 3, 3), dtype=np.float32)})
    images = [rng.standard_normal((1, 2, 8, 8), dtype=np.float32) for _ in range(3)]
    report = qcompiler.compile(model, "arm-int8", tmp_path / "b", calibration=lambda: images)
    assert report.count("qdq") > 0
    assert not report.notes


def test_what_a_function_may_return():
    class Indexed:
        def __getitem__(self, index):
            return [X, 2 * X][index]

    for given in (Indexed(), np.stack([X, 2 * X]), (X, 2 * X), iter([X, 2 * X])):
        found = [sample["#0"] for _, sample in samples_of("f", lambda given=given: given)]
        np.testing.assert_array_equal(found, [X, 2 * X])

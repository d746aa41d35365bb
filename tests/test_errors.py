"""What bad input gets: a typed error that names the thing, the value and the way out."""

import contextlib

import numpy as np
import pytest
from conftest import CONV_W, IMAGE, samples
from golden import model_of

import qcompiler
from qcompiler.ir.errors import (
    BundleError,
    CalibrationError,
    ModelError,
    OptionError,
    QCompilerError,
    RuntimeMissingError,
)

RNG = np.random.default_rng(0)


def test_unknown_target(matmul):
    with pytest.raises(OptionError, match="unknown target 'x86-int9'; did you mean 'x86-int8'"):
        qcompiler.compile(matmul, "x86-int9")


def test_no_calibration_where_it_is_needed(conv, tmp_path):
    with pytest.raises(
        CalibrationError,
        match="needed by .*--calib DIR.*--keep-float Conv",
    ):
        qcompiler.compile(conv, "arm-int8", tmp_path / "out")
    recipe = qcompiler.Recipe(keep_float=("Conv",))
    report = qcompiler.compile(conv, "arm-int8", tmp_path / "out", recipe=recipe)
    assert "nothing was quantized" in report.warnings[0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            [{"x": IMAGE}, {"z": IMAGE}],
            r"calib/1.npz \(sample 2 of 2\) has no array for input 'x', only ..z.*savez.file, x=",
        ),
        (
            [{"x": IMAGE.astype("f8")}],
            r"0.npz .*: input 'x' is float64, the model takes float32; give array.astype",
        ),
        (
            [{"x": IMAGE[0]}],
            "0.npz .*: input 'x' has shape .2, 8, 8., the model takes .*batch dimension",
        ),
        ([{"x": IMAGE[:, :1]}], "0.npz .*: input 'x' has shape .1, 1, 8, 8., the model takes"),
        (
            [{"x": IMAGE}, {"x": IMAGE * np.nan}],
            r"1.npz \(sample 2 of 2\): input 'x' holds 128 NaN or Inf; repair the sample",
        ),
        ([{"x": np.full_like(IMAGE, 3e38)}], "0.npz .*: .* (NaN or Inf|holds)"),
        ([{"x": IMAGE[:0]}], "are empty: .* never held a value in .*calib; give some"),
    ],
)
def test_bad_samples(conv, tmp_path, arrays, message):
    folder = samples(tmp_path / "calib", *arrays)
    with pytest.raises(CalibrationError, match=message):
        qcompiler.compile(conv, "arm-int8", tmp_path / "out", calibration=folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((1, 64), np.nan, np.float32), "holds 64 NaN or Inf"),
        (np.zeros((1, 63), np.float32), "has shape .1, 63., the model takes"),
    ],
)
def test_samples_that_nothing_needs_are_checked_too(matmul, tmp_path, array, message):
    good = {"x": np.ones((1, 64), np.float32)}
    folder = samples(tmp_path / "calib", good, {"x": array})
    with pytest.raises(CalibrationError, match=rf"1.npz \(sample 2 of 2\): input 'x' {message}"):
        qcompiler.compile(matmul, "arm-int8", tmp_path / "out", calibration=folder)


@pytest.mark.parametrize("target", [None, ["x86-int8"]])
def test_a_target_that_is_no_name(matmul, target):
    with pytest.raises(OptionError, match="a target is a name, such as 'x86-int8', not "):
        qcompiler.compile(matmul, target)


def test_tensor_that_overflows_in_a_sample(tmp_path):
    model = model_of(
        "g (float[n,2,8,8] x) => (float[n,4,6,6] y) "
        "{ e = Exp (x) c = Conv (e, w) r = Relu (c) y = Neg (r) }",
        {"w": CONV_W},
    )
    folder = samples(tmp_path / "calib", {"x": IMAGE}, {"x": IMAGE + 200})
    with pytest.raises(CalibrationError, match="1.npz .*: tensor 'e' becomes NaN or Inf"):
        qcompiler.compile(model, "arm-int8", tmp_path / "out", calibration=folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "holds no .npz files, .npy files"),
        (lambda p: p.write_text("x"), "calib is no file of samples"),
        (
            lambda p: (p.mkdir(), (p / "0.npz").write_text("no zip")),
            r"0.npz \(sample 1 of 1\) is not an .npz of plain arrays: it holds .* or is damaged",
        ),
        (
            lambda p: (p.mkdir(), np.savez(p / "0.npz", x=np.array([{}], dtype=object))),
            r"0.npz \(sample 1 of 1\) is not an .npz of plain arrays: it holds pickled",
        ),
    ],
)
def test_bad_sample_folders(conv, tmp_path, make, message):
    path = tmp_path / "calib"
    make(path)
    with pytest.raises(CalibrationError, match=message):
        qcompiler.compile(conv, "arm-int8", tmp_path / "out", calibration=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep_flaot = []", "unknown key 'keep_flaot'; did you mean 'keep_float'"),
        ("keep_float = 'Conv'", "keep_float must be a list of strings, not 'Conv'"),
        ("keep_float = [1]", "keep_float must be a list of strings"),
        ("group_size = 'big'", "group_size 'big': must be 16, 32"),
        ("group_size = true", "group_size True: must be 16, 32"),
        ("attention = 'int4'", "attention 'int4': must be float32, bfloat16 or int8"),
        ("attention = ['int8']", "must be float32, bfloat16 or int8"),
        ("attention = 8", "attention 8: must be float32, bfloat16 or int8"),
        ("bfloat16 = true", "unknown key 'bfloat16'"),
        ('smooth = "no"', "smooth must be true or false, not 'no'"),
        ("group_size = 48", "group_size 48: must be 16, 32, 64, 128 or 256"),
        ("group_size =", "is not TOML"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(OptionError, match=message):
        qcompiler.Recipe.read(path)


def test_missing_recipe(tmp_path):
    with pytest.raises(
        OptionError, match="no recipe: .*none.toml does not exist; give a TOML file"
    ):
        qcompiler.Recipe.read(tmp_path / "none.toml")


def test_strict_names_what_falls_back(matmul, tmp_path):
    with pytest.raises(OptionError, match="--strict: 2 nodes fall back.*no arm-int8 kernels yet"):
        qcompiler.compile(matmul, "arm-int8", tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": {}}, "recipe must be a qcompiler.Recipe, not {}"),
        ({"pipeline": 5}, "pipeline must be a qcompiler.Pipeline or the text of one, not 5"),
        ({"shapes": "x=1"}, "shapes must be sizes by input name, .* not 'x=1'"),
        ({"shapes": {1: (1, 64)}}, "shapes: 1 is no name of an input"),
        ({"progress": 5}, "progress must be a function, not 5"),
        ({"output": 5}, "output must be a path, not 5"),
        ({"output": "a\0b"}, "output .* holds a NUL"),
        ({"output": ""}, "output is empty; give a path, or '.' for the current folder"),
        ({"output": "a" * 300}, "output a+ cannot be written: .*: File name too long"),
        ({"choices": 5}, "choices must be a path, not 5"),
        ({"calibration": {"x": np.zeros((100, 64))}}, "samples must be .* not .{,90}$"),
        ({"calibration": 5}, "samples must be a path, a function or a list, not 5"),
    ],
)
def test_bad_compile_arguments(matmul, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=message):
        qcompiler.compile(matmul, "arm-int8", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_float": 5}, "keep_float must be a list of strings, not 5"),
        ({"smooth": "no"}, "smooth must be true or false, not 'no'"),
        ({"attention": "int4"}, "attention 'int4': must be float32, bfloat16 or int8"),
        ({"calibration": "mean"}, "unknown calibration method 'mean'"),
        ({"calibration": 3}, "calibration must be a text such as 'mse', not 3"),
        ({"group_size": 32.0}, "group_size 32.0: must be 16"),
    ],
)
def test_bad_recipe_arguments(options, message):
    with pytest.raises(OptionError, match=message):
        qcompiler.Recipe(**options)


def test_attention_where_there_is_no_kernel_of_it(matmul):
    recipe = qcompiler.Recipe(attention="int8")
    with pytest.raises(OptionError, match="'int8': arm-int8 has no kernel of attention"):
        qcompiler.compile(matmul, "arm-int8", recipe=recipe)


def test_damaged_samples(conv, tmp_path):
    path = tmp_path / "calib" / "0.npz"
    path.parent.mkdir()
    np.savez_compressed(path, x=np.zeros((1, 2, 8, 8), np.float32))
    content = bytearray(path.read_bytes())
    for at in range(0, len(content), 7):
        damaged = content.copy()
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(QCompilerError):  # most are found out, by an error of ours
            qcompiler.compile(conv, "arm-int8", tmp_path / "out", calibration=path.parent)
    path.write_bytes(content[:-40])
    (path.parent / "._0.npz").write_bytes(b"left behind by a desktop")
    message = r"calib/0.npz \(sample 1 of 1\) is not an .npz of plain arrays"
    with pytest.raises(CalibrationError, match=message):
        qcompiler.compile(conv, "arm-int8", tmp_path / "out", calibration=path.parent)


def test_choices_in_a_file_that_is_no_text(matmul, tmp_path):
    with pytest.raises(OptionError, match="holds no choices that can be read") as caught:
        qcompiler.compile(matmul, "x86-int8", tmp_path / "out", choices=matmul)
    assert len(str(caught.value)) < 300


def test_errors_have_one_parent():
    for error in (BundleError, CalibrationError, ModelError, OptionError, RuntimeMissingError):
        assert issubclass(error, QCompilerError)


def test_the_same_input_gives_the_same_bytes(conv, tmp_path):
    folder = samples(tmp_path / "calib", {"x": IMAGE})
    for name in ("one", "two"):
        qcompiler.compile(conv, "arm-int8", tmp_path / name, calibration=folder)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_patterns_that_are_one_string():
    with pytest.raises(OptionError, match="keep_float must be a list of strings, not 'Conv'"):
        qcompiler.Recipe(keep_float="Conv")


def test_a_single_array_is_no_sample(conv, tmp_path):
    folder = tmp_path / "calib"
    folder.mkdir()
    np.save(folder / "a.npy", IMAGE)
    (folder / "a.npy").rename(folder / "a.npz")
    with pytest.raises(CalibrationError, match="a single array; save it with np.savez"):
        qcompiler.compile(conv, "arm-int8", tmp_path / "out", calibration=folder)

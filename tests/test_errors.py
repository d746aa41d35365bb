"""What bad input gets: a typed error that names the thing, the value and the way out."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import mlp
from golden import model_of

import qcompiler
from qcompiler.bundle import MANIFEST
from qcompiler.frontend import load_model
from qcompiler.ir.errors import (
    BundleError,
    CalibrationError,
    ModelError,
    OptionError,
    QCompilerError,
    RuntimeMissingError,
)
from qcompiler.job import Job
from qcompiler.model_file import save_model
from qcompiler.probe import Probe

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 8), dtype=np.float32)
CONV_W = RNG.standard_normal((4, 2, 3, 3), dtype=np.float32)
MATMUL = "g (float[m,64] x) => (float[m,8] y) { y = MatMul (x, w) }"
CONV = "g (float[n,2,8,8] x) => (float[n,4,6,6] y) { c = Conv (x, w) r = Relu (c) y = Neg (r) }"


@pytest.fixture
def matmul(tmp_path):
    path = tmp_path / "matmul.onnx"
    ir.save(model_of(MATMUL, {"w": W}), path)
    return path


@pytest.fixture
def conv(tmp_path):
    path = tmp_path / "conv.onnx"
    ir.save(model_of(CONV, {"w": CONV_W}), path)
    return path


@pytest.fixture
def bundle(matmul, tmp_path):
    return qcompiler.compile(matmul, "arm-int8", tmp_path / "bundle").bundle


def samples(folder, *arrays):
    folder.mkdir()
    for index, content in enumerate(arrays):
        np.savez(folder / f"{index}.npz", **content)
    return folder


IMAGE = RNG.standard_normal((1, 2, 8, 8), dtype=np.float32)


def test_unknown_target(matmul):
    with pytest.raises(OptionError, match="unknown target 'x86-int9'; did you mean 'x86-int8'"):
        qcompiler.compile(matmul, "x86-int9")


def test_missing_model(tmp_path):
    with pytest.raises(ModelError, match=r"no model: .*nowhere.onnx does not exist"):
        qcompiler.compile(tmp_path / "nowhere.onnx", "arm-int8", tmp_path / "out")


def test_folder_as_model(tmp_path):
    with pytest.raises(ModelError, match="is a folder; give the .onnx file"):
        qcompiler.compile(tmp_path, "arm-int8", tmp_path / "out")


def test_bundle_as_model(bundle, tmp_path):
    with pytest.raises(ModelError, match="is a bundle; give the model that it was compiled from"):
        qcompiler.compile(bundle, "arm-int8", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x09\x12\xff\xff\xff"])
def test_corrupt_model(tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad.onnx .*ONNX model"):
        qcompiler.compile(path, "arm-int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_model(matmul, tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(matmul.read_bytes()[:-700])
    with pytest.raises(ModelError, match=r"cut.onnx"):
        qcompiler.compile(path, "arm-int8", tmp_path / "out")


def with_external_data(folder, location):
    folder.mkdir(exist_ok=True)
    model = model_of(MATMUL, {"w": W})
    ir.save(model, folder / "m.onnx", external_data="w.bin", size_threshold_bytes=0)
    proto = onnx.load(folder / "m.onnx", load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    onnx.save(proto, folder / "m.onnx")
    return folder / "m.onnx"


def test_missing_external_data(tmp_path):
    path = with_external_data(tmp_path / "m", "w.bin")
    (tmp_path / "m" / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"external data 'w.bin' of tensor 'w' is missing"):
        qcompiler.compile(path, "arm-int8", tmp_path / "out")


def test_truncated_external_data(tmp_path):
    path = with_external_data(tmp_path / "m", "w.bin")
    (tmp_path / "m" / "w.bin").write_bytes(b"short")
    with pytest.raises(ModelError, match="truncated: tensor 'w' ends at byte 2048 of 5"):
        qcompiler.compile(path, "arm-int8", tmp_path / "out")


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "sub/../../secret.bin"])
def test_external_data_outside_the_folder(tmp_path, location):
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    path = with_external_data(tmp_path / "m", location)
    with pytest.raises(ModelError, match="lies outside the model's folder"):
        qcompiler.compile(path, "arm-int8", tmp_path / "out")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.nan, "weight 'w', which '.*' reads, holds 1 NaN: the model is damaged"),
        (np.inf, "'w' of '.*' holds 1 NaN or Inf; repair the model, or keep the node float"),
    ],
)
def test_weights_that_are_not_finite(tmp_path, bad, message):
    weight = W.copy()
    weight[0, 0] = bad
    with pytest.raises(ModelError, match=message):
        qcompiler.compile(model_of(MATMUL, {"w": weight}), "arm-int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
            r"0.npz .*: input 'x' is float64, the model takes float32; save it as array.astype",
        ),
        (
            [{"x": IMAGE[0]}],
            "0.npz .*: input 'x' has shape .2, 8, 8., the model takes .*batch dimension",
        ),
        ([{"x": IMAGE[:, :1]}], "0.npz .*: input 'x' has shape .1, 1, 8, 8., the model takes"),
        (
            [{"x": IMAGE}, {"x": IMAGE * np.nan}],
            r"1.npz \(sample 2 of 2\): input 'x' holds 128 NaN or Inf; repair or remove the file",
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
    with pytest.raises(OptionError, match="cannot read the recipe"):
        qcompiler.Recipe.read(tmp_path / "none.toml")


def test_output_that_is_something_else(matmul, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="is a file"):
        qcompiler.compile(matmul, "arm-int8", tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    with pytest.raises(OptionError, match="holds other files"):
        qcompiler.compile(matmul, "arm-int8", tmp_path / "folder")
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "mine"


def test_a_model_object_needs_an_output():
    with pytest.raises(OptionError, match="give output="):
        qcompiler.compile(model_of(MATMUL, {"w": W}), "arm-int8")


def test_something_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="cannot read a int"):
        qcompiler.compile(3, "arm-int8", tmp_path / "out")


def test_strict_names_what_falls_back(matmul, tmp_path):
    with pytest.raises(OptionError, match="--strict: 2 nodes fall back.*no arm-int8 kernels yet"):
        qcompiler.compile(matmul, "arm-int8", tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()


def test_a_failing_recompile_keeps_the_old_bundle(bundle, conv):
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(CalibrationError):
        qcompiler.compile(conv, "arm-int8", bundle)
    assert (bundle / MANIFEST).read_bytes() == before
    assert sorted(p.name for p in bundle.parent.iterdir() if p.name.startswith(".")) == []


@contextlib.contextmanager
def files_end_at(size):
    """As on a disk that is full, no file can be longer than so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_temporary_folder(conv, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = ir.load(conv)
    with (
        files_end_at(64),
        pytest.raises(OptionError, match=rf"cannot write {tmp_path}/\S*onnx\S*: File too large"),
        Probe(model, ["c"]),
    ):
        pass


@pytest.mark.parametrize(("size", "file"), [(4096, r"libqcompiler-\S*"), (2e5, None)])
def test_a_full_disk(tmp_path, monkeypatch, size, file):
    bundle = qcompiler.compile(mlp(), "x86-int8", tmp_path / "out", timing=False).bundle
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    write = Job.write

    def write_to_a_full_disk(*arguments):
        with files_end_at(int(size)):
            write(*arguments)

    monkeypatch.setattr(Job, "write", write_to_a_full_disk)
    if file is None:
        qcompiler.compile(mlp(), "x86-int8", bundle, timing=False)
    else:
        with pytest.raises(OptionError, match=rf"cannot write {bundle}/{file}: File too large"):
            qcompiler.compile(mlp(), "x86-int8", bundle, timing=False)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert list(tmp_path.iterdir()) == [bundle]


def test_a_full_disk_leaves_the_file_that_was_there(matmul, tmp_path):
    output, model = tmp_path / "out.onnx", load_model(matmul)
    output.write_text("mine")
    with files_end_at(600), pytest.raises(OptionError, match=f"cannot write {output}: "):
        save_model(model, output)
    assert output.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["matmul.onnx", "out.onnx"]
    save_model(model, output)
    load_model(output)
    with pytest.raises(OptionError, match="cannot write .*nowhere/out.onnx: No such file"):
        save_model(model, tmp_path / "nowhere/out.onnx")


def test_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest.json"):
        qcompiler.load(tmp_path)


def test_a_manifest_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(self, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(BundleError, match=r"cannot read .*manifest.json: .*; make it readable, or"):
        qcompiler.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema": 1}', '{"schema": 1, "library": 3}'])
def test_unreadable_manifest(bundle, text):
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="not a readable manifest"):
        qcompiler.load(bundle)


def edit_manifest(bundle, **changes):
    content = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(content | changes))


def test_manifest_of_another_schema(bundle):
    edit_manifest(bundle, schema=99)
    with pytest.raises(BundleError, match="has schema 99, this qcompiler reads 1"):
        qcompiler.load(bundle)


def test_an_older_onnxruntime_than_needed(bundle):
    edit_manifest(bundle, minimum_ort="9.0")
    with pytest.raises(BundleError, match=r"needs ONNX Runtime 9.0 or newer, this is"):
        qcompiler.load(bundle)


def test_altered_and_missing_files(bundle):
    model = bundle / "model.onnx"
    model.write_bytes(model.read_bytes() + b" ")
    with pytest.raises(BundleError, match="differs from the hash"):
        qcompiler.load(bundle)
    model.unlink()
    with pytest.raises(BundleError, match=r"model.onnx is missing"):
        qcompiler.load(bundle)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads must be a whole number from 1 to 1024, not 0"),
        ({"threads": "2"}, "threads must be a whole number from 1 to 1024, not '2'"),
        ({"threads": True}, "threads must be a whole number from 1 to 1024, not True"),
        ({"threads": 1 << 40}, "threads must be a whole number from 1 to 1024, not 1099511627776"),
        ({"native": "no"}, "native must be True or False, not 'no'"),
        ({"session_options": 5}, "session_options must be SessionOptions, not 5"),
        ({"providers": 5}, "providers must be a sequence of names, not 5"),
        ({"providers": [1]}, "provider 1 is neither a name nor"),
        ({"providers": [("CPUExecutionProvider", 5)]}, "is neither a name nor .name, .option"),
        ({"providers": "CPUExecutionProvider"}, "sequence of names: give .'CPUExecutionProvider'"),
        ({"providers": ["NoProvider"]}, "provider 'NoProvider' is not in this ONNX Runtime"),
    ],
)
def test_bad_load_options(bundle, options, message):
    with pytest.raises(OptionError, match=message):
        qcompiler.load(bundle, **options)


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
        ({"output": "a" * 300}, "output a+: File name too long"),
        ({"choices": 5}, "choices must be a path, not 5"),
        ({"calibration": 5}, "samples must be a path, not 5"),
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


def test_nan_in_a_weight_that_is_not_quantized(tmp_path):
    bias = np.array([0, np.nan], np.float32)
    model = model_of("g (float[n,2] x) => (float[n,2] y) { y = Add (x, b) }", {"b": bias})
    with pytest.raises(ModelError, match="weight 'b', which 'node' reads, holds 1 NaN"):
        qcompiler.compile(model, "arm-int8", tmp_path / "b")
    model = model_of("g (float[n,2] x) => (float[n,2] y) { y = Add (x, b) }", {"b": bias[1]})
    qcompiler.compile(model, "arm-int8", tmp_path / "b")  # a single one may be meant


def test_a_model_that_onnxruntime_refuses(tmp_path):
    path = tmp_path / "mismatch.onnx"
    text = "g (float[n,63] x) => (float[n,8] y) { z = Neg (x) y = MatMul (z, w) }"
    ir.save(model_of(text, {"w": W}), path)
    with pytest.raises(ModelError, match=r"mismatch\.onnx"):
        qcompiler.compile(path, "arm-int8", tmp_path / "b")


def test_a_model_that_the_checker_refuses_for_less(tmp_path):
    path = tmp_path / "mismatch.onnx"
    text = "g (float[n,63] x) => (float[n,8] y) { y = MatMul (x, w) }"
    model = model_of(text, {"w": W})
    model.graph.outputs[0].shape = None
    ir.save(model, path)
    with pytest.raises(ModelError, match="Incompatible dimensions.*Field 'shape'") as caught:
        load_model(path)
    assert str(caught.value).count(str(path)) == 1


def test_a_model_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(ModelError, match=r"pipe\.onnx is no regular file"):
        qcompiler.compile(tmp_path / "pipe.onnx", "arm-int8", tmp_path / "b")


def test_an_opset_of_the_future(tmp_path):
    model = model_of(MATMUL, {"w": W})
    model.graph.opset_imports[""] = 99
    with pytest.raises(ModelError, match=r"opset 99"):
        qcompiler.compile(model, "arm-int8", tmp_path / "b")


def test_inputs_with_defaults(tmp_path):
    model = model_of("g (float[n,2] x, float[2] b) => (float[n,2] y) { y = Add (x, b) }", {})
    default = ir.tensor(np.ones(2, np.float32), name="b")
    model.graph.inputs[1].const_value = default
    model.graph.initializers["b"] = model.graph.inputs[1]
    report = qcompiler.compile(model, "arm-int8", tmp_path / "b")
    assert report.notes[0] == "the values that inputs b have by default are constants now"


def test_a_model_that_was_compiled_before(bundle, tmp_path):
    with pytest.raises(ModelError, match=r"compiled before: node .* is qcompiler.*:Quantize"):
        qcompiler.compile(bundle / "model.onnx", "x86-int8", tmp_path / "again")


def test_a_bundle_does_not_replace_its_own_source(bundle):
    shutil.copytree(bundle, bundle.parent / "copy")
    with pytest.raises(OptionError, match=r"holds the model .*model.onnx itself; name another"):
        qcompiler.compile(bundle.parent / "copy" / "model.onnx", "arm-int8", bundle.parent / "copy")


def test_ops_of_somebody_else(tmp_path):
    model = model_of(
        "g (float[n,64] x) => (float[n,8] y) { z = MatMul (x, w) y = Neg (z) }", {"w": W}
    )
    model.graph[1].domain, model.graph[1].op_type = "my.dom", "Twice"
    model.graph.opset_imports["my.dom"] = 1
    report = qcompiler.compile(model, "arm-int8", tmp_path / "b")
    assert report.notes[0].startswith("not opened in ONNX Runtime: ops of my.dom need a library")
    assert report.count("body") > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": 5}, "tools is no object"),
        ({"recipe": None}, "recipe is no object"),
        ({"minimum_ort": "²"}, "minimum_ort '²' is no version"),
        ({"files": {}}, "it has no hash of model.onnx"),
    ],
)
def test_altered_manifests(bundle, change, message):
    manifest = bundle / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        qcompiler.load(bundle)
    manifest.write_text("[" * 100_000)
    with pytest.raises(BundleError, match="is not a readable manifest"):
        qcompiler.load(bundle)


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


def test_no_onnxruntime(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissingError, match=r"pip install 'qcompiler\[cpu\]'"):
        qcompiler.load(bundle)


def test_two_onnxruntimes(bundle, monkeypatch):
    monkeypatch.setattr("qcompiler.installed._is_installed", lambda package: True)
    message = "onnxruntime and onnxruntime-gpu and .* pip uninstall onnxruntime onnxruntime-gpu"
    with pytest.raises(RuntimeMissingError, match=message):
        qcompiler.load(bundle)


def test_errors_have_one_parent():
    for error in (BundleError, CalibrationError, ModelError, OptionError, RuntimeMissingError):
        assert issubclass(error, QCompilerError)


def test_loading_imports_neither_compiler_nor_torch(bundle):
    script = (
        "import sys, qcompiler\n"
        f"session = qcompiler.load({str(bundle)!r})\n"
        "heavy = {'tvm', 'torch', 'onnx', 'onnx_ir', 'onnxscript'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_same_input_gives_the_same_bytes(conv, tmp_path):
    folder = samples(tmp_path / "calib", {"x": IMAGE})
    for name in ("one", "two"):
        qcompiler.compile(conv, "arm-int8", tmp_path / name, calibration=folder)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_a_bundle_can_be_replaced_and_moved(matmul, bundle, tmp_path):
    session = qcompiler.load(bundle)
    feeds = {"x": RNG.standard_normal((2, 64), dtype=np.float32)}
    before = session.run(None, feeds)[0]
    qcompiler.compile(matmul, "arm-int8", bundle)
    np.testing.assert_array_equal(session.run(None, feeds)[0], before)
    shutil.move(bundle, tmp_path / "elsewhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = qcompiler.load(tmp_path / "elsewhere")
    np.testing.assert_array_equal(moved.run(None, feeds)[0], before)


def test_output_that_is_the_current_folder(matmul, tmp_path, monkeypatch):
    inside = tmp_path / "here"
    inside.mkdir()
    monkeypatch.chdir(inside)
    for output in (".", inside, tmp_path):
        with pytest.raises(OptionError, match="is the current folder"):
            qcompiler.compile(matmul, "arm-int8", output)


def test_an_exchange_that_fails_keeps_the_old_bundle(bundle, matmul, monkeypatch):
    before = (bundle / MANIFEST).read_bytes()
    rename = os.rename

    def failing(source, destination):
        if Path(destination) == bundle.resolve() and failing.armed:
            failing.armed = False
            raise OSError(5, "Input/output error")
        rename(source, destination)

    failing.armed = True
    monkeypatch.setattr("os.rename", failing)
    with pytest.raises(OptionError, match="cannot replace .*: Input/output error"):
        qcompiler.compile(matmul, "arm-int8", bundle)
    assert (bundle / MANIFEST).read_bytes() == before
    assert [p.name for p in bundle.parent.iterdir() if p.name.startswith(".")] == []


def test_a_link_to_a_bundle_is_followed(bundle, matmul, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(bundle)
    qcompiler.compile(matmul, "arm-int8", link)
    assert link.is_symlink()
    qcompiler.load(link)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": ["model.onnx"]},
        {"files": None},
        {"files": {"../model.onnx": "0"}},
        {"minimum_ort": 5},
        {"minimum_ort": "abc"},
        {"target": 3},
        {"surprise": 1},
    ],
)
def test_a_manifest_of_wrong_types(bundle, changes):
    edit_manifest(bundle, **changes)
    with pytest.raises(BundleError, match="not a readable manifest"):
        qcompiler.load(bundle)


def test_symbolic_links_as_in_a_hub_cache(tmp_path):
    path = with_external_data(tmp_path / "blobs", "w.bin")
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "m.onnx").symlink_to(path)
    (hub / "w.bin").symlink_to(path.parent / "w.bin")
    with pytest.raises(ModelError, match="symbolic link.*cp -rL"):
        qcompiler.compile(hub / "m.onnx", "arm-int8", tmp_path / "out")


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


@pytest.mark.parametrize("ir_version", [4, 8, 13])
def test_the_ir_version_shuts_nobody_out(matmul, tmp_path, ir_version):
    proto = onnx.load(matmul)
    proto.ir_version = ir_version
    onnx.save(proto, matmul)
    report = qcompiler.compile(matmul, "arm-int8", tmp_path / "out")
    assert onnx.load(report.bundle / "model.onnx").ir_version == 10

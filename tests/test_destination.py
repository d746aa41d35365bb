"""Where results go: what may not be written is said at once, what fails leaves all as it was."""

import contextlib
import os
import resource
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import MATMUL, W, mlp
from golden import model_of

import qcompiler
from qcompiler.bundle import MANIFEST
from qcompiler.frontend import load_model
from qcompiler.ir.errors import (
    CalibrationError,
    OptionError,
)
from qcompiler.job import Job
from qcompiler.model_file import save_model
from qcompiler.probe import Probe
from qcompiler.watch import DumpModels

RNG = np.random.default_rng(0)


def test_output_that_is_something_else(matmul, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="is a file"):
        qcompiler.compile(matmul, "arm-int8", tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    with pytest.raises(OptionError, match="holds other files"):
        qcompiler.compile(matmul, "arm-int8", tmp_path / "folder")
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "mine"


def test_output_that_is_the_current_folder(matmul, tmp_path, monkeypatch):
    inside = tmp_path / "here"
    inside.mkdir()
    monkeypatch.chdir(inside)
    for output in (".", inside, tmp_path):
        with pytest.raises(OptionError, match="is the current folder"):
            qcompiler.compile(matmul, "arm-int8", output)


def test_a_model_object_needs_an_output():
    with pytest.raises(OptionError, match="give output="):
        qcompiler.compile(model_of(MATMUL, {"w": W}), "arm-int8")


def test_a_bundle_does_not_replace_its_own_source(bundle):
    shutil.copytree(bundle, bundle.parent / "copy")
    with pytest.raises(OptionError, match=r"holds the model .*model.onnx itself; name another"):
        qcompiler.compile(bundle.parent / "copy" / "model.onnx", "arm-int8", bundle.parent / "copy")


def test_weights_of_the_model_are_not_replaced(tmp_path):
    source = tmp_path / "old.onnx"
    ir.save(model_of(MATMUL, {"w": W}), source, external_data="model.onnx.data")
    before = (tmp_path / "model.onnx.data").read_bytes()
    for output in ("model.onnx", "model.onnx.data"):
        with pytest.raises(OptionError, match=r"model.onnx.data holds weights of .*old.onnx"):
            qcompiler.compile(source, "arm-int8", tmp_path / output, stop_after="float")
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(OptionError, match="holds weights of"):
        qcompiler.compile(source, "arm-int8", tmp_path / "model.onnx", stop_after="float")
    assert (tmp_path / "model.onnx.data").read_bytes() == before


def test_weights_of_nobody_are_not_replaced(matmul, tmp_path):
    (tmp_path / "o.onnx.data").write_text("mine")
    with pytest.raises(OptionError, match=r"o.onnx.data is there, and weights of .*o.onnx would"):
        qcompiler.compile(matmul, "arm-int8", tmp_path / "o.onnx", stop_after="float")
    (tmp_path / "o.onnx").write_bytes(b"")
    qcompiler.compile(matmul, "arm-int8", tmp_path / "o.onnx", stop_after="float")


def test_a_failing_recompile_keeps_the_old_bundle(bundle, conv):
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(CalibrationError):
        qcompiler.compile(conv, "arm-int8", bundle)
    assert (bundle / MANIFEST).read_bytes() == before
    assert sorted(p.name for p in bundle.parent.iterdir() if p.name.startswith(".")) == []


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


def test_a_way_that_leads_back(matmul, tmp_path, monkeypatch):
    """Through a folder that is not there; the system would not find what was written."""
    monkeypatch.chdir(tmp_path)
    report = qcompiler.compile(matmul, "arm-int8", "nowhere/../out")
    assert report.bundle == tmp_path / "out" and report.bytes_after > 0
    assert qcompiler.load(report.bundle)
    file = qcompiler.compile(matmul, "arm-int8", "nowhere/../q.onnx", stop_after="qdq").bundle
    assert file == tmp_path / "q.onnx" and file.is_file()
    assert not Path("nowhere").exists()


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
    with pytest.raises(OptionError, match="cannot write .*out.onnx/below.onnx: File exists"):
        save_model(model, output / "below.onnx")


def refuse_passes(*_, **__):
    raise AssertionError("work was begun for what cannot be written")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"output": "file/out"},
            "output file/out cannot be written: .*/file: Not a directory; name",
        ),
        (
            {"output": "/proc/a/out"},
            "output /proc/a/out cannot be written: /proc: nothing can be made in it; name another",
        ),
        (
            {"output": "file/y.onnx", "stop_after": "qdq"},
            "output file/y.onnx cannot be written: .*",
        ),
        (
            {"output": "b" * 240},
            "output b+ cannot be written: .*: File name too long; name another",
        ),
        (
            {"watchers": [DumpModels("file/d")]},
            "the folder file/d for dumps cannot be written: .*/file",
        ),
        (
            {"watchers": [DumpModels("file")]},
            "the folder file for dumps cannot be written: .*/file",
        ),
    ],
)
def test_what_cannot_be_written_is_found_first(matmul, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Job, "run_passes", refuse_passes)
    Path("file").write_text("mine")
    with pytest.raises(OptionError, match=message):
        qcompiler.compile(matmul, "arm-int8", **{"output": "out"} | options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "matmul.onnx"]


@pytest.mark.parametrize("name", ["pipe", "pipe.link"])
def test_a_device_is_not_replaced(matmul, tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipe.link").symlink_to("pipe")
    message = f"output .*{name} is no regular file; name another file"
    with pytest.raises(OptionError, match=message):
        qcompiler.compile(matmul, "arm-int8", tmp_path / name, stop_after="qdq")
    with pytest.raises(OptionError, match=f"output .*{name} is a file; name a folder"):
        qcompiler.compile(matmul, "arm-int8", tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()


def test_folders_that_are_not_there_are_made(matmul, tmp_path):
    qcompiler.compile(matmul, "arm-int8", tmp_path / "a" / "b" / "out")
    file = tmp_path / "c" / "d" / "q.onnx"
    assert qcompiler.compile(matmul, "arm-int8", file, stop_after="qdq").bundle == file
    load_model(file)

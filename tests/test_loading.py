"""What a damaged bundle, or a machine that cannot run it, gets from `qcompiler.load`."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qcompiler
from qcompiler.bundle import MANIFEST
from qcompiler.ir.errors import (
    BundleError,
    OptionError,
    RuntimeMissingError,
)

RNG = np.random.default_rng(0)


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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name.*"),
        ("[]", "it is no object"),
        ("{}", "it does not say of which schema it is"),
        ('{"schema": "1"}', "its schema is '1', which is no whole number"),
        ('{"schema": 1}', "'library' is missing"),
        ('{"schema": 1, "library": 3}', ".*"),
    ],
)
def test_unreadable_manifest(bundle, text, reason):
    (bundle / MANIFEST).write_text(text)
    message = rf"not a readable manifest \({reason}\); compile the bundle again"
    with pytest.raises(BundleError, match=message):
        qcompiler.load(bundle)


def edit_manifest(bundle, **changes):
    content = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(content | changes))


def test_manifest_of_another_schema(bundle):
    edit_manifest(bundle, schema=99)
    with pytest.raises(BundleError, match="has schema 99, this qcompiler reads 1"):
        qcompiler.load(bundle)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": ["model.onnx"]},
        {"files": None},
        {"files": {"../model.onnx": "0"}},
        {"minimum_ort": 5},
        {"minimum_ort": "abc"},
        {"target": 3},
        {"target": "nope"},
        {"surprise": 1},
    ],
)
def test_a_manifest_of_wrong_types(bundle, changes):
    edit_manifest(bundle, **changes)
    with pytest.raises(BundleError, match="not a readable manifest"):
        qcompiler.load(bundle)


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


def test_no_onnxruntime(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissingError, match=r"pip install 'qcompiler\[cpu\]'"):
        qcompiler.load(bundle)


def test_two_onnxruntimes(bundle, monkeypatch):
    monkeypatch.setattr("qcompiler.installed._is_installed", lambda package: True)
    message = "onnxruntime and onnxruntime-gpu and .* pip uninstall onnxruntime onnxruntime-gpu"
    with pytest.raises(RuntimeMissingError, match=message):
        qcompiler.load(bundle)


def test_loading_imports_neither_compiler_nor_torch(bundle, digits):
    """Of a bundle with a library and of one without."""
    script = (
        "import sys, qcompiler\n"
        f"for bundle in {[str(bundle), str(digits.bundle)]}:\n"
        "    qcompiler.load(bundle)\n"
        "heavy = {'tvm', 'torch', 'onnx', 'onnx_ir', 'onnxscript'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

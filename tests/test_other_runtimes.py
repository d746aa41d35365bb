"""Bundles in the oldest ONNX Runtime that they allow, and from C."""

import os
import shutil
import subprocess
import sys

import c_host
import numpy as np
import onnx
import pytest
from golden import sqnr
from instruction_sets import needs_kernels
from mlp_bundles import X, compiled, library_of, without_bodies
from registry import package

import qcompiler

pytestmark = needs_kernels
RNG = np.random.default_rng(1)


def test_in_the_oldest_onnxruntime(digits, tmp_path):
    """It runs the same bundle, and with its kernels: a model without bodies opens."""
    runtime, bundle = package(f"onnxruntime=={c_host.OLDEST}"), tmp_path / "b"
    shutil.copytree(digits.bundle, bundle)
    onnx.save(without_bodies(bundle), bundle / "bare.onnx")
    script = (
        "import sys, pathlib, numpy as np, onnxruntime, qcompiler\n"
        "bundle, x, y, version = sys.argv[1:]\n"
        "assert onnxruntime.__version__ == version, onnxruntime.__file__\n"
        "options = onnxruntime.SessionOptions()\n"
        "qcompiler.load(bundle, session_options=options)\n"
        "sessions = [qcompiler.load(bundle), qcompiler.load(bundle, native=False),\n"
        "            onnxruntime.InferenceSession(pathlib.Path(bundle, 'bare.onnx'), options)]\n"
        "image = {'image': np.load(x)}\n"
        "np.save(y, [session.run(None, image)[0] for session in sessions])\n"
    )
    image = RNG.random((3, 1, 20, 20), dtype=np.float32)
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(x, image)
    command = [sys.executable, "-c", script, bundle, x, y, c_host.OLDEST]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(runtime)})
    native, bodies, bare = np.load(y)
    np.testing.assert_array_equal(native, bare)
    for got, options in ((native, {}), (bodies, {"native": False})):
        assert sqnr(qcompiler.load(bundle, **options).run(None, {"image": image})[0], got) > 60


@pytest.mark.parametrize("version", c_host.VERSIONS)
def test_from_c(tmp_path, version):
    bundle = compiled(tmp_path / "b")
    y = c_host.run(version, library_of(bundle), bundle / "model.onnx", X["x"], 64, tmp_path)
    assert sqnr(qcompiler.load(bundle).run(None, X)[0], y) > 60
    onnx.save(without_bodies(bundle), bundle / "bare.onnx")
    bare = c_host.run(version, library_of(bundle), bundle / "bare.onnx", X["x"], 64, tmp_path)
    np.testing.assert_array_equal(y, bare)

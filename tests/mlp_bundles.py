"""Bundles of two layers for x86-int8, their libraries, and their models without bodies."""

import numpy as np
import onnx
from conftest import mlp

import qcompiler
from qcompiler.bundle import Manifest

X = {"x": np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)}


def compiled(folder, seed=0, **sizes):
    return qcompiler.compile(mlp(seed, **sizes), "x86-int8", folder).bundle


def library_of(bundle):
    return bundle / Manifest.read(bundle).library.file


def without_bodies(bundle, prefix=""):
    """The model of a bundle, with nothing to run where a kernel is missing."""
    model = onnx.load(bundle / "model.onnx")
    assert model.functions
    model.ClearField("functions")
    return onnx.compose.add_prefix(model, prefix)

"""Models as text of any opset, and what canonicalizing must keep of them."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import numpy_helper, parser

from qcompiler.frontend import load_model
from qcompiler.model_file import save_model
from qcompiler.passes.canonicalize import OPSET, Canonicalize
from qcompiler.session_options import new_session_options


def normals():
    """Draws arrays; each file its own, or a test would draw what tests before it leave."""
    rng = np.random.default_rng(0)
    return lambda *shape: rng.standard_normal(shape).astype(np.float32)


def proto_of(opset, text, weights=None, *, ir_version=8, imports=""):
    proto = parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["" : {opset}{imports}]> {text}'
    )
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return proto


def run(proto, feeds):
    options = new_session_options()
    options.log_severity_level = 4
    source = proto if isinstance(proto, Path) else proto.SerializeToString()
    return ort.InferenceSession(source, options).run(None, feeds)


def assert_survives(proto, feeds, folder):
    """Load, canonicalize, save, run: the same results.  Returns the saved model."""
    onnx.save(proto, folder / "model.onnx")
    model = Canonicalize()(load_model(folder / "model.onnx")).model
    assert model.graph.opset_imports[""] >= OPSET
    save_model(model, folder / "canonical.onnx")
    for got, want in zip(run(folder / "canonical.onnx", feeds), run(proto, feeds), strict=True):
        if isinstance(want, np.ndarray) and want.dtype.kind == "f":
            # ORT's kernels of two opsets may round differently, by a unit in the last place.
            np.testing.assert_allclose(got, want, rtol=3e-7, atol=1e-7)
        else:
            np.testing.assert_equal(got, want)
    return ir.load(folder / "canonical.onnx")


X = normals()(2, 3, 4)
UP = np.array([1, 1, 2, 2], np.float32)

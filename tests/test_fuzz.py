"""Malformed bytes: a QCompilerError and nothing written, or a bundle that runs."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import mlp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qcompiler


def old_model() -> onnx.ModelProto:
    """Opset 11, a sparse weight, bodies that read it."""
    proto = onnx.parser.parse_model(
        '<ir_version: 6, opset_import: ["" : 11]> g (float[m,8] x, bool c) => (float[m,8] y) '
        "{ y = If (c) <then_branch = a () => (float[m,8] p) { q = MatMul (x, w) "
        "p = Clip (q, low) }, else_branch = b () => (float[m,8] r) "
        "{ s = Unsqueeze <axes = [0]> (x) t = Squeeze <axes = [0]> (s) r = MatMul (t, w) }> }"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "low"))
    values = onnx.numpy_helper.from_array(np.ones(8, np.float32), "w")
    indices = onnx.numpy_helper.from_array(np.arange(0, 64, 9), "indices")
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [8, 8]))
    return proto


@pytest.fixture(scope="module", params=["new", "old"])
def original(request) -> bytes:
    proto = old_model() if request.param == "old" else ir.to_proto(mlp(depth=8, width=8))
    return proto.SerializeToString()


edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["flip", "drop", "insert", "cut"]),
              st.binary(min_size=1, max_size=6)),
    min_size=1, max_size=4,
)  # fmt: skip


def mutate(data: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    for where, how, extra in changes:
        at = int(where * len(data))
        if how == "flip":
            data = data[:at] + extra + data[at + len(extra) :]
        elif how == "drop":
            data = data[:at] + data[at + len(extra) :]
        elif how == "insert":
            data = data[:at] + extra + data[at:]
        else:
            data = data[:at]
    return data


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(edits)
def test_mutated_models(original, changes):
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "m.onnx", Path(folder) / "out"
        path.write_bytes(mutate(original, changes))
        try:
            report = qcompiler.compile(path, "arm-int8", output)
        except qcompiler.QCompilerError:
            assert [p.name for p in Path(folder).iterdir()] == ["m.onnx"]
        else:
            qcompiler.load(report.bundle)

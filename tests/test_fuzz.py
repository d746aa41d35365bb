"""Malformed bytes: a QCompilerError and nothing written, or a bundle that runs."""

import tempfile
from pathlib import Path

import onnx_ir as ir
import pytest
from conftest import mlp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qcompiler


@pytest.fixture(scope="module")
def original() -> bytes:
    return ir.to_proto(mlp(depth=8, width=8)).SerializeToString()


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
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
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

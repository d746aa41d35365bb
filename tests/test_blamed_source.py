"""Types that do not go together, which nothing says of a source before they are inferred."""

import numpy as np
import onnx_ir as ir
import pytest
from conftest import W
from golden import model_of
from terminal import ARM, fails

import qcompiler
from qcompiler.frontend import source_is_blamed
from qcompiler.ir.errors import ModelError, VerifyError
from qcompiler.ir.onnx_rules import onnx_problems

SAID = r"is not a valid ONNX model: .*\(MatMul\) bound to different types .*node_1"


@pytest.fixture
def mixed(tmp_path):
    """A file whose float x goes through an op of which no type is stored, to a double weight."""
    model = model_of(
        "g (float[n,64] x) => (float[n,8] y) { z = Neg (x) m = MatMul (z, w) y = Neg (m) }",
        {"w": W.astype(np.float64)},
    )
    for node in list(model.graph)[:2]:
        node.outputs[0].type = None
    assert not list(onnx_problems(model))
    path = tmp_path / "mixed.onnx"
    ir.save(model, path)
    return path


def test_the_source_is_to_blame_and_no_pass(mixed, tmp_path):
    with pytest.raises(ModelError, match=SAID):
        qcompiler.compile(mixed, "arm-int8", tmp_path / "bundle")
    with pytest.raises(ModelError, match=f"the model {SAID}"):
        qcompiler.compile(ir.load(mixed), "arm-int8", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_on_the_command_line(mixed, tmp_path):
    words = "(MatMul) bound to different types"
    fails(1, words, str(mixed), *ARM, "-o", str(tmp_path / "out"))
    fails(1, words, "pass", "canonicalize", str(mixed), str(tmp_path / "out.onnx"))


@pytest.mark.parametrize("foreign", [True, False])
def test_a_pass_is_to_blame_where_the_source_opens_or_nobody_can_tell(mixed, matmul, foreign):
    with pytest.raises(VerifyError), source_is_blamed(mixed if foreign else matmul, foreign):
        raise VerifyError("after some-pass: …")

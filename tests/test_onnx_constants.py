"""Constants as files hold them: inputs, sparse, shared, in other files, in nodes of every form."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from opset_models import UP, X, assert_survives, normals, proto_of

import qcompiler
from qcompiler.frontend import load_model
from qcompiler.ir.errors import ModelError
from qcompiler.passes.canonicalize import Canonicalize

normal = normals()


def test_old_ir_lists_weights_as_inputs(tmp_path):
    text = "g (float[2,4] x, float[4,3] w, float[3] c) => (float[2,3] y) { y = Gemm (x, w, c) }"
    proto = proto_of(7, text, {"w": normal(4, 3), "c": normal(3)}, ir_version=3)
    saved = assert_survives(proto, {"x": normal(2, 4)}, tmp_path)
    assert [value.name for value in saved.graph.inputs] == ["x"]
    assert [node.op_type for node in saved.graph] == ["MatMul", "Add"]


def test_a_shared_weight_stays_shared(tmp_path):
    text = "g (float[m,16] x) => (float[m,16] y) { p = MatMul (x, w) y = MatMul (p, w) }"
    proto = proto_of(21, text, {"w": normal(16, 16)}, ir_version=10)
    onnx.save(proto, tmp_path / "m.onnx")
    report = qcompiler.compile(tmp_path / "m.onnx", "arm-int8", tmp_path / "b")
    stored = ir.load(report.bundle / "model.onnx").graph.initializers.values()
    assert sum(value.const_value.nbytes >= 256 for value in stored) == 1


@pytest.mark.parametrize("rank", [1, 2])
def test_sparse_initializers(rank, tmp_path):
    flat = np.array([1, 5, 10])
    indices = flat if rank == 1 else np.stack(np.unravel_index(flat, (4, 3)), axis=1)
    proto = proto_of(13, "g (float[2,4] x) => (float[2,3] y) { y = MatMul (x, w) }")
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(np.array([1, 2, 3], np.float32), "w"),
            numpy_helper.from_array(indices, "i"),
            [4, 3],
        )
    )
    assert_survives(proto, {"x": normal(2, 4)}, tmp_path)


def test_a_sparse_constant(tmp_path):
    proto = proto_of(13, "g (float[2,4] x) => (float[2,4] y) { y = Add (x, c) }")
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("v", TensorProto.FLOAT, [2], [1.5, -2]),
        helper.make_tensor("i", TensorProto.INT64, [2], [0, 7]),
        [2, 4],
    )
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    assert_survives(proto, {"x": normal(2, 4)}, tmp_path)


@pytest.mark.parametrize(("dims", "index"), [([1 << 20, 1 << 20], 0), ([4, 3], 12), ([4, 3], -1)])
def test_a_sparse_tensor_that_cannot_be(dims, index, tmp_path):
    proto = proto_of(13, "g (float[2,4] x) => (float[2,3] y) { y = MatMul (x, w) }")
    sparse = proto.graph.sparse_initializer.add(dims=dims)
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([index]), "i"))
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="not a readable ONNX model"):
        load_model(tmp_path / "m.onnx")


def test_constants_of_every_form(tmp_path):
    text = (
        "g (float[2,3,4] x) => (float[2,12] y) { f = Constant <value_float = 2.5> () "
        "v = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> () "
        "s = Constant <value_ints = [2, -1]> () a = Mul (x, f) b = Add (a, v) y = Reshape (b, s) }"
    )
    saved = assert_survives(proto_of(13, text), {"x": X}, tmp_path)
    assert "Constant" not in [node.op_type for node in saved.graph]


def external(proto, folder):
    """Save with every tensor, however small, in another file, and load again."""
    onnx.save(
        proto,
        folder / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    return load_model(folder / "model.onnx")


def test_canonicalizing_reads_no_weight(tmp_path):
    text = (
        "g (float[m,64] x) => (float[m,64] y) "
        "{ p = Gemm <transB = 1> (x, w, b) t = Transpose (v) y = MatMul (p, t) }"
    )
    proto = proto_of(13, text, {"w": normal(64, 64), "b": normal(64), "v": normal(64, 64)})
    model = external(proto, tmp_path)
    originals = {name: value.const_value for name, value in model.graph.initializers.items()}
    Canonicalize()(model)
    weights = [
        node.inputs[1].const_value.numpy() for node in model.graph if "MatMul" in node.op_type
    ]
    for name, weight in zip("wv", weights, strict=True):
        # Turned, but still the pages of the file.
        assert np.shares_memory(weight, originals[name].numpy())


def test_sizes_that_lie_in_another_file(tmp_path):
    text = "g (float[n,1,4,4] x) => (float[n,1,h,w] y) { y = Upsample (x, up) }"
    model = external(proto_of(9, text, {"up": UP}), tmp_path)
    Canonicalize()(model)
    assert str(model.graph.outputs[0].producer().outputs[0].shape) == "[n,1,8,8]"


def test_a_sum_of_large_files_is_not_opened(tmp_path, monkeypatch):
    proto = proto_of(21, "g (float[m,64] x) => (float[m,64] y) { y = MatMul (x, w) }",
                     {"w": normal(64, 64)}, ir_version=10)  # fmt: skip
    onnx.save(proto, tmp_path / "m.onnx")
    size = (tmp_path / "m.onnx").stat().st_size
    monkeypatch.setattr("qcompiler.job._LOAD_CHECK_LIMIT", size)
    monkeypatch.setattr("qcompiler.job.load", lambda *args, **kwargs: pytest.fail("opened"))
    qcompiler.compile(tmp_path / "m.onnx", "arm-int8", tmp_path / "b")

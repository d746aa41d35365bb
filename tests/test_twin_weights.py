"""Two weights of one name: ONNX Runtime and other readers of a model need not take the same."""

import onnx
import pytest
from conftest import W

from qcompiler.frontend import load_model
from qcompiler.ir.errors import ModelError


@pytest.mark.parametrize("inside", [False, True])
def test_two_weights_of_one_name(matmul, tmp_path, inside):
    """ONNX Runtime would multiply by one of them, and the bundle by the other."""
    proto = onnx.load(matmul)
    twin = proto.graph.initializer.add()
    twin.CopyFrom(proto.graph.initializer[0])
    path = tmp_path / "twins.onnx"
    onnx.save(proto, path)
    load_model(path)  # twice the same does no harm
    twin.CopyFrom(onnx.numpy_helper.from_array(W + 1, twin.name))
    if inside:
        body = onnx.helper.make_graph(proto.graph.node, "body", [], proto.graph.output)
        body.initializer.extend(proto.graph.initializer)
        del proto.graph.node[:], proto.graph.initializer[:]
        condition = onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
        proto.graph.input.append(condition)
        node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
        proto.graph.node.append(node)
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=r"twins.onnx is not .*: two weights that differ .* 'w'"):
        load_model(path)

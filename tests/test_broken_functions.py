"""What is wrong inside a model's own functions, or with a tensor of no type, is named."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import W
from golden import model_of

import qcompiler
from qcompiler.ir.errors import ModelError

HEAD = '<ir_version: 10, opset_import: ["" : 21, "my" : 1]>\n'
TEXT = """g (float[m,64] x) => (float[m,8] y) { a = MatMul (x, w) y = my.f (a) }
<domain: "my", opset_import: ["" : 21]> f (x) => (y) { p = Neg (x) q = Relu (p) y = Abs (q) }"""


def with_function():
    proto = ir.to_proto(model_of(TEXT, {"w": W}, head=HEAD))
    for nodes, names in (
        (proto.graph.node, ("product", "call")),
        (inside(proto), ("first", "second", "third")),
    ):
        for node, name in zip(nodes, names, strict=True):
            node.name = name
    return proto


def inside(proto):
    return proto.functions[0].node


def constant(data_type):
    node = onnx.helper.make_node("Constant", [], ["k"], name="held")
    tensor = onnx.TensorProto(data_type=data_type, dims=[1], float_data=[1.0])
    node.attribute.append(onnx.AttributeProto(name="value", type="TENSOR", t=tensor))
    return node


def give_an_attribute(proto):
    inside(proto)[1].attribute.append(onnx.helper.make_attribute("alpha", 1.0))


FAULTS = [
    (lambda p: inside(p)[1].input.__setitem__(0, "b"),
     "function 'my.f': node 'second' reads 'b', which is no input, no weight"),
    (lambda p: setattr(inside(p)[1], "op_type", "Reluu"),
     "function 'my.f': node 'second': ai.onnx 21 has no Reluu; did you mean 'Relu'"),
    (lambda p: inside(p)[1].input.append("x"),
     "function 'my.f': node 'second': Relu with 2 operands"),
    (give_an_attribute, "function 'my.f': node 'second': Relu has no attribute 'alpha'"),
    (lambda p: setattr(inside(p)[1], "domain", "other"),
     "function 'my.f': node 'second' is of the domain 'other', of which .* imports no version"),
    (lambda p: p.functions[0].ClearField("opset_import"),
     "function 'my.f': .* 'first' is of the domain 'ai.onnx', of which .* imports no version"),
    (lambda p: inside(p).append(constant(0)),
     "function 'my.f': the constant of node 'held' has no element type .data_type 0"),
    (lambda p: inside(p).append(constant(77)),
     "function 'my.f': the constant of node 'held' is of an unknown element type .77 is not a"),
    (lambda p: p.graph.node.append(constant(0)),
     "the constant of node 'held' has no element type .data_type 0.; export the model again"),
    (lambda p: setattr(p.graph.initializer[0], "data_type", 0),
     "the weight 'w' has no element type .data_type 0.; export the model again"),
    (lambda p: p.graph.node[1].input.append("x"),
     "node 'call' gives 2 operands to function 'my.f', which takes 1; export the model again"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), FAULTS)
@pytest.mark.parametrize("kind", ["file", "object"])
def test_what_is_wrong_is_named(tmp_path, kind, edit, message):
    proto, source = with_function(), tmp_path / "broken.onnx"
    edit(proto)
    if kind == "file":
        source.write_bytes(proto.SerializeToString())
    model = source if kind == "file" else ir.from_proto(proto)
    with pytest.raises(ModelError, match=message) as caught:
        qcompiler.compile(model, "arm-int8", tmp_path / "out")
    assert (str(source) in str(caught.value)) == (kind == "file")
    assert "truncated" not in str(caught.value) and "onnxruntime" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: inside(p)[1].output.__setitem__(0, "p"),
         "function 'my.f': 'p' is made twice, by Neg 'first' and by Relu 'second'"),
        (lambda p: inside(p)[1].output.__setitem__(0, "x"),
         "function 'my.f': 'x' is made twice, by an input of that name and by Relu 'second'"),
        (lambda p: p.functions[0].output.__setitem__(0, "b"),
         "function 'my.f': the output 'b' is no result of a node"),
        (lambda p: p.functions.append(p.functions[0]), "function 'my.f' is defined twice"),
    ],
)  # fmt: skip
def test_what_no_reader_takes_is_named(tmp_path, edit, message):
    proto, source = with_function(), tmp_path / "broken.onnx"
    edit(proto)
    source.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=f"broken.onnx is not a valid ONNX model: {message}"):
        qcompiler.compile(source, "arm-int8", tmp_path / "out")


def test_the_model_itself_is_whole(tmp_path):
    (tmp_path / "model.onnx").write_bytes(with_function().SerializeToString())
    report = qcompiler.compile(tmp_path / "model.onnx", "arm-int8", tmp_path / "out")
    x = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    (got,) = qcompiler.load(report.bundle, native=False).run(None, {"x": x})
    assert np.abs(got - np.maximum(-(x @ W), 0)).max() < 0.2

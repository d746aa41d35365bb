"""What a model that is broken, or none, gets: an error that names the tensor, node or file."""

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import MATMUL, W
from golden import model_of

import qcompiler
from qcompiler.frontend import load_model
from qcompiler.ir.errors import ModelError, OptionError

RNG = np.random.default_rng(0)


def test_missing_model(tmp_path):
    with pytest.raises(ModelError, match=r"no model: .*nowhere.onnx does not exist"):
        qcompiler.compile(tmp_path / "nowhere.onnx", "arm-int8", tmp_path / "out")


def test_folder_as_model(tmp_path):
    with pytest.raises(ModelError, match="is a folder; give the .onnx file"):
        qcompiler.compile(tmp_path, "arm-int8", tmp_path / "out")


def test_bundle_as_model(bundle, tmp_path):
    for source in (bundle, bundle / "manifest.json"):
        with pytest.raises(ModelError, match="is a bundle; give the model that it was compiled"):
            qcompiler.compile(source, "arm-int8", tmp_path / "out")


def test_maps_are_said_to_be_the_problem(tmp_path):
    """What scikit-learn's classifiers are exported with, if nobody asks for tensors."""
    tensor = onnx.helper.make_tensor_value_info("x", 1, ["n", 2])
    entry = onnx.helper.make_map_type_proto(7, onnx.helper.make_tensor_type_proto(1, []))
    maps = onnx.helper.make_value_info("p", onnx.helper.make_sequence_type_proto(entry))
    zip_map = onnx.helper.make_node(
        "ZipMap", ["x"], ["p"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]
    )
    graph = onnx.helper.make_graph([zip_map], "g", [tensor], [maps])
    path = tmp_path / "classifier.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    with pytest.raises(ModelError, match=r"'p' holds maps .*: export .* \(zipmap=False\)"):
        qcompiler.compile(path, "x86-int8", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x09\x12\xff\xff\xff"])
def test_corrupt_model(tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad.onnx .*ONNX model"):
        qcompiler.compile(path, "arm-int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_model(matmul, tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(matmul.read_bytes()[:-700])
    with pytest.raises(ModelError, match=r"cut.onnx"):
        qcompiler.compile(path, "arm-int8", tmp_path / "out")


def with_external_data(folder, location):
    folder.mkdir(exist_ok=True)
    model = model_of(MATMUL, {"w": W})
    ir.save(model, folder / "m.onnx", external_data="w.bin", size_threshold_bytes=0)
    proto = onnx.load(folder / "m.onnx", load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    onnx.save(proto, folder / "m.onnx")
    return folder / "m.onnx"


def test_missing_external_data(tmp_path):
    path = with_external_data(tmp_path / "m", "w.bin")
    (tmp_path / "m" / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"external data 'w.bin' of tensor 'w' is missing"):
        qcompiler.compile(path, "arm-int8", tmp_path / "out")


def test_truncated_external_data(tmp_path):
    path = with_external_data(tmp_path / "m", "w.bin")
    (tmp_path / "m" / "w.bin").write_bytes(b"short")
    with pytest.raises(ModelError, match="truncated: tensor 'w' ends at byte 2048 of 5"):
        qcompiler.compile(path, "arm-int8", tmp_path / "out")


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "sub/../../secret.bin"])
def test_external_data_outside_the_folder(tmp_path, location):
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    path = with_external_data(tmp_path / "m", location)
    with pytest.raises(ModelError, match="lies outside the model's folder"):
        qcompiler.compile(path, "arm-int8", tmp_path / "out")


def test_symbolic_links_as_in_a_hub_cache(tmp_path):
    path = with_external_data(tmp_path / "blobs", "w.bin")
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "m.onnx").symlink_to(path)
    (hub / "w.bin").symlink_to(path.parent / "w.bin")
    with pytest.raises(ModelError, match="symbolic link.*cp -rL"):
        qcompiler.compile(hub / "m.onnx", "arm-int8", tmp_path / "out")


@pytest.mark.parametrize("output", [None, "out"])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no model was given: give a path, an onnx_ir.Model"),
        (3, "cannot read a int: give a"),
        ("d\0.onnx", "holds a NUL, which no path may"),
    ],
)
def test_something_that_is_no_model(source, output, message):
    with pytest.raises((ModelError, OptionError), match=message):
        qcompiler.compile(source, "arm-int8", output)


def test_a_model_that_onnxruntime_refuses(tmp_path):
    path = tmp_path / "mismatch.onnx"
    text = "g (float[n,63] x) => (float[n,8] y) { z = Neg (x) y = MatMul (z, w) }"
    ir.save(model_of(text, {"w": W}), path)
    with pytest.raises(ModelError, match=r"node_1: MatMul of \[\?, 63\] and \[64, 8\]: Incompat"):
        qcompiler.compile(path, "arm-int8", tmp_path / "b")


def test_a_model_that_the_checker_refuses_for_less(tmp_path):
    path = tmp_path / "mismatch.onnx"
    text = "g (float[n,63] x) => (float[n,8] y) { y = MatMul (x, w) }"
    model = model_of(text, {"w": W})
    model.graph.outputs[0].shape = None
    ir.save(model, path)
    with pytest.raises(ModelError, match="Incompatible dimensions.*Field 'shape'") as caught:
        load_model(path)
    assert str(caught.value).count(str(path)) == 1


def test_a_model_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(ModelError, match=r"pipe\.onnx is no regular file"):
        qcompiler.compile(tmp_path / "pipe.onnx", "arm-int8", tmp_path / "b")


def test_a_path_that_is_no_text(matmul, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    shutil.copy(matmul, folder / "m.onnx")
    with pytest.raises(
        OptionError, match=r"model '.*m.onnx' has bytes that are no UTF-8, .*rename"
    ):
        qcompiler.compile(folder / "m.onnx", "arm-int8", tmp_path / "out")
    with pytest.raises(OptionError, match="output '.*' has bytes that are no UTF-8"):
        qcompiler.compile(matmul, "arm-int8", folder / "out")
    bundle = qcompiler.compile(matmul, "arm-int8", tmp_path / "out").bundle
    shutil.copytree(bundle, folder / "b")
    with pytest.raises(OptionError, match="model '.*model.onnx' has bytes that are no UTF-8"):
        qcompiler.load(folder / "b")


def test_an_opset_of_the_future(tmp_path):
    model = model_of(MATMUL, {"w": W})
    model.graph.opset_imports[""] = 99
    with pytest.raises(ModelError, match=r"opset 99"):
        qcompiler.compile(model, "arm-int8", tmp_path / "b")


@pytest.mark.parametrize("opset", [-1, 0, 1, 6])
def test_an_opset_before_onnxruntime(tmp_path, opset):
    text = MATMUL.replace("MatMul (x, w)", "Add (x, x)") if opset > 0 else MATMUL
    model = model_of(text, {"w": W}, head=f'<ir_version: 3, opset_import: ["" : {opset}]>\n')
    with pytest.raises(ModelError, match=rf"opset {opset}, .* below 7.*convert_version.model, 7"):
        qcompiler.compile(model, "arm-int8", tmp_path / "b")


def test_ops_that_are_older_than_onnxruntime_and_did_not_change(tmp_path):
    model = model_of(MATMUL, {"w": W}, head='<ir_version: 3, opset_import: ["" : 6]>\n')
    assert qcompiler.compile(model, "arm-int8", tmp_path / "b").bundle.is_dir()


def test_inputs_with_defaults(tmp_path):
    model = model_of("g (float[n,2] x, float[2] b) => (float[n,2] y) { y = Add (x, b) }", {})
    default = ir.tensor(np.ones(2, np.float32), name="b")
    model.graph.inputs[1].const_value = default
    model.graph.initializers["b"] = model.graph.inputs[1]
    report = qcompiler.compile(model, "arm-int8", tmp_path / "b")
    assert report.notes[0] == "the values that inputs b have by default are constants now"


def test_a_model_that_was_compiled_before(bundle, tmp_path):
    with pytest.raises(ModelError, match=r"compiled before: node .* is qcompiler.*:Quantize"):
        qcompiler.compile(bundle / "model.onnx", "x86-int8", tmp_path / "again")


def test_ops_of_somebody_else(tmp_path):
    model = model_of(
        "g (float[n,64] x) => (float[n,8] y) { z = MatMul (x, w) y = Neg (z) }", {"w": W}
    )
    model.graph[1].domain, model.graph[1].op_type = "my.dom", "Twice"
    model.graph.opset_imports["my.dom"] = 1
    report = qcompiler.compile(model, "arm-int8", tmp_path / "b")
    assert report.notes[0].startswith("not opened in ONNX Runtime: ops of my.dom need a library")
    assert report.count("body") > 0


@pytest.mark.parametrize("ir_version", [4, 8, 13])
def test_the_ir_version_shuts_nobody_out(matmul, tmp_path, ir_version):
    proto = onnx.load(matmul)
    proto.ir_version = ir_version
    onnx.save(proto, matmul)
    report = qcompiler.compile(matmul, "arm-int8", tmp_path / "out")
    assert onnx.load(report.bundle / "model.onnx").ir_version == 10


def two_nodes():
    text = "g (float[m,64] x) => (float[m,8] y) { a = MatMul (x, w) y = Relu (a) }"
    proto = ir.to_proto(model_of(text, {"w": W}))
    proto.graph.node[0].name, proto.graph.node[1].name = "first", "second"
    del proto.graph.value_info[:]
    return proto


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda g: g.node[1].output.__setitem__(0, "a"),
         "'a' is made twice, by MatMul 'first' and by Relu 'second'"),
        (lambda g: (g.node[0].output.__setitem__(0, "x"), g.node[0].ClearField("name")),
         r"'x' is made twice, by an input of that name and by MatMul\(x, w\)"),
        (lambda g: setattr(g.initializer[0], "data_type", 77),
         "tensor 'w' is of element type 77, which ONNX .* has not"),
        (lambda g: setattr(g.input[0].type.tensor_type, "elem_type", 77),
         "value 'x' is of element type 77"),
        (lambda g: setattr(g.node[1], "op_type", "Reluu"),
         "node 'second': ai.onnx 21 has no Reluu; did you mean 'Relu'"),
        (lambda g: g.node[0].input.append("x"), "node 'first': MatMul with 3 operands"),
        (lambda g: g.node[1].input.__setitem__(0, "b"),
         "node 'second' reads 'b', which is no input, no weight and no result of another node"),
        (lambda g: setattr(g.node[1], "domain", "my.dom"),
         "node 'second' is of the domain 'my.dom', of which the model imports no version"),
        (lambda g: setattr(g.output[0], "name", "z"), "the output 'z' is no result of a node"),
        (lambda g: g.ClearField("output"), "broken.onnx has no outputs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, capfd, edit, message):
    proto, path = two_nodes(), tmp_path / "broken.onnx"
    edit(proto.graph)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=message) as caught:
        qcompiler.compile(path, "arm-int8", tmp_path / "out")
    assert str(path) in str(caught.value)
    assert "truncated" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_what_is_wrong_inside_a_branch_is_named(tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 21]> g (float[m] x, bool c) => (float[m] y) '
        "{ y = If (c) <then_branch = a () => (float[m] p) { q = Neg (x) p = Abs (q) },"
        " else_branch = b () => (float[m] r) { r = Neg (x) }> }"
    )
    proto.graph.node[0].attribute[0].g.node[1].output[0] = "q"
    (tmp_path / "broken.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"'q' is made twice, by Neg\(x\) and by Abs\(q\)"):
        qcompiler.compile(tmp_path / "broken.onnx", "arm-int8", tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda g: g.node[1].input.__setitem__(0, "b"),
            "the model: node 'second' reads 'b', which",
        ),
        (lambda g: g.ClearField("output"), "the model has no outputs"),
        (lambda g: setattr(g.node[1], "op_type", "Reluu"), "the model is not .* no Reluu; did you"),
    ],
)
def test_what_is_wrong_with_an_object_is_named(tmp_path, edit, message):
    proto = two_nodes()
    edit(proto.graph)
    with pytest.raises(ModelError, match=message) as caught:
        qcompiler.compile(ir.from_proto(proto), "arm-int8", tmp_path / "out")
    assert "/" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("offset", "abc", "external data of tensor 'w': its offset is 'abc', which is no number"),
        ("offset", "-4", "its offset is '-4', which is no number of bytes"),
        ("length", "x", "its length is 'x', which is no number of bytes"),
        ("length", "100", r"'w' is said to be 100 bytes, but .64, 8. of FLOAT is 2048"),
        ("location", "", "external data of tensor 'w' has no location"),
    ],
)
def test_external_data_that_is_misplaced(tmp_path, key, value, message):
    path = with_external_data(tmp_path / "m", "w.bin")
    proto = onnx.load(path, load_external_data=False)
    (entry,) = (e for e in proto.graph.initializer[0].external_data if e.key == key)
    entry.value = value
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=message):
        qcompiler.compile(path, "arm-int8", tmp_path / "out")

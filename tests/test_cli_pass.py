"""qcompile pass: from a file to a file, progress, and bad input; `test_cli_passes.py` chooses."""

import json
from pathlib import Path

import onnx
import onnx.parser
import pytest
from terminal import CALIB, MODEL, fails, qcompile

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_pass_list():
    flat = " ".join(qcompile("pass", "--list").stdout.split())
    assert "fuse-gelu float Gather the pieces of a GELU into one op." in flat
    found = json.loads(qcompile("pass", "--list", "--json").stdout)["passes"]
    assert found[0]["name"] == "canonicalize"
    assert {entry["name"]: entry["needs"] for entry in found}["fuse-regions"] == "--target"


def test_pass_runs():
    result = qcompile("pass", "canonicalize+fold-qdq", MODEL, "out.onnx")
    assert result.exit_code == 0, result.output
    assert "changed nothing" in result.stdout
    assert onnx.load("out.onnx").opset_import[0].version == 21


def test_passes_in_pieces_do_what_they_do_together():
    first = "canonicalize+assign-precision+insert-qdq+round-to-nearest"
    result = qcompile("pass", first, MODEL, "qdq.onnx", "--target", "arm-int8", "--calib", CALIB)
    assert result.exit_code == 0, result.output
    result = qcompile("pass", "fold-qdq", "qdq.onnx", "folded.onnx", "--json")
    assert json.loads(result.stdout)["passes"][0]["changed"]
    assert "QMatMulW8A8" in {node.op_type for node in onnx.load("folded.onnx").graph.node}


def test_pass_says_how_far_it_is():
    result = qcompile("pass", "canonicalize+fold-qdq", MODEL, "out.onnx")
    stages = [line.split(" s  ")[1] for line in result.stderr.splitlines()]
    assert stages == ["load", "canonicalize", "fold-qdq", "write"]
    assert qcompile("pass", "canonicalize", MODEL, "out.onnx", "--json").stderr == ""


def test_pass_keeps_external_data_complete():
    onnx.save(onnx.load(MODEL), "in.onnx", save_as_external_data=True, location="in.data")
    Path("sub").mkdir()
    assert qcompile("pass", "fuse-gelu", "in.onnx", "sub/out.onnx").exit_code == 0
    Path("in.data").unlink()
    assert qcompile("inspect", "sub/out.onnx").exit_code == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "give PASSES IN.onnx OUT.onnx, or --list"),
        (["canonicalize", MODEL], 2, "give PASSES IN.onnx OUT.onnx, or --list"),
        (["fold-qdf", MODEL, "o.onnx"], 1, "no pass 'fold-qdf'; did you mean 'fold-qdq'?"),
        (["zzz", MODEL, "o.onnx"], 1, "no pass 'zzz'; one of canonicalize, widen-"),
        (["fuse-regions", MODEL, "o.onnx"], 1, "depends on the target: add --target TARGET"),
        (["insert-qdq", MODEL, "o.onnx"], 1, "needs the plans of assign-precision"),
        (["canonicalize", MODEL, MODEL], 1, "is the input; name another file"),
        (["canonicalize", MODEL, "o.onnx", "--preprocess", "size=20"], 2, "samples: add --calib"),
        (["canonicalize", "nope.onnx", "o.onnx"], 1, "nope.onnx does not exist"),
        (["canonicalize", MODEL, f"{MODEL}/o.onnx"], 1, "digits.onnx: Not a directory"),
        (["assign-precision", MODEL, "o.onnx", "--target", "x"], 1, "unknown target 'x'"),
    ],
)
def test_pass_with_bad_input(args, code, message):
    fails(code, message, "pass", *args)


@pytest.mark.parametrize("name", ["fuse-regions", "fuse-norms", "fuse-attention", "bind-kernels"])
def test_a_pass_that_asks_for_kernels_asks_for_the_target(name, tmp_path):
    fails(1, f"{name} depends on the target", "pass", name, MODEL, tmp_path / "out.onnx")

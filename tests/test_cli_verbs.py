import json
import re
import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from terminal import ARM, CALIB, MODEL, TEST, fails, qcompile

import qcompiler
from qcompiler.recipe import Recipe


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "digits.arm-int8"
    qcompiler.compile(MODEL, "arm-int8", path, recipe=qcompiler.Recipe(keep_float=("Conv",)))
    return path


# qcompile inspect


def test_inspect_a_model():
    flat = " ".join(qcompile("inspect", MODEL).stdout.split())
    assert "ONNX opset 20" in flat
    assert "Input image float [batch, 1, 20, 20]" in flat
    assert "Output logits float [batch, 10]" in flat
    assert "Quantized no" in flat
    assert "MatMul 16" in flat


def test_inspect_a_model_as_json():
    found = json.loads(qcompile("inspect", MODEL, "--json").stdout)
    assert found["inputs"] == [{"name": "image", "dtype": "float", "shape": ["batch", 1, 20, 20]}]
    assert found["ops"]["MatMul"] == 16
    assert found["quantized"] == {}


def test_inspect_sees_quantization(bundle):
    assert "already: QMatMulW8A8 13" in qcompile("inspect", bundle / "model.onnx").stdout


def test_inspect_a_bundle(bundle):
    for path in (bundle, bundle / "manifest.json"):
        result = qcompile("inspect", path)
        assert result.exit_code == 0, result.output
        flat = " ".join(result.stdout.split())
        assert "a bundle for arm-int8" in flat
        assert "ONNX Runtime 1.23 or newer" in flat
        assert "keep_float = ['Conv']" in flat
        assert "13 function body QMatMulW8A8" in flat
        assert re.search(r"Kernels none: [0-9]+ nodes of ours run as function bodies", flat)
        assert "Content" in flat
        assert "intact" in flat


def test_inspect_a_bundle_of_floats():
    assert qcompile(MODEL, "--target", "arm-int8", "--keep-float", "*", "-o", "b").exit_code == 0
    flat = " ".join(qcompile("inspect", "b").stdout.split())
    assert "Kernels none needed: every node is ONNX Runtime's own" in flat
    assert "function bod" not in flat


def test_inspect_a_bundle_as_json(bundle):
    found = json.loads(qcompile("inspect", bundle, "--json").stdout)
    assert (found["kind"], found["target"]) == ("bundle", "arm-int8")
    assert {file["state"] for file in found["files"]} == {"as written"}


def test_inspect_an_altered_bundle():
    assert qcompile(MODEL, *ARM, "-o", "b").exit_code == 0
    with open("b/model.onnx", "ab") as file:
        file.write(b"x")
    Path("b/model.onnx.data").unlink()
    result = qcompile("inspect", "b")
    assert result.exit_code == 1
    assert "altered" in result.stdout
    assert "missing" in result.stdout
    assert "error: b: model.onnx, model.onnx.data: not what was written" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a bundle: it has no manifest.json"),
        ("{", "not a readable manifest"),
        ('{"schema": 99}', "has schema 99"),
        ('{"schema": 1, "target": "x86-a", "tools": {}, "minimum_ort": "1.23", "recipe": {}, '
         '"decisions": [{"no": "x"}], "files": {"model.onnx": ""}, "library": null}',
         "unreadable decisions"),
    ],
)  # fmt: skip
def test_inspect_what_is_no_bundle(content, message):
    Path("b").mkdir()
    if content is not None:
        Path("b/manifest.json").write_text(content)
    fails(1, message, "inspect", "b")


def test_inspect_prints_the_recipe_as_json(bundle):
    recipe = json.loads(qcompile("inspect", bundle, "--recipe", "--json").stdout)
    assert recipe["calibration"] == "mse"


# qcompile bench


def test_bench(bundle):
    result = qcompile("bench", bundle, "--against", MODEL, "--seconds", 0.05, "--threads", 1)
    assert result.exit_code == 0, result.output
    flat = " ".join(result.stdout.split())
    assert "image float32 1x1x20x20, random, batch taken as 1" in flat
    assert "Spinning on during a run, stopped after it" in flat
    assert "Speedup" in flat
    assert max(map(len, result.stdout.splitlines()[4:])) <= 100
    assert "1 thread" in result.stderr


def test_bench_as_json(bundle):
    result = qcompile("bench", bundle, "--against", MODEL, "--seconds", 0.05, "--threads", 1,
                      "--threads", 2, "--shapes", "image=3x1x20x20", "--json")  # fmt: skip
    found = json.loads(result.stdout)
    assert [measured["threads"] for measured in found["results"]] == [1, 2]
    assert found["inputs"][0]["shape"] == [3, 1, 20, 20]
    assert found["inputs"][0]["assumed"] == {}
    assert result.stderr == ""


def test_bench_quietly(bundle):
    result = qcompile("bench", bundle, "--against", MODEL, "--seconds", 0.05, "--threads", 1, "-q")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "Speedup" in result.stdout


def test_bench_with_samples(bundle):
    result = qcompile("bench", bundle, "--against", MODEL, "--seconds", 0.01, "--threads", 1,
                      "--data", CALIB)  # fmt: skip
    assert "16x1x20x20, first of 4 samples" in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "Missing option '--against'"),
        (["--against", "nope.onnx"], 1, "no model: nope.onnx does not exist"),
        (["--against", MODEL, "--threads", "x"], 2, "'x' is not a valid integer."),
        (["--against", MODEL, "--threads", "0"], 2, "0 is not in the range x>=1"),
        (["--against", MODEL, "--seconds", "0"], 2, "not in the range x>0"),
        (["--against", MODEL, "--seconds", "-1"], 2, "not in the range x>0"),
        (["--against", MODEL, "--seconds", "nan"], 2, "nan is no number of seconds"),
        (["--against", MODEL, "--seconds", "inf"], 2, "inf is no number of seconds"),
        (["--against", MODEL, "--seconds", "soon"], 2, "'soon' is not a valid"),
        (["--against", MODEL, "--shapes", "image"], 2, "'image' is not NAME=SIZExSIZE"),
        (["--against", MODEL, "--shapes", "image=1xa"], 2, "'image=1xa' is not NAME=SIZExSIZE"),
        (["--against", MODEL, "--shapes", "image=1x0"], 2, "'image=1x0' is not NAME=SIZExSIZE"),
        (["--against", MODEL, "--shapes", "imag=1x1"], 1, "did you mean 'image'?"),
        (["--against", MODEL, "--shapes", "image=1x1"], 1, "image=1x1 does not fit"),
        (["--against", MODEL, "--data", "nowhere"], 1, "nowhere does not exist"),
        (["--against", MODEL, "--preprocess", "size=20"], 2, "is about samples: add --data"),
        (["--against", MODEL, "--data", CALIB, "--shapes", "image=1x1x20x20"], 1, "not both"),
    ],
)
def test_bench_with_bad_input(bundle, args, code, message):
    fails(code, message, "bench", bundle, *args)


def test_bench_and_others_on_images(bundle):
    image = pytest.importorskip("PIL.Image")
    Path("images").mkdir()
    image.fromarray(np.zeros((20, 20), np.uint8)).save("images/a.png")
    images = ("images", "--preprocess", "size=20,order=gray")
    timed = ("bench", bundle, "--against", MODEL, "--seconds", "0.01", "--threads", "1")
    assert "first of 1 samples" in qcompile(*timed, "--data", *images).stdout
    passes = ("pass", "..insert-qdq", MODEL, "o.onnx", "--target", "arm-int8")
    result = qcompile(*passes, "--calib", *images)
    assert result.exit_code == 0, result.output
    message = "--check-numerics takes arrays, and images has images: give .npz or .npy files"
    fails(2, message, "pass", "canonicalize", MODEL, "o.onnx", "--check-numerics", "images")


# qcompile compare


def test_compare(bundle):
    result = qcompile("compare", MODEL, bundle, "--data", TEST, "--labels", "label")
    assert result.exit_code == 0, result.output
    flat = " ".join(result.stdout.split())
    assert "10 sample files" in flat
    assert "Same Accuracy Accuracy" in flat
    assert "98.70%" in flat
    assert " dB" in flat
    assert max(map(len, result.stdout.splitlines()[3:])) <= 100


def test_compare_as_json(bundle):
    result = qcompile("compare", MODEL, bundle, "--data", CALIB, "--no-native", "--json")
    found = json.loads(result.stdout)
    assert (found["samples"], found["native"], result.stderr) == (4, False, "")
    assert found["outputs"][0]["sqnr"] > 25
    assert found["outputs"][0]["accuracy"] is None


def test_compare_sums_up_many_outputs():
    names = [f"y{index}" for index in range(20)]
    for scale in (1.0, 1.1):
        body = "".join(f"{name} = {'Mul' if name == 'y17' else 'Add'} (x, s) " for name in names)
        onnx.save(onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 21]> g (float[4] x) => '
            f"({', '.join(f'float[4] {name}' for name in names)}) "
            f"{{ s = Constant <value_float = {scale}> () {body} }}"), f"{scale}.onnx")  # fmt: skip
    np.savez("x.npz", x=np.ones(4, np.float32))
    command = ("compare", "1.0.onnx", "1.1.onnx", "--data", "x.npz")
    stdout = qcompile(*command).stdout
    assert [name for name in names if f"\n{name} " in stdout] == names[:6]
    assert "and 14 more: worst SQNR 20.0 dB (y17); -v lists them" in stdout
    assert all(f"\n{name} " in qcompile(*command, "-v").stdout for name in names)
    assert len(json.loads(qcompile(*command, "--json").stdout)["outputs"]) == 20


def test_compare_prints_a_recipe(bundle):
    command = ("compare", MODEL, bundle, "--data", CALIB, "--keep-worst", "2")
    text = qcompile(*command).stdout
    found = json.loads(qcompile(*command, "--json").stdout)
    assert Recipe.from_dict(found) == Recipe.from_dict(tomllib.loads(text))
    assert len(found["keep_float"]) == 3  # Conv was before


def test_compare_says_how_far_it_is(bundle):
    result = qcompile("compare", MODEL, bundle, "--data", CALIB)
    stages = [line.split(" s  ")[1] for line in result.stderr.splitlines()]
    assert stages == ["node by node", "the outputs"]
    assert qcompile("compare", MODEL, bundle, "--data", CALIB, "-q").stderr == ""


def test_compare_equal_models():
    assert "equal" in qcompile("compare", MODEL, MODEL, "--data", CALIB).stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([MODEL, "BUNDLE"], 2, "Missing option '--data'"),
        ([MODEL, "BUNDLE", "--data", "nowhere"], 1, "nowhere does not exist"),
        ([MODEL, "BUNDLE", "--data", CALIB, "--labels", "label"], 1, "no array 'label' of labels"),
        ([MODEL, "nowhere", "--data", CALIB], 1, "no model: nowhere does not exist"),
        (["nope.onnx", "BUNDLE", "--data", CALIB], 1, "no model: nope.onnx does not exist"),
    ],
)
def test_compare_with_bad_input(bundle, args, code, message):
    fails(code, message, "compare", *(bundle if arg == "BUNDLE" else arg for arg in args))


# qcompile pass


def test_pass_list():
    flat = " ".join(qcompile("pass", "--list").stdout.split())
    assert "fuse-gelu float Gather the pieces of an exact GELU into one op." in flat
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
